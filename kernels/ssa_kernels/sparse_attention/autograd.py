"""Autograd of sparse attention: saves and calls. Apart from api.py because it imports Triton, which a CPU machine may lack.

A caller that differentiates more at once (both streams with their gate) calls sparse_attention_forward and sparse_attention_backward
itself and hands the latter the delta that it has.
"""

import torch
from torch.autograd.function import once_differentiable

from ..checks import aligned
from .backward import sparse_attention_backward
from .forward import sparse_attention_forward


class SparseAttention(torch.autograd.Function):
    """(q, k, v, indices, layout, scale) -> (o, lse). Saves its tensors, o and lse; lse has no gradient."""

    @staticmethod
    def forward(ctx, q, k, v, indices, layout, scale):
        o, lse = sparse_attention_forward(q, k, v, indices, layout, scale)
        ctx.save_for_backward(q, k, v, indices, o, lse)
        ctx.layout, ctx.scale = layout, scale
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, _):
        q, k, v, indices, o, lse = ctx.saved_tensors
        dq, dk, dv = sparse_attention_backward(q, k, v, indices, o, lse, aligned(do), ctx.layout, ctx.scale)
        return dq, dk, dv, None, None, None
