"""Choosing blocks: api.py, reference.py and the Triton kernels."""
