"""Two outputs of attention over different keys as one over all of them (Triton), in one pass.

lse = log(exp(lse_1) + exp(lse_2))        o = o_1 + sigmoid(lse_2 - lse_1) (o_2 - o_1)
"""

import torch
import triton
import triton.language as tl

from ..gate_triton import tile_shape, vector_tile
from ..launch import cdiv, launch


@triton.jit(do_not_specialize=["num_vectors"])
def merge_kernel(
    first_ptr, second_ptr, first_lse_ptr, second_lse_ptr, out_ptr, lse_ptr, num_vectors,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_DIM: tl.constexpr, TILE_VECTORS: tl.constexpr,
):  # fmt: skip
    """One tile of the merged output and log-sum-exp; a vector is one head of one query, and the two log-sum-exps come by head."""
    vector, vector_ok, offsets, ok = vector_tile(num_vectors, HEAD_DIM, TILE_DIM, TILE_VECTORS)
    by_head = (vector % HEADS) * (num_vectors // HEADS) + vector // HEADS
    first_lse = tl.load(first_lse_ptr + by_head, mask=vector_ok, other=0.0)
    second_lse = tl.load(second_lse_ptr + by_head, mask=vector_ok, other=0.0)
    share = tl.sigmoid(second_lse - first_lse)
    first = tl.load(first_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
    second = tl.load(second_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
    merged = first + share[:, None] * (second - first)
    tl.store(out_ptr + offsets, merged.to(out_ptr.dtype.element_ty), mask=ok)
    larger = tl.maximum(first_lse, second_lse)
    lse = larger + tl.log(1.0 + tl.exp(-tl.abs(first_lse - second_lse)))
    tl.store(lse_ptr + vector, lse, mask=vector_ok)


def merge(
    first: torch.Tensor,
    second: torch.Tensor,
    first_lse: torch.Tensor,
    second_lse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Writes attention over the keys of two calls: outputs [T, H, D] and `out` alike, float32 log-sum-exps [H, T], and `lse` [T, H]."""
    tokens, heads, head_dim = out.shape
    tile_dim, tile_vectors = tile_shape(head_dim)
    launch(
        merge_kernel, (cdiv(tokens * heads, tile_vectors),),
        first.contiguous(), second.contiguous(), first_lse.contiguous(), second_lse.contiguous(), out, lse, tokens * heads,
        HEADS=heads, HEAD_DIM=head_dim, TILE_DIM=tile_dim, TILE_VECTORS=tile_vectors,
    )  # fmt: skip
