"""The output layer and its cross entropy in plain PyTorch: the definition of the operator, and the implementation for a CPU.

api.py has the mathematics.
"""

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

IGNORED = -100  # as in torch's cross entropy


class LinearCrossEntropyReference(torch.autograd.Function):
    """(hidden, weight, labels, group, accumulate_into, z_loss) -> losses, or (losses, z-losses) if z_loss is not 0.

    The softmax is in float32, or float64 for float64 inputs.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, group, accumulate_into, z_loss=0.0):
        """Keeps P in the hidden states' dtype, as the kernels do."""
        logits = hidden @ weight.t()
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        lse, target, column = row_statistics(wide, labels, group)
        counts = counted(labels, weight.shape[0] * (1 if group is None else dist.get_world_size(group)))
        probabilities = torch.exp(wide - lse.unsqueeze(1))
        if z_loss:
            probabilities *= (1.0 + 2.0 * z_loss * lse).unsqueeze(1)
        own = (column >= 0) & (column < weight.shape[0])
        probabilities[own.nonzero().squeeze(1), column[own]] -= 1.0
        ctx.save_for_backward(hidden, weight, probabilities.to(hidden.dtype), counts)
        ctx.accumulate_into = accumulate_into
        return losses_of(ctx, lse, target, counts, z_loss)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses, *_):
        """Two products."""
        hidden, weight, probabilities, counts = ctx.saved_tensors
        scale = torch.where(counts, grad_losses, 0.0).unsqueeze(1)
        grad_hidden = ((probabilities @ weight) * scale).to(hidden.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_hidden, *(None,) * 5
        scaled = (hidden * scale).to(hidden.dtype)
        return grad_hidden, weight_gradient(probabilities, scaled, ctx.accumulate_into), *(None,) * 4


def losses_of(
    ctx, lse: torch.Tensor, target: torch.Tensor, counts: torch.Tensor, z_loss: float
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Returns what the autograd functions return, from each token's log-sum-exp and label's logit."""
    losses = torch.where(counts, lse - target, 0.0)
    if not z_loss:
        return losses
    z_losses = torch.where(counts, z_loss * lse.square(), 0.0)
    ctx.mark_non_differentiable(z_losses)
    return losses + z_losses, z_losses


def counted(labels: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Returns bool `[tokens]`: whether a label lies in the vocabulary, so that its token counts in the loss."""
    return (labels >= 0) & (labels < vocabulary)


def row_statistics(
    wide: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (log-sum-exp, label's logit) over all ranks, and the label's column on this rank, out of range if another rank has it."""
    columns = wide.shape[1]
    column = labels.long() - columns * (dist.get_rank(group) if group is not None else 0)
    own = (column >= 0) & (column < columns)
    target = wide.gather(1, column.clamp(0, columns - 1).unsqueeze(1)).squeeze(1) * own
    lse = torch.logsumexp(wide, dim=1)
    if group is not None:
        lse, target = combine_ranks(lse, target, group)
    return lse, target, column


def combine_ranks(
    lse: torch.Tensor, target: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (log-sum-exp, label's logit) of the whole vocabulary from those of each rank's slice."""
    mine = torch.stack([lse, target])
    everyone = mine.new_empty(dist.get_world_size(group), *mine.shape)
    dist.all_gather_into_tensor(everyone.view(-1, mine.shape[-1]), mine, group=group)
    return torch.logsumexp(everyone[:, 0], dim=0), everyone[:, 1].sum(dim=0)


def weight_gradient(
    probabilities_TV: torch.Tensor, scaled_TM: torch.Tensor, accumulate_into: torch.Tensor | None
) -> torch.Tensor | None:
    """Returns P^T (g h) in its inputs' dtype, or adds it to the float32 buffer `accumulate_into` and returns None."""
    left = probabilities_TV.t()
    if accumulate_into is None:
        return left @ scaled_TM
    if left.dtype == torch.float32:
        accumulate_into.addmm_(left, scaled_TM)
    elif left.is_cuda and accumulate_into.is_contiguous():
        # One product with bf16 inputs that accumulates into the float32 buffer.
        torch.ops.aten.addmm.dtype_out(accumulate_into, left, scaled_TM, torch.float32, out=accumulate_into)
    elif left.is_cuda:
        accumulate_into.copy_(torch.ops.aten.addmm.dtype(accumulate_into.contiguous(), left, scaled_TM, torch.float32))
    else:
        accumulate_into.add_(left @ scaled_TM)
    return None
