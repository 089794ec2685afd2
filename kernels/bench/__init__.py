"""The kernels' benchmark: `PYTHONPATH=kernels python -m bench`. Reading order: __main__, cases, timing, check, bounds, plot, locality.

It is not part of the installed package. Run it from a clone.
"""
