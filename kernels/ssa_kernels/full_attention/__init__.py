"""Causal softmax attention over all earlier keys of a document: api.py, reference.py, and the libraries' fused kernels in fused.py."""

from .api import full_attention

__all__ = ["full_attention"]
