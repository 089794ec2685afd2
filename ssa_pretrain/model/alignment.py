"""Adds a layer's alignment loss to the gradient without a path through the pipeline.

`attach_loss(x, loss, scale)` returns x unchanged and tells autograd that the total loss contains `scale * loss`: the backward through x passes the
constant `scale` to `loss`. Each pipeline stage therefore adds its own layers' terms, whatever is sent between stages. Under recomputation a term is
counted once, in the forward that the backward goes through. megatron-core does the same for the auxiliary losses of mixtures of experts, but with a
global scale.
"""

import torch
from torch import Tensor


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor, scale: float | Tensor) -> Tensor:
        ctx.scale = scale
        ctx.loss_like = loss.detach()
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad_x: Tensor):
        return grad_x, torch.ones_like(ctx.loss_like) * ctx.scale, None


def attach_loss(x: Tensor, loss: Tensor, scale: float | Tensor) -> Tensor:
    """Returns x, and adds `scale * loss` to the total loss that the backward through x differentiates.

    Args:
        x: any tensor that the total loss depends on.
        loss: scalar.
        scale: d(total) / d(loss), a number or a scalar tensor.
    """
    return _AttachLoss.apply(x, loss, scale)
