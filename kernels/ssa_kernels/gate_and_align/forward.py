"""Gate, alignment loss and captured mass in one pass over both streams' outputs (Triton).

Mathematics, for a row r = (token, head) with gate g = sigmoid(logit_r) and D features:

    f = g * o_full[r],  s = g * o_sparse[r]
    out[r]   = f or s, the main stream
    loss     = (w_sparsity + w_commitment) / N * sum over rows and features of SmoothL1(f - s),  N = tokens * H * D
    mass     = mean over rows of exp(lse_sparse[r] - lse_full[r]), the attention mass that the chosen blocks hold

Everything is accumulated in fp32. The kernel is bound by memory: two tensors in, one out, and 4 bytes a row beside them.

Grid: one program per tile of rows. A program writes its own partial sums, and a second, single program adds them in a fixed
order, so that the loss has the same bits from run to run. No atomics.

Which stream is main may be a constant or a number on the device: training draws it for each microbatch, and a drawn value that
stays on the device needs no synchronisation and can be replayed by a CUDA graph.

It does not mask rows: every row given counts in both means.
"""

import torch
import triton
import triton.language as tl

from ..launch import launch, next_power_of_2

MAIN_SPARSE = 0
MAIN_FULL = 1
MAIN_ON_DEVICE = 2

# Features a program holds per tensor. 4096 bf16 values over 4 warps are four 16-byte loads a thread and a tensor.
TILE_ELEMENTS = 4096
NUM_WARPS = 4
# Partial sums that the reducing program adds per step: few steps, since each costs a round trip to memory.
REDUCE_BLOCK = 16384


@triton.jit(do_not_specialize=["num_rows", "lse_tokens", "lse_stride_row", "lse_stride_token", "lse_stride_head"])
def gate_forward_kernel(
    o_full_ptr, o_sparse_ptr, logits_ptr, main_ptr, lse_full_ptr, lse_sparse_ptr, out_ptr, partial_ptr,
    num_rows, lse_tokens, lse_stride_row, lse_stride_token, lse_stride_head,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    MAIN: tl.constexpr, WITH_MASS: tl.constexpr,
):  # fmt: skip
    """Gated main stream of one tile of rows, and the tile's sums of SmoothL1 and of the captured mass."""
    tile = tl.program_id(0)
    rows = tile.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    row_ok = rows < num_rows
    ok = row_ok[:, None] & (dims < HEAD_DIM)[None, :]
    offsets = rows[:, None] * HEAD_DIM + dims[None, :]

    o_full = tl.load(o_full_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
    o_sparse = tl.load(o_sparse_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
    gate = tl.sigmoid(tl.load(logits_ptr + rows, mask=row_ok, other=0.0).to(tl.float32))
    gated_full = o_full * gate[:, None]
    gated_sparse = o_sparse * gate[:, None]

    if MAIN == 2:
        out = tl.where(tl.load(main_ptr) != 0, gated_full, gated_sparse)
    elif MAIN == 1:
        out = gated_full
    else:
        out = gated_sparse
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=ok)

    # Lanes outside the tensor hold 0 - 0 and add nothing.
    distance = tl.abs(gated_full - gated_sparse)
    smooth = tl.where(distance < 1.0, 0.5 * distance * distance, distance - 0.5)
    tl.store(partial_ptr + tile, tl.sum(tl.sum(smooth, 1), 0))
    if WITH_MASS:
        token = rows // NUM_HEADS
        head = rows % NUM_HEADS
        lse_offsets = (
            (token // lse_tokens) * lse_stride_row + (token % lse_tokens) * lse_stride_token + head * lse_stride_head
        )
        lse_full = tl.load(lse_full_ptr + lse_offsets, mask=row_ok, other=0.0)
        lse_sparse = tl.load(lse_sparse_ptr + rows, mask=row_ok, other=float("-inf"))
        tl.store(partial_ptr + tl.num_programs(0) + tile, tl.sum(tl.exp(lse_sparse - lse_full), 0))


@triton.jit(do_not_specialize=["num_partials"])
def sum_partials_kernel(partial_ptr, result_ptr, num_partials, factor_0, factor_1, BLOCK: tl.constexpr):
    """result[i] = factor_i * the sum of the i-th run of partials, added in one fixed order; one program for each i."""
    which = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    start_ptr = partial_ptr + which.to(tl.int64) * num_partials
    for start in range(0, num_partials, BLOCK):
        index = start + lanes
        total += tl.load(start_ptr + index, mask=index < num_partials, other=0.0)
    tl.store(result_ptr + which, tl.sum(total, 0) * tl.where(which == 0, factor_0, factor_1))


def gate_forward(
    o_full: torch.Tensor,
    o_sparse: torch.Tensor,
    gate_logits: torch.Tensor,
    main: str | torch.Tensor,
    weights: tuple[float, float],
    lse: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Returns the gated main stream, the alignment loss and, where log-sum-exps are given, the mean captured mass.

    Args:
        o_full: [tokens, H, D], contiguous.
        o_sparse: [tokens, H, D], contiguous.
        gate_logits: [tokens, H], contiguous.
        main: "full", "sparse", or an int32 tensor of one element on the same device, not 0 for "full".
        weights: (sparsity, commitment).
        lse: natural logarithms, fp32: the full stream's as [rows, tokens / rows, H] with any strides, the sparse stream's as
            [tokens, H], contiguous.
    """
    tokens, num_heads, head_dim = o_full.shape
    num_rows = tokens * num_heads
    out = torch.empty_like(o_full)
    # Where a kernel reads no log-sum-exp, the output stands in as a pointer.
    lse_full, lse_sparse = (out[:, :, 0][None], out) if lse is None else lse
    num_sums = 1 if lse is None else 2
    if num_rows == 0:
        results = torch.zeros(num_sums, dtype=torch.float32, device=o_full.device)
        return out, results[0], None if lse is None else results[1]

    block_dim, block_rows = tile_shape(head_dim)
    num_tiles = -(-num_rows // block_rows)
    partials = torch.empty(num_sums, num_tiles, dtype=torch.float32, device=o_full.device)
    results = torch.empty(num_sums, dtype=torch.float32, device=o_full.device)
    launch(
        gate_forward_kernel, (num_tiles,),
        o_full, o_sparse, gate_logits, main if isinstance(main, torch.Tensor) else out,
        lse_full, lse_sparse, out, partials, num_rows, lse_full.shape[1], *lse_full.stride(),
        NUM_HEADS=num_heads, HEAD_DIM=head_dim, BLOCK_DIM=block_dim, BLOCK_ROWS=block_rows,
        MAIN=main_code(main), WITH_MASS=lse is not None, num_warps=NUM_WARPS,
    )  # fmt: skip
    launch(
        sum_partials_kernel, (num_sums,),
        partials, results, num_tiles, sum(weights) / (num_rows * head_dim), 1.0 / num_rows, BLOCK=REDUCE_BLOCK, num_warps=32
    )  # fmt: skip
    return out, results[0], None if lse is None else results[1]


def tile_shape(head_dim: int) -> tuple[int, int]:
    """Returns (features, rows) of a program's tile: the head dimension rounded up to a power of two, and the rows that fit."""
    block_dim = next_power_of_2(head_dim)
    return block_dim, max(1, TILE_ELEMENTS // block_dim)


def main_code(main: str | torch.Tensor) -> int:
    """Returns the kernels' constant for the main stream."""
    if isinstance(main, torch.Tensor):
        return MAIN_ON_DEVICE
    return MAIN_FULL if main == "full" else MAIN_SPARSE
