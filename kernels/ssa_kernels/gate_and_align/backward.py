"""All gradients of gate and alignment in one pass (Triton).

With grad_out the gradient of the main stream, gl the gradient of the loss, e = clip(f - s, -1, 1) and N = tokens * H * D:

    df = gl * w_sparsity / N * e    (+ grad_out where full is main)       the sparsity loss teaches full, never sparse
    ds = -gl * w_commitment / N * e (+ grad_out where sparse is main)     the commitment loss teaches sparse, never full
    do_full = g * df,  do_sparse = g * ds
    delta_full = sum_d do_full * o_full,  delta_sparse = sum_d do_sparse * o_sparse
    dlogit = (1 - g) * (delta_full + delta_sparse)

because dlogit = g (1 - g) * sum_d (df * o_full + ds * o_sparse). The deltas are what a flash-style backward of either stream
needs first: handing them over spares each one a pass over its output and its gradient. They are taken from the gradients as
rounded to the output's dtype, since those are what the attention's backward multiplies with V: then the rows of dS sum to 0.

Grid: one program per tile of rows. Memory-bound: three tensors in, two out. gl is read on the device, without synchronisation.
"""

import torch
import triton
import triton.language as tl

from ..launch import launch
from .forward import NUM_WARPS, main_code, tile_shape


@triton.jit(do_not_specialize=["num_rows"])
def gate_backward_kernel(
    o_full_ptr, o_sparse_ptr, logits_ptr, main_ptr, grad_out_ptr, grad_loss_ptr,
    do_full_ptr, do_sparse_ptr, delta_full_ptr, delta_sparse_ptr, grad_logits_ptr,
    num_rows, sparsity_factor, commitment_factor,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, MAIN: tl.constexpr,
):  # fmt: skip
    """Both streams' output gradients, both deltas and the gate logits' gradient of one tile of rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    row_ok = rows < num_rows
    ok = row_ok[:, None] & (dims < HEAD_DIM)[None, :]
    offsets = rows[:, None] * HEAD_DIM + dims[None, :]

    o_full = tl.load(o_full_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
    o_sparse = tl.load(o_sparse_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
    grad_out = tl.load(grad_out_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
    grad_loss = tl.load(grad_loss_ptr).to(tl.float32)
    gate = tl.sigmoid(tl.load(logits_ptr + rows, mask=row_ok, other=0.0).to(tl.float32))

    clipped = tl.minimum(tl.maximum(o_full * gate[:, None] - o_sparse * gate[:, None], -1.0), 1.0)
    d_full = (grad_loss * sparsity_factor) * clipped
    d_sparse = (-grad_loss * commitment_factor) * clipped
    if MAIN == 2:
        main_is_full = tl.load(main_ptr) != 0
        d_full += tl.where(main_is_full, grad_out, 0.0)
        d_sparse += tl.where(main_is_full, 0.0, grad_out)
    elif MAIN == 1:
        d_full += grad_out
    else:
        d_sparse += grad_out
    do_full = (d_full * gate[:, None]).to(do_full_ptr.dtype.element_ty)
    do_sparse = (d_sparse * gate[:, None]).to(do_sparse_ptr.dtype.element_ty)
    tl.store(do_full_ptr + offsets, do_full, mask=ok)
    tl.store(do_sparse_ptr + offsets, do_sparse, mask=ok)

    delta_full = tl.sum(do_full.to(tl.float32) * o_full, 1)
    delta_sparse = tl.sum(do_sparse.to(tl.float32) * o_sparse, 1)
    tl.store(delta_full_ptr + rows, delta_full, mask=row_ok)
    tl.store(delta_sparse_ptr + rows, delta_sparse, mask=row_ok)
    grad_logits = (delta_full + delta_sparse) * (1.0 - gate)
    tl.store(grad_logits_ptr + rows, grad_logits.to(grad_logits_ptr.dtype.element_ty), mask=row_ok)


def gate_backward(
    o_full: torch.Tensor,
    o_sparse: torch.Tensor,
    gate_logits: torch.Tensor,
    grad_out: torch.Tensor,
    grad_loss: torch.Tensor,
    main: str | torch.Tensor,
    weights: tuple[float, float],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (do_full, do_sparse, delta_full, delta_sparse, grad_logits).

    Args:
        o_full: [tokens, H, D], contiguous; likewise o_sparse and grad_out.
        gate_logits: [tokens, H], contiguous.
        grad_loss: one element on the device, the gradient of the scalar loss.
        main: as in the forward.
        weights: (sparsity, commitment).
    """
    tokens, num_heads, head_dim = o_full.shape
    num_rows = tokens * num_heads
    do_full, do_sparse = torch.empty_like(o_full), torch.empty_like(o_sparse)
    deltas = torch.empty(2, tokens, num_heads, dtype=torch.float32, device=o_full.device)
    grad_logits = torch.empty_like(gate_logits)
    if num_rows > 0:
        block_dim, block_rows = tile_shape(head_dim)
        numel = num_rows * head_dim
        launch(
            gate_backward_kernel, (-(-num_rows // block_rows),),
            o_full, o_sparse, gate_logits, main if isinstance(main, torch.Tensor) else o_full, grad_out, grad_loss,
            do_full, do_sparse, deltas[0], deltas[1], grad_logits,
            num_rows, weights[0] / numel, weights[1] / numel,
            HEAD_DIM=head_dim, BLOCK_DIM=block_dim, BLOCK_ROWS=block_rows, MAIN=main_code(main), num_warps=NUM_WARPS,
        )  # fmt: skip
    return do_full, do_sparse, deltas[0], deltas[1], grad_logits
