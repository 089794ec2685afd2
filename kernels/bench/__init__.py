"""The kernels' benchmark: `PYTHONPATH=kernels python -m bench`. Reading order: __main__, cases, timing, check, bounds, plot, locality.

It is not a part of the installed package: run it from a clone.
"""
