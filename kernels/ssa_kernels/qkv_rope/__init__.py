"""From the mixed projection to rotated queries, rotated keys, values and gate logits: api.py, reference.py, and the kernels in triton.py."""

from .api import qkv_rope, rope
from .reference import QKNorm

__all__ = ["QKNorm", "qkv_rope", "rope"]
