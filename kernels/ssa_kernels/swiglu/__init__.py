"""SwiGLU of a fused projection: api.py and the kernels in forward.py and backward.py."""

from .api import swiglu

__all__ = ["swiglu"]
