"""The branches on Triton kernels: sizes, launches and the two autograd functions. kernels.py has the mathematics and the grids.

Memory beyond the results, at 65,536 tokens with 32 heads and 2 kv heads of D 64 (K 16): the window's backward 8 MB of delta; the compressed branch's
means 2 x 1 MB forward, and backward 8 MB of delta and 2 x 8 MB of the parts' sums.

Tiles and warps are what the registers of a Hopper processor hold at D 64 and 128 without spilling (tests/kernels/test_branches.py compiles them).
"""

import torch
from torch.autograd.function import once_differentiable

from ..checks import aligned
from ..documents import DocumentLayout
from ..launch import cdiv, launch, next_power_of_2
from .kernels import means_backward_kernel, means_kernel, range_dkdv_kernel, range_dq_kernel, range_forward_kernel

LOG2E = 1.4426950408889634
PROGRAMS = 1024  # programs of dk and dv that keep a GPU busy until the last one ends
MOST_SPLITS, LEAST_PART = 16, 64
TILE_ROWS = 128  # of a tile of queries: tokens x heads
TILE_KEYS = 64
DQ_WARPS = 8


class WindowAttention(torch.autograd.Function):
    """(q, k, v, layout, window, scale) -> (o, lse). Saves its tensors, o and lse; lse has no gradient."""

    @staticmethod
    def forward(ctx, q, k, v, layout, window, scale):
        o, lse = range_forward(q, k, v, layout, window, scale)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.layout, ctx.window, ctx.scale = layout, window, scale
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, _):
        q, k, v, o, lse = ctx.saved_tensors
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        dq = range_backward(q, k, v, o, lse, aligned(do), dk[None], dv[None], ctx.layout, ctx.window, ctx.scale)
        return dq, dk, dv, None, None, None


class CompressedAttention(torch.autograd.Function):
    """(q, k, v, layout, scale) -> (o, lse). Saves q, o, lse and the means, which are K times smaller than k and v."""

    @staticmethod
    def forward(ctx, q, k, v, layout, scale):
        means = block_means(k, v, layout)
        o, lse = range_forward(q, *means, layout, 0, scale)
        ctx.save_for_backward(q, *means, o, lse)
        ctx.layout, ctx.scale, ctx.shape = layout, scale, k.shape
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, _):
        q, mean_k, mean_v, o, lse = ctx.saved_tensors
        layout, (_, kv_heads, _) = ctx.layout, ctx.shape
        splits = num_splits(q.shape[0], layout.num_tokens // layout.block_size, kv_heads)
        sums = torch.empty(2, splits, *mean_k.shape, dtype=torch.float32, device=q.device)
        dq = range_backward(q, mean_k, mean_v, o, lse, aligned(do), sums[0], sums[1], layout, 0, ctx.scale)
        dk, dv = (torch.empty(ctx.shape, dtype=q.dtype, device=q.device) for _ in range(2))
        launch(
            means_backward_kernel, (layout.num_block_rows, kv_heads),
            sums[0], sums[1], layout.block_start, layout.block_length, dk, dv, layout.num_block_rows,
            SPLITS=splits, **_block_sizes(dk, layout), num_warps=1,
        )  # fmt: skip
        return dq, dk, dv, None, None


def block_means(k: torch.Tensor, v: torch.Tensor, layout: DocumentLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the means [R, G, D] of contiguous k and v over each block row, in their dtype."""
    found = [torch.empty(layout.num_block_rows, *x.shape[1:], dtype=x.dtype, device=x.device) for x in (k, v)]
    launch(
        means_kernel, (layout.num_block_rows, k.shape[1]),
        k, v, layout.block_start, layout.block_length, *found, **_block_sizes(k, layout), num_warps=1,
    )  # fmt: skip
    return found[0], found[1]


def num_splits(queries: int, blocks: int, kv_heads: int) -> int:
    """Returns the parts into which the queries of a tile of blocks are cut: enough for PROGRAMS programs, none much below LEAST_PART queries."""
    wanted = cdiv(PROGRAMS, max(1, cdiv(blocks, TILE_KEYS)) * kv_heads)
    return min(MOST_SPLITS, next_power_of_2(wanted), next_power_of_2(cdiv(queries, LEAST_PART)))


def range_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: DocumentLayout, window: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (o, lse) of the window, or with window 0 of the compressed branch, whose k and v are means; contiguous arguments."""
    o = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    base, sizes = _sizes(q, k, layout, window)
    launch(
        range_forward_kernel, (cdiv(q.shape[0], TILE_ROWS // sizes["PADDED_GROUP"]), k.shape[1]),
        q, k, v, base, layout.query_position, o, lse, q.shape[0], scale * LOG2E,
        **sizes, TILE_ROWS=TILE_ROWS, TILE_KEYS=TILE_KEYS, num_warps=forward_warps(sizes["DIM"]), num_stages=2,
    )  # fmt: skip
    return o, lse


def range_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    do: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    layout: DocumentLayout,
    window: int,
    scale: float,
) -> torch.Tensor:
    """Returns dq, and fills dk and dv [parts of the queries, keys, G, D], whose sum over the parts is the gradient; arguments as in `range_forward`."""
    queries, keys = q.shape[0], k.shape[0]
    dq, delta = torch.empty_like(q), torch.empty_like(lse)
    base, sizes = _sizes(q, k, layout, window)
    launch(
        range_dq_kernel, (cdiv(queries, TILE_ROWS // sizes["PADDED_GROUP"]), k.shape[1]),
        q, k, v, do, o, base, layout.query_position, lse, delta, dq, queries, scale, scale * LOG2E,
        **sizes, TILE_ROWS=TILE_ROWS, TILE_KEYS=TILE_KEYS, num_warps=DQ_WARPS, num_stages=2,
    )  # fmt: skip
    launch(
        range_dkdv_kernel, (cdiv(keys, TILE_KEYS), k.shape[1], dk.shape[0]),
        q, k, v, do, base, layout.query_position, lse, delta, dk, dv, queries, keys, queries.bit_length() + 1, scale, scale * LOG2E,
        **sizes, TILE_ROWS=dkdv_rows(sizes["DIM"]), TILE_KEYS=TILE_KEYS, SPLITS=dk.shape[0],
        num_warps=forward_warps(sizes["DIM"]), num_stages=2,
    )  # fmt: skip
    return dq


def forward_warps(dim: int) -> int:
    """Returns the warps of a program of the forward, and of dk and dv, by the padded head dim."""
    return 4 if dim <= 64 else 8


def dkdv_rows(dim: int) -> int:
    """Returns the rows of queries that a step of dk and dv takes, by the padded head dim."""
    return 64 if dim <= 64 else 32


def _sizes(
    q: torch.Tensor, k: torch.Tensor, layout: DocumentLayout, window: int
) -> tuple[torch.Tensor, dict[str, int]]:
    """Returns the base of each query's keys, and the sizes that all kernels over queries take."""
    group = q.shape[1] // k.shape[1]
    sizes = {
        "UNIT": 1 if window else layout.block_size,
        "WINDOW": window,
        "KV_HEADS": k.shape[1],
        "GROUP_SIZE": group,
        "PADDED_GROUP": next_power_of_2(group),
        "HEAD_DIM": q.shape[2],
        "DIM": max(16, next_power_of_2(q.shape[2])),
    }
    return layout.query_start if window else layout.query_first_block_row, sizes


def _block_sizes(k: torch.Tensor, layout: DocumentLayout) -> dict[str, int]:
    """Returns the sizes that the kernels of means take."""
    return {
        "HEAD_DIM": k.shape[2],
        "DIM": next_power_of_2(k.shape[2]),
        "PADDED_BLOCK_SIZE": next_power_of_2(layout.block_size),
    }
