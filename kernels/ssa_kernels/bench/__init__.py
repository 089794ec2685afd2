"""The kernels' benchmark: `python -m ssa_kernels.bench`. Reading order: __main__, cases, timing, check, bounds, plot, locality."""
