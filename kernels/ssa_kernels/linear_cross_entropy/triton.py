"""Each token's log-sum-exp and label's logit, and its logits turned into softmax minus one-hot in place (Triton); its autograd function.

api.py has the mathematics. Each lane keeps a running maximum and sum of its own, so a token's V logits cost one reduction over the lanes
instead of V / BLOCK. Exponentials are base 2, of logits times log2(e), in float32 throughout. Memory-bound: a token's logits are read,
read again from the cache, and written.

Grid: one program per token. Under tensor parallelism the two halves are two launches, because the second needs the log-sum-exp over all
ranks.
"""

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ..launch import launch, next_power_of_2
from .reference import combine_ranks, counted, losses_of, weight_gradient

BLOCK = 4096
NUM_WARPS = 8
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LOWEST: tl.constexpr = tl.constexpr(-3.0e38)  # below any logit; finite, so that a difference of two is not NaN


@triton.jit
def cross_entropy_row_kernel(
    logits_ptr, labels_ptr, lse_ptr, target_ptr, first, stride, z_loss,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, STATISTICS: tl.constexpr, OVERWRITE: tl.constexpr,
    Z_LOSS: tl.constexpr,
):  # fmt: skip
    """One token's row of logits. STATISTICS: computes and stores lse and target, else reads lse. OVERWRITE: turns the row into P.

    Z_LOSS: P is that of the loss with z_loss times the squared log-sum-exp.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    lanes = tl.arange(0, BLOCK)
    column_of_label = tl.load(labels_ptr + row).to(tl.int64) - first
    if STATISTICS:
        # Read before the reductions below, which synchronise all lanes: no lane overwrites the logit before every lane has it.
        mine = (column_of_label >= 0) & (column_of_label < COLUMNS)
        target = tl.load(row_ptr + column_of_label, mask=mine, other=0.0).to(tl.float32)
        tl.store(target_ptr + row, target)
        top = tl.full([BLOCK], LOWEST, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, COLUMNS, BLOCK):
            column = start + lanes
            x = tl.load(row_ptr + column, mask=column < COLUMNS, other=float("-inf")).to(tl.float32) * LOG2_E
            higher = tl.maximum(top, x)
            total = total * tl.exp2(top - higher) + tl.exp2(x - higher)
            top = higher
        peak = tl.max(top, 0)
        lse = (peak + tl.log2(tl.sum(total * tl.exp2(top - peak), 0))) / LOG2_E
        tl.store(lse_ptr + row, lse)
    else:
        lse = tl.load(lse_ptr + row)
    if OVERWRITE:
        for start in range(0, COLUMNS, BLOCK):
            column = start + lanes
            ok = column < COLUMNS
            x = tl.load(row_ptr + column, mask=ok, other=0.0).to(tl.float32)
            p = tl.exp2((x - lse) * LOG2_E)
            if Z_LOSS:
                p *= 1.0 + 2.0 * z_loss * lse
            p -= tl.where(column == column_of_label, 1.0, 0.0)
            tl.store(row_ptr + column, p.to(logits_ptr.dtype.element_ty), mask=ok)


class LinearCrossEntropy(torch.autograd.Function):
    """(hidden, weight, labels, group, accumulate_into, training, z_loss) -> losses, or (losses, z-losses) if z_loss is not 0.

    When training, keeps one [tokens, V] buffer until the backward.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, group, accumulate_into, training, z_loss=0.0):
        """One product and one kernel. Under tensor parallelism two kernels, with a gather of two numbers per token between them."""
        logits = hidden @ weight.t()
        columns = weight.shape[0]
        counts = counted(labels, columns * (1 if group is None else dist.get_world_size(group)))
        if group is None:
            lse, target = statistics(logits, labels, 0, overwrite=training, z_loss=z_loss)
        else:
            first = columns * dist.get_rank(group)
            lse, target = combine_ranks(*statistics(logits, labels, first, overwrite=False), group)
            if training:
                probabilities_in_place(logits, labels, first, lse, z_loss)
        if training:
            ctx.save_for_backward(hidden, weight, logits, counts)
            ctx.accumulate_into = accumulate_into
        return losses_of(ctx, lse, target, counts, z_loss)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses, *_):
        """Two products. The losses' gradients scale the narrow operands."""
        hidden, weight, probabilities, counts = ctx.saved_tensors
        scale = torch.where(counts, grad_losses, 0.0).unsqueeze(1)
        grad_hidden = ((probabilities @ weight) * scale).to(hidden.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_hidden, *(None,) * 6
        scaled = (hidden * scale).to(hidden.dtype)
        return grad_hidden, weight_gradient(probabilities, scaled, ctx.accumulate_into), *(None,) * 5


def statistics(
    logits: torch.Tensor, labels: torch.Tensor, first: int, *, overwrite: bool, z_loss: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns float32 (log-sum-exp, label's logit or 0) of each row. With `overwrite`, turns the rows into P.

    Args:
        logits: [tokens, V], rows contiguous.
        labels: [tokens], ids in the whole vocabulary.
        first: the id of column 0.
        overwrite: whether the logits become P.
        z_loss: factor of the squared log-sum-exp in the loss.
    """
    lse, target = (torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(2))
    _launch(logits, labels, lse, target, first, computed=True, overwrite=overwrite, z_loss=z_loss)
    return lse, target


def probabilities_in_place(
    logits: torch.Tensor, labels: torch.Tensor, first: int, lse: torch.Tensor, z_loss: float = 0.0
) -> None:
    """Turns rows of logits into P with the given log-sum-exp; other arguments as in `statistics`."""
    _launch(logits, labels, lse.contiguous(), lse, first, computed=False, overwrite=True, z_loss=z_loss)


def _launch(
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    target: torch.Tensor,
    first: int,
    *,
    computed: bool,
    overwrite: bool,
    z_loss: float,
) -> None:
    tokens, columns = logits.shape
    if tokens > 0:
        launch(
            cross_entropy_row_kernel, (tokens,),
            logits, labels, lse, target, first, logits.stride(0), float(z_loss),
            COLUMNS=columns, BLOCK=min(BLOCK, next_power_of_2(columns)), STATISTICS=computed, OVERWRITE=overwrite,
            Z_LOSS=z_loss != 0.0, num_warps=NUM_WARPS,
        )  # fmt: skip
