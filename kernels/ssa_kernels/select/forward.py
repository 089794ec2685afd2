"""Launches the selection kernels: block means, softmax sums, then importance and top-k chunk by chunk of tokens.

Beside the result there are the means, one float32 a query and head for the softmax sums, and a workspace bounded by WORKSPACE_BYTES that
holds importance and the survivors' scratch for as many tokens as fit. Grids depend on shapes and on the layout's `max_length` alone:
no synchronisation, and nothing recompiles from batch to batch. Give a layout with the rows' length as `max_length` where documents are
packed into rows: it decides how many tokens make a chunk.

Registers, stages and tile sizes were chosen by measurement at 16 heads a group, D 64 (kernels/README.md); other shapes run the same
way with what their tiles leave room for.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from ..documents import DocumentLayout
from ..launch import launch
from ..streams import side_streams
from .importance import block_means_kernel, importance_kernel, softmax_sums_kernel
from .topk import top_k_kernel

WORKSPACE_BYTES = 64 * 2**20
LOG2E = 1.4426950408889634
PRODUCT_ROWS = 128  # (tokens x heads) of one tile
BLOCK_ROWS = 64  # block rows of one tile
FMA_SHARE = 1  # of 8 exponentials, how many go to the multiply-add pipe: 0, 1, 2 or 4
LANES = 2  # streams that take the chunks in turns
IMPORTANCE_REGISTERS = 112
SLICE_ROWS = 1024  # block rows that a program of the importance kernel walks


@dataclass(frozen=True, slots=True)
class _Plan:
    """Sizes of one call, from shapes alone."""

    lists: int  # choices a token: kv heads, or query heads for per_head
    group: int  # query heads a kv head
    tile: int  # tokens of a tile
    columns: int  # importance row: candidates of the longest document, up to a whole pass of top-k
    width: int  # columns of a pass of top-k
    survivors: int  # scratch row of top-k
    chunk: int  # tokens that share the workspace

    @property
    def padded_group(self) -> int:
        return PRODUCT_ROWS // self.tile


def select_blocks_triton(
    q: torch.Tensor, k: torch.Tensor, *, layout: DocumentLayout, top_k: int, scale: float, score: str
) -> torch.Tensor:
    """Returns indices; arguments as in `select_blocks`, with the layout built."""
    q, k = q.detach(), k.detach()
    if q.stride(2) != 1 or q.stride(1) != q.shape[2]:
        q = q.contiguous()
    return choose_blocks_triton(q, block_means(k, layout), layout=layout, top_k=top_k, scale=scale, score=score)


def block_means(k: torch.Tensor, layout: DocumentLayout) -> torch.Tensor:
    """Returns the means `[R, G, D padded to a power of two]` in k's dtype, zeros where there is nothing."""
    kv_heads, dim = k.shape[1:]
    k = k if k.stride(2) == 1 else k.contiguous()
    padded = triton.next_power_of_2(dim)
    means = torch.empty(layout.num_block_rows, kv_heads, padded, dtype=k.dtype, device=k.device)
    launch(
        block_means_kernel,
        (layout.num_block_rows, kv_heads),
        k,
        layout.block_start,
        layout.block_length,
        means,
        k.stride(0),
        k.stride(1),
        D=dim,
        DP=padded,
        BP=triton.next_power_of_2(layout.block_size),
        num_warps=1,
    )
    return means


def choose_blocks_triton(
    q: torch.Tensor, means: torch.Tensor, *, layout: DocumentLayout, top_k: int, scale: float, score: str
) -> torch.Tensor:
    """Returns indices int32 `[T, G or H, top_k]` for contiguous queries `[T, H, D]` and the means of `block_means`."""
    tokens = q.shape[0]
    plan = _plan(q, means, layout, top_k, score)
    indices = torch.empty(tokens, plan.lists, top_k, dtype=torch.int32, device=q.device)
    lanes = LANES if q.is_cuda else 1
    workspace = torch.empty(lanes, plan.chunk, plan.lists, plan.columns, dtype=torch.float32, device=q.device)
    scratch = torch.empty(lanes, plan.chunk, plan.lists, plan.survivors, dtype=torch.int32, device=q.device)
    lse = _softmax_sums(q, means, layout, plan, top_k, scale, score) if score != "per_head" and top_k > 1 else None
    slices = triton.cdiv(plan.columns + plan.tile, SLICE_ROWS)  # a tile that spans documents walks a few rows more
    table, narrow = _table(means), means.shape[2] <= 64
    with _lanes(q.device, lanes) as streams:
        for i, start in enumerate(range(0, tokens, plan.chunk)):
            stop, lane = min(start + plan.chunk, tokens), i % lanes
            if top_k > 1:
                launch(
                    importance_kernel, (triton.cdiv(stop - start, plan.tile), means.shape[1], slices),
                    q, table, layout.query_first_row, layout.query_position, lse, workspace[lane], start, stop, q.stride(0),
                    plan.columns, scale * LOG2E,
                    **_shape(means, layout, plan, q.shape[2], top_k, score), SLICE=SLICE_ROWS, STAGES=3 if narrow else 2,
                    FMA_SHARE=FMA_SHARE, PER_HEAD=score == "per_head",
                    num_warps=4, maxnreg=IMPORTANCE_REGISTERS if narrow else None, stream=streams[lane],
                )  # fmt: skip
            launch(
                top_k_kernel, ((stop - start) * plan.lists,),
                workspace[lane], layout.query_position, scratch[lane], indices, start, plan.columns,
                LISTS=plan.lists, K=layout.block_size, S=top_k, SP=triton.next_power_of_2(top_k), C=plan.survivors, W=plan.width,
                SIGNED=score == "per_head", OFFICIAL=score == "official_compat", num_warps=1, stream=streams[lane],
            )  # fmt: skip
    return indices


@contextmanager
def _lanes(device: torch.device, count: int) -> Iterator[Sequence[torch.cuda.Stream | None]]:
    """Gives `count` streams that follow the current one and are waited for at the end; None, the current one, for one.

    Importance is bound by the exponential unit, top-k by the integer pipe, and both end with a device half empty: two chunks in different
    streams fill what the other leaves.
    """
    if count == 1:
        yield [None]
        return
    current, streams = torch.cuda.current_stream(device), side_streams(device, count)
    for stream in streams:
        stream.wait_stream(current)
    yield streams
    for stream in streams:
        current.wait_stream(stream)


def _plan(q: torch.Tensor, means: torch.Tensor, layout: DocumentLayout, top_k: int, score: str) -> _Plan:
    tokens, heads, _ = q.shape
    kv_heads = means.shape[1]
    lists = heads if score == "per_head" else kv_heads
    width = 512 if layout.max_blocks <= 512 else 1024
    # The own block is no candidate, so a document of n blocks needs n - 1 columns.
    columns = triton.cdiv(max(layout.max_blocks - 1, 1), width) * width
    kept = layout.block_size if score == "official_compat" else 2 * top_k
    survivors = max(32, triton.next_power_of_2(kept))
    tile = PRODUCT_ROWS // triton.next_power_of_2(heads // kv_heads)
    lanes = LANES if q.is_cuda else 1
    most = max(WORKSPACE_BYTES // (lanes * lists * (columns + survivors) * 4), 1)
    rounds = triton.cdiv(tokens, most * lanes)  # of a chunk in every lane, all of about the same size
    chunk = triton.cdiv(triton.cdiv(tokens, rounds * lanes), tile) * tile
    return _Plan(lists, heads // kv_heads, tile, columns, width, survivors, max(min(chunk, most // tile * tile), tile))


def _softmax_sums(q, means, layout: DocumentLayout, plan: _Plan, top_k: int, scale: float, score: str) -> torch.Tensor:
    """Returns lse float32 [T, H]; rows whose candidates are all chosen stay unwritten."""
    tokens, heads, dim = q.shape
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    launch(
        softmax_sums_kernel,
        (triton.cdiv(tokens, plan.tile), means.shape[1]),
        q,
        _table(means),
        layout.query_first_row,
        layout.query_position,
        lse,
        tokens,
        q.stride(0),
        scale * LOG2E,
        **_shape(means, layout, plan, dim, top_k, score),
        STAGES=2,
        FMA_SHARE=FMA_SHARE,
        num_warps=4,
        maxnreg=96 if means.shape[2] <= 64 else 168,
    )
    return lse


def _table(means: torch.Tensor) -> TensorDescriptor:
    """The means as the matrix [R, G x padded D] of which the kernels copy [BLOCK_ROWS, padded D] at a time, zeros past its end."""
    return TensorDescriptor.from_tensor(means.view(means.shape[0], -1), [BLOCK_ROWS, means.shape[2]])


def _shape(
    means: torch.Tensor, layout: DocumentLayout, plan: _Plan, dim: int, top_k: int, score: str
) -> dict[str, int]:
    """The compile-time sizes that both product kernels share."""
    return {
        "K": layout.block_size,
        # Below this many candidates all are chosen, except that official_compat may lose some.
        "S": 1 if score == "official_compat" else top_k,
        "GROUP": plan.group,
        "GP": plan.padded_group,
        "D": dim,
        "DP": means.shape[2],
        "TT": plan.tile,
        "BC": BLOCK_ROWS,
    }
