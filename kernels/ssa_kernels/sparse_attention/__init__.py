"""Attention to chosen blocks: api.py, reference.py and the Triton kernels, forward and backward."""
