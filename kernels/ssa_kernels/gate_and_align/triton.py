"""Gate, alignment loss and captured mass in one pass over both streams' outputs, and all their gradients in one more (Triton).

A *vector* r is one head of one token, with gate g = sigmoid(logit_r) and D features; N = tokens * H * D. Forward:

    f = g * o_full[r],  s = g * o_sparse[r]
    out[r]   = f or s, the main stream
    loss     = (w_sparsity + w_commitment) / N * sum over vectors and features of SmoothL1(f - s)
    mass     = mean over vectors of exp(lse_sparse[r] - lse_full[r]), the attention mass that the chosen blocks hold

Backward, with grad_out the gradient of the main stream, gl the gradient of the loss and e = clip(f - s, -1, 1):

    df = gl * w_sparsity / N * e    (+ grad_out where full is main)       the sparsity loss trains only full
    ds = -gl * w_commitment / N * e (+ grad_out where sparse is main)     the commitment loss trains only sparse
    do_full = g * df,  do_sparse = g * ds
    delta_full = sum_d do_full * o_full,  delta_sparse = sum_d do_sparse * o_sparse
    dlogit = (1 - g) * (delta_full + delta_sparse)

because dlogit = g (1 - g) * sum_d (df * o_full + ds * o_sparse). The deltas are the first thing that a flash-style backward of either
stream computes. Handing them over saves it a pass over its output and its gradient. They are computed from the gradients as rounded to
the output's dtype, because the attention's backward multiplies those with V: the rows of dS then sum to 0.

Grid: one program per tile of vectors. Memory-bound: two tensors in and one out, then three in and two out. Everything is accumulated in
float32. A forward program writes its own partial sums, and a second, single program adds them in a fixed order. There are no atomics,
so the loss is bit-identical from run to run.

The main stream is a constant or a number on the device. Training draws it per microbatch; a drawn value that stays on the device needs
no synchronisation, and a CUDA graph can be replayed with it. gl is read on the device too.

Nothing is masked: every vector counts in both means.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ..gate_triton import NUM_WARPS, tile_shape, vector_tile
from ..launch import launch

MAIN_SPARSE = 0
MAIN_FULL = 1
MAIN_ON_DEVICE = 2

# Partial sums that the reducing program adds per step. Each step costs a round trip to memory, so there should be few.
REDUCE_BLOCK = 16384


@triton.jit(do_not_specialize=["num_vectors", "lse_tokens", "lse_stride_row", "lse_stride_token", "lse_stride_head"])
def gate_forward_kernel(
    o_full_ptr, o_sparse_ptr, logits_ptr, main_ptr, lse_full_ptr, lse_sparse_ptr, out_ptr, partial_ptr,
    num_vectors, lse_tokens, lse_stride_row, lse_stride_token, lse_stride_head,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_DIM: tl.constexpr, TILE_VECTORS: tl.constexpr,
    MAIN: tl.constexpr, WITH_MASS: tl.constexpr,
):  # fmt: skip
    """The gated main stream of one tile, and the tile's sums of SmoothL1 and of the captured mass."""
    tile = tl.program_id(0)
    vector, vector_ok, offsets, ok = vector_tile(num_vectors, HEAD_DIM, TILE_DIM, TILE_VECTORS)
    o_full = tl.load(o_full_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
    o_sparse = tl.load(o_sparse_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
    gate = tl.sigmoid(tl.load(logits_ptr + vector, mask=vector_ok, other=0.0).to(tl.float32))
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
        token = vector // NUM_HEADS
        head = vector % NUM_HEADS
        lse_offsets = (
            (token // lse_tokens) * lse_stride_row + (token % lse_tokens) * lse_stride_token + head * lse_stride_head
        )
        lse_full = tl.load(lse_full_ptr + lse_offsets, mask=vector_ok, other=0.0)
        lse_sparse = tl.load(lse_sparse_ptr + vector, mask=vector_ok, other=float("-inf"))
        tl.store(partial_ptr + tl.num_programs(0) + tile, tl.sum(tl.exp(lse_sparse - lse_full), 0))


@triton.jit(do_not_specialize=["num_partials"])
def sum_partials_kernel(partial_ptr, result_ptr, num_partials, factor_0, factor_1, BLOCK: tl.constexpr):
    """result[i] = factor_i * the sum of the i-th row of partials, added in a fixed order. Grid: one program per i."""
    which = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    start_ptr = partial_ptr + which.to(tl.int64) * num_partials
    for start in range(0, num_partials, BLOCK):
        index = start + lanes
        total += tl.load(start_ptr + index, mask=index < num_partials, other=0.0)
    tl.store(result_ptr + which, tl.sum(total, 0) * tl.where(which == 0, factor_0, factor_1))


@triton.jit(do_not_specialize=["num_vectors"])
def gate_backward_kernel(
    o_full_ptr, o_sparse_ptr, logits_ptr, main_ptr, grad_out_ptr, grad_loss_ptr,
    do_full_ptr, do_sparse_ptr, delta_full_ptr, delta_sparse_ptr, grad_logits_ptr,
    num_vectors, sparsity_factor, commitment_factor,
    HEAD_DIM: tl.constexpr, TILE_DIM: tl.constexpr, TILE_VECTORS: tl.constexpr, MAIN: tl.constexpr,
):  # fmt: skip
    """Both streams' output gradients, both deltas and the gate logits' gradient of one tile."""
    vector, vector_ok, offsets, ok = vector_tile(num_vectors, HEAD_DIM, TILE_DIM, TILE_VECTORS)
    o_full = tl.load(o_full_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
    o_sparse = tl.load(o_sparse_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
    grad_out = tl.load(grad_out_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
    grad_loss = tl.load(grad_loss_ptr).to(tl.float32)
    gate = tl.sigmoid(tl.load(logits_ptr + vector, mask=vector_ok, other=0.0).to(tl.float32))

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
    tl.store(delta_full_ptr + vector, delta_full, mask=vector_ok)
    tl.store(delta_sparse_ptr + vector, delta_sparse, mask=vector_ok)
    grad_logits = (delta_full + delta_sparse) * (1.0 - gate)
    tl.store(grad_logits_ptr + vector, grad_logits.to(grad_logits_ptr.dtype.element_ty), mask=vector_ok)


class GateAndAlign(torch.autograd.Function):
    """(o_full, o_sparse, gate_logits, main, weights) -> (out, loss). Saves its inputs; the backward recomputes the rest."""

    @staticmethod
    def forward(ctx, o_full, o_sparse, gate_logits, main, weights):
        """Runs the forward kernel; the tensors are contiguous."""
        out, loss, _ = gate_forward(o_full, o_sparse, gate_logits, main, weights)
        on_device = isinstance(main, torch.Tensor)
        ctx.save_for_backward(o_full, o_sparse, gate_logits, main if on_device else None)
        ctx.main_name, ctx.weights = None if on_device else main, weights
        return out, loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_loss):
        """Runs the backward kernel; nothing here needs its deltas."""
        o_full, o_sparse, gate_logits, main = ctx.saved_tensors
        main = ctx.main_name if main is None else main
        do_full, do_sparse, _, _, grad_logits = gate_backward(
            o_full, o_sparse, gate_logits, grad_out.contiguous(), grad_loss, main, ctx.weights
        )
        return do_full, do_sparse, grad_logits, None, None


def gate_forward(
    o_full: torch.Tensor,
    o_sparse: torch.Tensor,
    gate_logits: torch.Tensor,
    main: str | torch.Tensor,
    weights: tuple[float, float],
    lse: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Returns (gated main stream, alignment loss, mean captured mass or None if no log-sum-exps are given).

    Args:
        o_full, o_sparse: [tokens, H, D], contiguous.
        gate_logits: [tokens, H], contiguous.
        main: "full", "sparse", or an int32 tensor of one element on the same device: 0 for "sparse", anything else for "full".
        weights: (sparsity, commitment).
        lse: natural logarithms in float32: the full stream's as [rows, tokens / rows, H] with any strides, the sparse stream's as
            [tokens, H], contiguous.
    """
    tokens, num_heads, head_dim = o_full.shape
    num_vectors = tokens * num_heads
    out = torch.empty_like(o_full)
    # Without log-sum-exps, the kernel gets the output's address in their place and never reads it.
    lse_full, lse_sparse = (out[:, :, 0][None], out) if lse is None else lse
    num_sums = 1 if lse is None else 2
    if num_vectors == 0:
        results = torch.zeros(num_sums, dtype=torch.float32, device=o_full.device)
        return out, results[0], None if lse is None else results[1]

    tile_dim, tile_vectors = tile_shape(head_dim)
    num_tiles = -(-num_vectors // tile_vectors)
    partials = torch.empty(num_sums, num_tiles, dtype=torch.float32, device=o_full.device)
    results = torch.empty(num_sums, dtype=torch.float32, device=o_full.device)
    launch(
        gate_forward_kernel, (num_tiles,),
        o_full, o_sparse, gate_logits, main if isinstance(main, torch.Tensor) else out,
        lse_full, lse_sparse, out, partials, num_vectors, lse_full.shape[1], *lse_full.stride(),
        NUM_HEADS=num_heads, HEAD_DIM=head_dim, TILE_DIM=tile_dim, TILE_VECTORS=tile_vectors,
        MAIN=_main_code(main), WITH_MASS=lse is not None, num_warps=NUM_WARPS,
    )  # fmt: skip
    launch(
        sum_partials_kernel, (num_sums,),
        partials, results, num_tiles, sum(weights) / (num_vectors * head_dim), 1.0 / num_vectors, BLOCK=REDUCE_BLOCK, num_warps=32
    )  # fmt: skip
    return out, results[0], None if lse is None else results[1]


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
        o_full, o_sparse, grad_out: [tokens, H, D], contiguous.
        gate_logits: [tokens, H], contiguous.
        grad_loss: one element on the device, the gradient of the scalar loss.
        main: as in the forward.
        weights: (sparsity, commitment).
    """
    tokens, num_heads, head_dim = o_full.shape
    num_vectors = tokens * num_heads
    do_full, do_sparse = torch.empty_like(o_full), torch.empty_like(o_sparse)
    deltas = torch.empty(2, tokens, num_heads, dtype=torch.float32, device=o_full.device)
    grad_logits = torch.empty_like(gate_logits)
    if num_vectors > 0:
        tile_dim, tile_vectors = tile_shape(head_dim)
        numel = num_vectors * head_dim
        launch(
            gate_backward_kernel, (-(-num_vectors // tile_vectors),),
            o_full, o_sparse, gate_logits, main if isinstance(main, torch.Tensor) else o_full, grad_out, grad_loss,
            do_full, do_sparse, deltas[0], deltas[1], grad_logits,
            num_vectors, weights[0] / numel, weights[1] / numel,
            HEAD_DIM=head_dim, TILE_DIM=tile_dim, TILE_VECTORS=tile_vectors, MAIN=_main_code(main), num_warps=NUM_WARPS,
        )  # fmt: skip
    return do_full, do_sparse, deltas[0], deltas[1], grad_logits


def _main_code(main: str | torch.Tensor) -> int:
    """Returns the kernels' MAIN for the main stream."""
    if isinstance(main, torch.Tensor):
        return MAIN_ON_DEVICE
    return MAIN_FULL if main == "full" else MAIN_SPARSE
