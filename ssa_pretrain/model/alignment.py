"""How a layer's alignment loss reaches the gradient without a path through the pipeline.

`attach_loss(x, loss, scale)` returns x unchanged and tells autograd that the total loss holds `scale * loss`: the backward that passes
through x hands the constant `scale` to `loss`. So each pipeline stage adds its own layers' part, whatever travels between the stages, and
under recomputation the term is counted once, in the one forward that the backward goes through. megatron-core does the same for the
auxiliary losses of mixtures of experts; this one holds no global scale.
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
    """Return x, with `scale * loss` added to whatever total the backward through x differentiates.

    Args:
        x: any tensor on the way to the total loss.
        loss: scalar.
        scale: d(total) / d(loss), a number or a scalar tensor.
    """
    return _AttachLoss.apply(x, loss, scale)
