"""One layer of SSA's attention, from q, k, v and the gate logits to the output and the alignment loss: api.py, autograd.py."""

from .api import SSAOutput, ssa_attention

__all__ = ["SSAOutput", "ssa_attention"]
