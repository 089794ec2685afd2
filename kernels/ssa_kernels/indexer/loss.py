"""The scorer's loss as one autograd function whose gradients are computed with it.

The loss is a scalar that is differentiated once, so the backward only scales what the forward has found. Nothing of the forward's chunks is kept:
block masses have queries x blocks x kv heads numbers, which at blocks of 16 keys and rows of 32k would be 0.5 GB a layer.
Saved for the backward: the gradients, of the shapes of iq and ik. Without gradients (evaluation, the first pass of recomputation) none are computed.
"""

import torch
from torch.autograd.function import once_differentiable

from .reference import loss_reference


class IndexLossFunction(torch.autograd.Function):
    """(iq, ik, q, k, layout, top_k, scales, with_gradients, impl) -> (loss, captured mass)."""

    @staticmethod
    def forward(ctx, iq, ik, q, k, layout, top_k, scales, with_gradients, impl):
        """Computes the means over queries and kv heads, and the gradients if asked for."""
        arguments = {"layout": layout, "top_k": top_k, "scales": scales, "with_gradients": with_gradients}
        if impl == "triton":
            from .launch import loss_triton  # imported here because Triton may be missing on a CPU machine

            loss, captured, *grads = loss_triton(iq, ik, q, k, **arguments)
        else:
            loss, captured, *grads = loss_reference(iq, ik, q, k, **arguments)
        count = iq.shape[0] * ik.shape[1]
        captured = captured / count
        ctx.mark_non_differentiable(captured)
        if with_gradients:
            ctx.save_for_backward(*((grad / count).to(iq.dtype) for grad in grads))
        return loss / count, captured

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        """Scales the gradients."""
        grad_q, grad_k = ctx.saved_tensors
        return (grad_q * grad_loss).to(grad_q.dtype), (grad_k * grad_loss).to(grad_k.dtype), *(None,) * 7
