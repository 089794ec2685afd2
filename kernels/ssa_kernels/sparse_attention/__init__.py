"""Attention to chosen blocks: api.py, reference.py, and the kernels in portable.py and tensor_core/, called by autograd.py."""
