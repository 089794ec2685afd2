"""One stream multiplied by its gate: api.py and the kernels in forward.py and backward.py. Both streams: gate_and_align."""

from .api import gate

__all__ = ["gate"]
