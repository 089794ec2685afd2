"""Autograd of the fused projection split. Apart from api.py because it imports Triton, which a CPU machine may lack."""

import torch
from torch.autograd.function import once_differentiable

from .backward import qkv_rope_backward
from .forward import qkv_rope_forward


class QKVRope(torch.autograd.Function):
    """(mixed, angles, positions, sizes) -> (q, k, v, gate logits). A rotation's backward is the inverse rotation: nothing of size is saved."""

    @staticmethod
    def forward(ctx, mixed, angles, positions, num_kv_heads, group_size, head_dim, num_gates):
        """Runs the forward kernel."""
        ctx.sizes = (num_kv_heads, group_size, head_dim, num_gates)
        ctx.save_for_backward(angles, positions)
        return qkv_rope_forward(mixed, angles, positions, *ctx.sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q, grad_k, grad_v, grad_gate):
        """Writes the gradient of the mixed projection in one pass."""
        grads = (grad.contiguous() for grad in (grad_q, grad_k, grad_v, grad_gate))
        return qkv_rope_backward(*grads, *ctx.saved_tensors, *ctx.sizes), *(None,) * 6
