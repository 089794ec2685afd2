"""Choosing blocks: api.py, reference.py and the Triton kernels."""  # noqa: A005 - always inside its package
