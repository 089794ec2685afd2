"""Gate of all queries, alignment loss and captured mass of a sample, in one pass over the streams' outputs; all gradients in one more (Triton).

The main stream has an output for every query, the other stream for the sampled ones only. `places` [queries] holds each query's place in the
sample, or -1. The mathematics is that of triton.py, with N = sampled queries * H * D in both means, and

    out[r] = g * o_main[r]                      for every vector r (one head of one query)
    do_main = g * (grad_out + d_main), do_other = g * d_other       with d_main = d_other = 0 outside the sample

A tile reads the other stream's rows where its queries are sampled and nothing elsewhere, so the sample costs its share of the traffic. Copying
the sampled rows together and their gradients back would cost as much as the gate itself.

Grid: one program per tile of vectors of all queries. Sums have a fixed order, as in triton.py.
"""

import torch
import triton
import triton.language as tl

from ..gate_triton import NUM_WARPS, tile_shape, vector_tile
from ..launch import cdiv, launch
from .triton import REDUCE_BLOCK, sum_partials_kernel


@triton.jit
def sampled_tile(
    places_ptr, vector, vector_ok, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_DIM: tl.constexpr
):
    """Returns (place in the sample, head, vector in the sample, whether it is sampled, element offsets there, their mask)."""
    place = tl.load(places_ptr + vector // NUM_HEADS, mask=vector_ok, other=-1).to(tl.int64)
    head = vector % NUM_HEADS
    sampled = place >= 0
    there = place * NUM_HEADS + head
    dim = tl.arange(0, TILE_DIM)
    return place, head, there, sampled, there[:, None] * HEAD_DIM + dim[None, :], sampled[:, None] & (dim < HEAD_DIM)


@triton.jit(
    do_not_specialize=[
        "num_vectors",
        "lse_tokens",
        "main_stride_row",
        "main_stride_token",
        "main_stride_head",
        "other_stride_token",
        "other_stride_head",
    ]
)
def sampled_forward_kernel(
    o_main_ptr, o_other_ptr, logits_ptr, places_ptr, lse_main_ptr, lse_other_ptr, out_ptr, partial_ptr,
    num_vectors, lse_tokens, main_stride_row, main_stride_token, main_stride_head, other_stride_token, other_stride_head,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_DIM: tl.constexpr, TILE_VECTORS: tl.constexpr,
    FULL_IS_MAIN: tl.constexpr,
):  # fmt: skip
    """The gated main stream of one tile, and its sampled vectors' sums of SmoothL1 and of the captured mass."""
    tile = tl.program_id(0)
    vector, vector_ok, offsets, ok = vector_tile(num_vectors, HEAD_DIM, TILE_DIM, TILE_VECTORS)
    place, head, _, sampled, other_offsets, other_ok = sampled_tile(
        places_ptr, vector, vector_ok, NUM_HEADS, HEAD_DIM, TILE_DIM
    )
    o_main = tl.load(o_main_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
    o_other = tl.load(o_other_ptr + other_offsets, mask=other_ok, other=0.0).to(tl.float32)
    gate = tl.sigmoid(tl.load(logits_ptr + vector, mask=vector_ok, other=0.0).to(tl.float32))[:, None]
    gated = o_main * gate
    tl.store(out_ptr + offsets, gated.to(out_ptr.dtype.element_ty), mask=ok)

    distance = tl.where(other_ok, tl.abs(gated - o_other * gate), 0.0)
    smooth = tl.where(distance < 1.0, 0.5 * distance * distance, distance - 0.5)
    tl.store(partial_ptr + tile, tl.sum(tl.sum(smooth, 1), 0))

    token = vector // NUM_HEADS
    main_offsets = (
        (token // lse_tokens) * main_stride_row + (token % lse_tokens) * main_stride_token + head * main_stride_head
    )
    lse_main = tl.load(lse_main_ptr + main_offsets, mask=sampled, other=0.0)
    lse_other = tl.load(lse_other_ptr + place * other_stride_token + head * other_stride_head, mask=sampled, other=0.0)
    difference = lse_other - lse_main if FULL_IS_MAIN else lse_main - lse_other
    tl.store(partial_ptr + tl.num_programs(0) + tile, tl.sum(tl.where(sampled, tl.exp(difference), 0.0), 0))


@triton.jit(do_not_specialize=["num_vectors"])
def sampled_backward_kernel(
    o_main_ptr, o_other_ptr, logits_ptr, places_ptr, grad_out_ptr, grad_loss_ptr,
    do_main_ptr, do_other_ptr, delta_main_ptr, delta_other_ptr, grad_logits_ptr,
    num_vectors, main_factor, other_factor,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_DIM: tl.constexpr, TILE_VECTORS: tl.constexpr,
):  # fmt: skip
    """Both streams' output gradients, both deltas and the gate logits' gradient of one tile."""
    vector, vector_ok, offsets, ok = vector_tile(num_vectors, HEAD_DIM, TILE_DIM, TILE_VECTORS)
    _, _, there, sampled, other_offsets, other_ok = sampled_tile(
        places_ptr, vector, vector_ok, NUM_HEADS, HEAD_DIM, TILE_DIM
    )
    o_main = tl.load(o_main_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
    o_other = tl.load(o_other_ptr + other_offsets, mask=other_ok, other=0.0).to(tl.float32)
    grad_out = tl.load(grad_out_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
    grad_loss = tl.load(grad_loss_ptr).to(tl.float32)
    gate = tl.sigmoid(tl.load(logits_ptr + vector, mask=vector_ok, other=0.0).to(tl.float32))

    # The loss is symmetric, so with the streams' roles exchanged only the sign of both terms' error changes, which is that of main - other.
    clipped = tl.minimum(tl.maximum(o_main * gate[:, None] - o_other * gate[:, None], -1.0), 1.0)
    d_main = grad_out + tl.where(other_ok, (grad_loss * main_factor) * clipped, 0.0)
    d_other = (-grad_loss * other_factor) * clipped
    do_main = (d_main * gate[:, None]).to(do_main_ptr.dtype.element_ty)
    do_other = (d_other * gate[:, None]).to(do_other_ptr.dtype.element_ty)
    tl.store(do_main_ptr + offsets, do_main, mask=ok)
    tl.store(do_other_ptr + other_offsets, do_other, mask=other_ok)

    delta_main = tl.sum(do_main.to(tl.float32) * o_main, 1)
    delta_other = tl.sum(do_other.to(tl.float32) * o_other, 1)
    tl.store(delta_main_ptr + vector, delta_main, mask=vector_ok)
    tl.store(delta_other_ptr + there, delta_other, mask=sampled)
    along = tl.sum(d_main * o_main, 1) + tl.sum(d_other * o_other, 1)  # not from the deltas, which have do's rounding
    grad_logits = along * gate * (1.0 - gate)
    tl.store(grad_logits_ptr + vector, grad_logits.to(grad_logits_ptr.dtype.element_ty), mask=vector_ok)


def sampled_forward(
    o_main: torch.Tensor,
    o_other: torch.Tensor,
    gate_logits: torch.Tensor,
    places: torch.Tensor,
    main: str,
    weights: tuple[float, float],
    lse_main: torch.Tensor,
    lse_other: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (gated main stream [queries, H, D], alignment loss, mean captured mass).

    Args:
        o_main: [queries, H, D], contiguous.
        o_other: [sampled queries, H, D], contiguous.
        gate_logits: [queries, H], contiguous.
        places: int32 [queries].
        main: "full" or "sparse".
        weights: (sparsity, commitment).
        lse_main: float32 [rows, queries / rows, H], any strides.
        lse_other: float32 [sampled queries, H], any strides.
    """
    out = torch.empty_like(o_main)
    grid, sizes = _tiling(o_main)
    partials = torch.empty(2, *grid, dtype=torch.float32, device=o_main.device)
    results = torch.empty(2, dtype=torch.float32, device=o_main.device)
    launch(
        sampled_forward_kernel, grid,
        o_main, o_other, gate_logits, places, lse_main, lse_other, out, partials,
        gate_logits.numel(), lse_main.shape[1], *lse_main.stride(), *lse_other.stride(),
        **sizes, FULL_IS_MAIN=main == "full", num_warps=NUM_WARPS,
    )  # fmt: skip
    launch(
        sum_partials_kernel, (2,),
        partials, results, grid[0], sum(weights) / o_other.numel(), o_other.shape[2] / o_other.numel(),
        BLOCK=REDUCE_BLOCK, num_warps=32,
    )  # fmt: skip
    return out, results[0], results[1]


def sampled_backward(
    o_main: torch.Tensor,
    o_other: torch.Tensor,
    gate_logits: torch.Tensor,
    places: torch.Tensor,
    grad_out: torch.Tensor,
    grad_loss: torch.Tensor,
    main: str,
    weights: tuple[float, float],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (do_main, do_other, delta_main, delta_other, grad_logits); arguments as in `sampled_forward` and `gate_backward`."""
    do_main, do_other, grad_logits = (torch.empty_like(x) for x in (o_main, o_other, gate_logits))
    delta_main, delta_other = (
        torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for x in (o_main, o_other)
    )
    sparsity, commitment = (weight / o_other.numel() for weight in weights)  # of the full and of the sparse stream
    factors = (sparsity, commitment) if main == "full" else (commitment, sparsity)
    grid, sizes = _tiling(o_main)
    launch(
        sampled_backward_kernel, grid,
        o_main, o_other, gate_logits, places, grad_out, grad_loss,
        do_main, do_other, delta_main, delta_other, grad_logits, gate_logits.numel(), *factors, **sizes, num_warps=NUM_WARPS,
    )  # fmt: skip
    return do_main, do_other, delta_main, delta_other, grad_logits


def _tiling(o: torch.Tensor) -> tuple[tuple[int], dict[str, int]]:
    """Returns the grid over the vectors of o [queries, H, D] and the kernels' sizes."""
    num_heads, head_dim = o.shape[1:]
    tile_dim, tile_vectors = tile_shape(head_dim)
    sizes = {"NUM_HEADS": num_heads, "HEAD_DIM": head_dim, "TILE_DIM": tile_dim, "TILE_VECTORS": tile_vectors}
    return (cdiv(o.numel() // head_dim, tile_vectors),), sizes
