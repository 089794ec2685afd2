"""Autograd of the output layer with its cross entropy. Apart from api.py because it imports Triton, which a CPU machine may lack."""

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from .forward import probabilities_in_place, statistics
from .products import weight_gradient
from .reference import combine_ranks, counted


class LinearCrossEntropy(torch.autograd.Function):
    """(hidden, weight, labels, group, accumulate_into, gradients wanted) -> losses. Keeps one [tokens, V] buffer until the backward, none where no gradient is wanted."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, group, accumulate_into, training):
        """One product, one kernel; under tensor parallelism two, with a gather of two numbers a token between them."""
        logits = hidden @ weight.t()
        columns = weight.shape[0]
        counts = counted(labels, columns * (1 if group is None else dist.get_world_size(group)))
        if group is None:
            lse, target = statistics(logits, labels, 0, overwrite=training)
        else:
            first = columns * dist.get_rank(group)
            lse, target = combine_ranks(*statistics(logits, labels, first, overwrite=False), group)
            if training:
                probabilities_in_place(logits, labels, first, lse)
        if training:
            ctx.save_for_backward(hidden, weight, logits, counts)
            ctx.accumulate_into = accumulate_into
        return torch.where(counts, lse - target, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses):
        """Two products; the gradients of the losses go on the narrow operands."""
        hidden, weight, probabilities, counts = ctx.saved_tensors
        scale = torch.where(counts, grad_losses, 0.0).unsqueeze(1)
        grad_hidden = ((probabilities @ weight) * scale).to(hidden.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_hidden, *(None,) * 5
        scaled = (hidden * scale).to(hidden.dtype)
        return grad_hidden, weight_gradient(probabilities, scaled, ctx.accumulate_into), *(None,) * 4
