"""A short causal convolution over the keys of each document: api.py, reference.py, and the kernels in triton.py."""

from .api import key_convolution

__all__ = ["key_convolution"]
