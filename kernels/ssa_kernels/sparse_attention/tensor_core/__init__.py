"""The sparse stream's kernels on tensor cores (Gluon), for 16-bit elements. Entry point: launch.py.

Gluon kernels cannot be defined under Triton's interpreter, so nothing is imported here.
"""
