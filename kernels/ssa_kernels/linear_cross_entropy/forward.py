"""Log-sum-exp of each row of logits, the label's logit, and the row turned into softmax minus one-hot where it lies (Triton).

Every lane keeps its own running maximum and sum, so that a row of V columns costs one reduction over the lanes instead of V / BLOCK. Base-2
exponentials of logits times log2(e), float32 throughout. Memory-bound: a row is read, read again from the cache, and written.

Grid: one program per token. Under tensor parallelism the two halves are two launches, since the log-sum-exp in the second is all ranks'.
"""

import torch
import triton
import triton.language as tl

from ..launch import launch, next_power_of_2

BLOCK = 4096
NUM_WARPS = 8
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LOWEST: tl.constexpr = tl.constexpr(-3.0e38)  # below any logit; finite, so that differences of it are no NaN


@triton.jit
def cross_entropy_row_kernel(
    logits_ptr, labels_ptr, lse_ptr, target_ptr, first, stride,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, STATISTICS: tl.constexpr, OVERWRITE: tl.constexpr,
):  # fmt: skip
    """One row. STATISTICS computes and stores log-sum-exp and target, else they are read; OVERWRITE turns the row into P."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    lanes = tl.arange(0, BLOCK)
    column_of_label = tl.load(labels_ptr + row).to(tl.int64) - first
    if STATISTICS:
        # Read first: the reductions below hold all lanes back until each has it, so that none writes over it too early.
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
            p = tl.exp2((x - lse) * LOG2_E) - tl.where(column == column_of_label, 1.0, 0.0)
            tl.store(row_ptr + column, p.to(logits_ptr.dtype.element_ty), mask=ok)


def statistics(
    logits: torch.Tensor, labels: torch.Tensor, first: int, *, overwrite: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns float32 (log-sum-exp, label's logit or 0) of each row, and turns the rows into P if told to.

    Args:
        logits: [tokens, V], rows contiguous.
        labels: [tokens], ids in the whole vocabulary.
        first: the id of column 0.
        overwrite: whether the logits become softmax minus one-hot.
    """
    lse, target = (torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(2))
    _launch(logits, labels, lse, target, first, computed=True, overwrite=overwrite)
    return lse, target


def probabilities_in_place(logits: torch.Tensor, labels: torch.Tensor, first: int, lse: torch.Tensor) -> None:
    """Turns rows of logits into P by a log-sum-exp from outside; arguments as in `statistics`."""
    _launch(logits, labels, lse.contiguous(), lse, first, computed=False, overwrite=True)


def _launch(
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    target: torch.Tensor,
    first: int,
    *,
    computed: bool,
    overwrite: bool,
) -> None:
    tokens, columns = logits.shape
    if tokens > 0:
        launch(
            cross_entropy_row_kernel, (tokens,),
            logits, labels, lse, target, first, logits.stride(0),
            COLUMNS=columns, BLOCK=min(BLOCK, next_power_of_2(columns)), STATISTICS=computed, OVERWRITE=overwrite,
            num_warps=NUM_WARPS,
        )  # fmt: skip
