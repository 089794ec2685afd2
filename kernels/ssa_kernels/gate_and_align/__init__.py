"""The gate on both streams and the loss that aligns them: api.py, reference.py, and the kernels in triton.py."""

from .api import gate_and_align

__all__ = ["gate_and_align"]
