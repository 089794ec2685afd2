"""Launches the selection kernels: block means, softmax sums, then importance and top-k by chunks of tokens.

Memory beyond the result: the means, one float32 per query and head for the softmax sums, and a workspace bounded by WORKSPACE_BYTES, which
holds importance and top-k's scratch rows for as many tokens as fit. Grids depend only on shapes and on the layout's `max_length`, so nothing
synchronises, and nothing is recompiled from batch to batch. The bound determines how many tokens make a chunk. Without a `max_length`,
chunks are planned for the longest document that earlier calls have met, and `long_documents.py` computes what exceeds the plan. So the first
call on new sizes is slow, and a CUDA graph, which is planned once for all its replays, expects the longest document possible: there, pass a
layout with a `max_length`.

Tile sizes were chosen by measurement at group size 16, D 64 (kernels/LOG.md). Other shapes run in the same way. tuning.py has what differs
from GPU to GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from ..devices import gpu_of, means_warps
from ..documents import DocumentLayout
from ..launch import cdiv, high_priority_stream, launch, next_power_of_2
from .importance import block_means_kernel, importance_kernel, softmax_sums_kernel
from .long_documents import MAX_PROGRAMS, LongestSeen, long_tiles_kernel, longest_seen
from .reference import COMPLETE_OWN
from .topk import top_k_kernel
from .tuning import TILE_BLOCKS, TILE_ROWS, long_tiles_warps, tune_importance, tune_sums

WORKSPACE_BYTES = 64 * 2**20
LOG2E = 1.4426950408889634
FMA_SHARE = 1  # how many of 8 exponentials run on the multiply-add pipe: 0, 1, 2 or 4
SUM_PARTS = 4  # parts of the softmax sums: chunks of an early part run beside a later part
# The importance kernel computes top-k's bins from so many slices on (64k at blocks of 16), if there are so many bins per chosen block.
BINS_FROM_SLICES = 5
BINS_PER_CHOICE = 4
TOP_K_WIDTH = 512  # columns per pass of top-k
SLICE_BLOCKS = 1024  # block rows per program of the importance kernel


@dataclass(frozen=True, slots=True)
class _Plan:
    """Sizes of one call, from shapes only."""

    lists: int  # lists of chosen blocks per token: one per kv head, or per query head for per_head
    group_size: int  # query heads per kv head
    tile: int  # tokens per tile
    columns: int  # width of an importance row: the longest document's candidates, rounded up to whole passes of top-k
    survivors: int  # width of top-k's scratch row
    chunk: int  # tokens that share the workspace

    @property
    def padded_group(self) -> int:
        return TILE_ROWS // self.tile


def select_blocks_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    layout: DocumentLayout,
    top_k: int,
    scale: float,
    score: str,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns indices; arguments as in `select_blocks`, with the layout built."""
    q, k = q.detach(), k.detach()
    if q.stride(2) != 1 or q.stride(1) != q.shape[2]:
        q = q.contiguous()
    # In base 2, as the kernels have it. A query without complete blocks has no candidates either.
    sums = None if lse is None else torch.where(lse.isinf(), 0.0, lse * LOG2E)
    means = block_means(k, layout)
    return choose_blocks_triton(q, means, layout=layout, top_k=top_k, scale=scale, score=score, sums=sums)


def block_means(k: torch.Tensor, layout: DocumentLayout) -> torch.Tensor:
    """Returns the block means `[R, G, D padded to a power of two]` in k's dtype; unused block rows and padding are 0."""
    kv_heads, dim = k.shape[1:]
    k = k if k.stride(2) == 1 else k.contiguous()
    padded, padded_keys = next_power_of_2(dim), next_power_of_2(layout.block_size)
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
        HEAD_DIM=dim,
        DIM=padded,
        PADDED_BLOCK_SIZE=padded_keys,
        num_warps=means_warps(gpu_of(k.device), padded_keys, padded),
    )
    return means


def choose_blocks_triton(
    q: torch.Tensor,
    means: torch.Tensor,
    *,
    layout: DocumentLayout,
    top_k: int,
    scale: float,
    score: str,
    sums: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns indices int32 `[T, G or H, top_k]` for contiguous queries `[T, H, D]`, the means of `block_means` and the softmax sums if they are known."""
    tokens = q.shape[0]
    seen = _longest_seen(layout, top_k)
    expected = layout.max_length if seen is None else min(seen.tokens or layout.max_length, layout.max_length)
    plan = _plan(q, means, layout, top_k, score, expected)
    indices = torch.empty(tokens, plan.lists, top_k, dtype=torch.int32, device=q.device)
    widest = _columns(layout.max_length, layout.block_size)
    floats = max(plan.chunk * plan.lists * plan.columns, plan.tile * plan.lists // means.shape[1] * widest)
    workspace = torch.empty(floats, dtype=torch.float32, device=q.device)
    scratch = torch.empty(plan.chunk, plan.lists, plan.survivors, dtype=torch.int32, device=q.device)
    starts = range(0, tokens, plan.chunk)
    before = torch.cuda.current_stream(q.device).record_event() if q.is_cuda else None
    lse, sums_ready = sums, {}
    if sums is None and score != "per_head" and top_k > 1:
        lse = torch.empty(tokens, q.shape[1], dtype=torch.float32, device=q.device)
        parts = starts[:: cdiv(len(starts), SUM_PARTS)]
        sums_ready = _softmax_sums(q, means, lse, parts, layout, plan, top_k, scale, score)
    # A tile across documents walks a few block rows more; a tile of scattered queries may walk all of them.
    block_rows = max(layout.num_block_rows, plan.columns) if layout.scattered else plan.columns
    slices = cdiv(block_rows + plan.tile, SLICE_BLOCKS)
    with_bins = (
        score in ("softmax_sum", "compressed")
        and slices >= BINS_FROM_SLICES
        and slices * TILE_BLOCKS >= BINS_PER_CHOICE * top_k
    )
    bins = workspace if not with_bins else torch.empty(plan.chunk, plan.lists, slices, TILE_BLOCKS, device=q.device)
    table, per_head = _table(means), score == "per_head"
    tuning = tune_importance(
        gpu_of(q.device), means.shape[2], q.element_size(),
        padded_group=plan.padded_group, per_head=per_head, with_bins=with_bins,
    )  # fmt: skip
    with _beside(q.device, before) as beside:
        for start in starts:
            stop = min(start + plan.chunk, tokens)
            if start in sums_ready:
                beside.wait_event(sums_ready[start])
            if top_k > 1:
                launch(
                    importance_kernel, (cdiv(stop - start, plan.tile), means.shape[1], slices),
                    q, table, layout.query_first_block_row, layout.query_position, lse, workspace, bins, start, stop, q.stride(0),
                    plan.columns, scale * LOG2E,
                    **_shape(means, layout, plan, q.shape[2], top_k, score), SLICE=SLICE_BLOCKS, STAGES=tuning.stages,
                    FMA_SHARE=FMA_SHARE, PER_HEAD=per_head, WITH_BINS=with_bins, **tuning.options(), stream=beside,
                )  # fmt: skip
            launch(
                top_k_kernel, ((stop - start) * plan.lists,),
                workspace, layout.query_position, bins, scratch, indices, start, plan.columns,
                LISTS=plan.lists, BLOCK_SIZE=layout.block_size, TOP_K=top_k, PADDED_TOP_K=next_power_of_2(top_k),
                SCRATCH=plan.survivors, WIDTH=TOP_K_WIDTH,
                SIGNED=score == "per_head", OFFICIAL=score == "official_compat",
                BINS_PER_ROW=slices * TILE_BLOCKS if with_bins else 0, num_warps=1, stream=beside,
            )  # fmt: skip
        if seen is not None:
            arrays = (workspace, scratch, indices)
            _choose_in_long_documents(q, means, lse, arrays, seen, layout, plan, top_k, scale, score, beside)
    return indices


def _longest_seen(layout: DocumentLayout, top_k: int) -> LongestSeen | None:
    """Returns what earlier calls have met, if the layout has no bound on its documents and a smaller bound would help."""
    unknown = layout.max_length == layout.num_tokens and len(layout.cu_seqlens) > 3  # not one document
    if not unknown or top_k == 1 or _columns(layout.num_tokens, layout.block_size) == TOP_K_WIDTH:
        return None
    device = layout.cu_seqlens.device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None  # a graph is planned once, for whatever documents its replays will bring
    return longest_seen(device, layout.num_tokens.bit_length(), len(layout.cu_seqlens).bit_length())


def _choose_in_long_documents(
    q: torch.Tensor,
    means: torch.Tensor,
    lse: torch.Tensor | None,
    arrays: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    seen: LongestSeen,
    layout: DocumentLayout,
    plan: _Plan,
    top_k: int,
    scale: float,
    score: str,
    beside: torch.cuda.Stream | None,
) -> None:
    """Fills the indices of the tiles that the plan did not cover, and reports the longest document.

    Args:
        arrays: workspace, scratch rows and indices.
        beside: the stream of the chunks, after which the workspace is free.
    """
    workspace, scratch, indices = arrays
    width = _columns(layout.max_length, layout.block_size)
    tiles = cdiv(q.shape[0], plan.tile)
    rows = plan.tile * plan.lists // means.shape[1]
    most = min(tiles, MAX_PROGRAMS, workspace.numel() // (rows * width), scratch.shape[0] * plan.lists)
    tiles_per_program = cdiv(tiles, most)
    sizes = _shape(means, layout, plan, q.shape[2], top_k, score)
    del sizes["TOP_K"]
    launch(
        long_tiles_kernel, (cdiv(tiles, tiles_per_program),),
        q, _table(means), layout.query_first_block_row, layout.query_position, workspace if lse is None else lse, workspace, scratch,
        indices, seen.on_device, seen.on_host, q.shape[0], tiles_per_program, q.stride(0), plan.columns, width, scale * LOG2E,
        KV_HEADS=means.shape[1], **sizes, FMA_SHARE=FMA_SHARE, PER_HEAD=score == "per_head",
        TOP_K=top_k, PADDED_TOP_K=next_power_of_2(top_k), SCRATCH=plan.survivors, WIDTH=TOP_K_WIDTH,
        OFFICIAL=score == "official_compat",
        num_warps=long_tiles_warps(gpu_of(q.device), means.shape[2]), stream=beside,
    )  # fmt: skip


@contextmanager
def _beside(device: torch.device, before: torch.cuda.Event | None) -> Iterator[torch.cuda.Stream | None]:
    """Yields the high-priority stream, which starts after `before` and which the current stream waits for at the end; None on a CPU.

    A chunk runs there as soon as its softmax sums are ready, while the current stream computes later sums. Importance and sums are bound by
    the exponential unit and top-k by the integer pipe, so they overlap, and later sums fill the device at the end of a chunk.
    """
    if device.type != "cuda":
        yield None
        return
    stream = high_priority_stream(device)
    current = torch.cuda.current_stream(device)
    stream.wait_event(before)
    yield stream
    current.wait_stream(stream)


def _columns(length: int, block_size: int) -> int:
    """Returns the width of an importance row for documents up to this length, in whole passes of top-k."""
    # The own block is not a candidate, so a document of n blocks needs n - 1 columns.
    return cdiv(max(cdiv(length, block_size) - 1, 1), TOP_K_WIDTH) * TOP_K_WIDTH


def _plan(
    q: torch.Tensor, means: torch.Tensor, layout: DocumentLayout, top_k: int, score: str, max_length: int
) -> _Plan:
    """Returns the sizes of a call that expects documents of at most `max_length` tokens."""
    tokens, heads, _ = q.shape
    kv_heads = means.shape[1]
    lists = heads if score == "per_head" else kv_heads
    columns = _columns(max_length, layout.block_size)
    kept = layout.block_size if score == "official_compat" else 2 * top_k
    survivors = max(32, next_power_of_2(kept))
    tile = queries_per_tile(heads // kv_heads)
    bins = cdiv(columns + tile, SLICE_BLOCKS) * TILE_BLOCKS
    most = max(WORKSPACE_BYTES // (lists * (columns + survivors + bins) * 4) // tile, 1) * tile
    chunk = cdiv(cdiv(tokens, cdiv(tokens, most)), tile) * tile  # all chunks have about the same size
    return _Plan(lists, heads // kv_heads, tile, columns, survivors, chunk)


def queries_per_tile(group_size: int) -> int:
    """Returns the number of neighbouring queries that share a tile: with all their heads of one kv head they are at most its rows."""
    return TILE_ROWS // next_power_of_2(group_size)


def _softmax_sums(
    q, means, lse, parts: range, layout: DocumentLayout, plan: _Plan, top_k: int, scale: float, score: str
) -> dict[int, torch.cuda.Event]:
    """Fills lse [T, H], part by part. Returns each part's event by its first token. Tokens whose candidates are all chosen stay unwritten."""
    tokens, _, dim = q.shape
    tuning, ready = tune_sums(gpu_of(q.device), means.shape[2], q.element_size()), {}
    for start in parts:
        part = slice(start, min(start + parts.step, tokens))
        launch(
            softmax_sums_kernel, (cdiv(part.stop - start, plan.tile), means.shape[1]),
            q[part], _table(means), layout.query_first_block_row[part], layout.query_position[part], lse[part],
            part.stop - start, q.stride(0), scale * LOG2E,
            **_shape(means, layout, plan, dim, top_k, score), STAGES=tuning.stages, FMA_SHARE=FMA_SHARE,
            OFFICIAL=score in COMPLETE_OWN, **tuning.options(),
        )  # fmt: skip
        if q.is_cuda:
            ready[start] = torch.cuda.current_stream(q.device).record_event()
    return ready


def _table(means: torch.Tensor) -> TensorDescriptor:
    """Returns the means as a matrix [R, G x padded D], of which kernels copy [TILE_BLOCKS, padded D] at a time, with zeros past its end."""
    return TensorDescriptor.from_tensor(means.view(means.shape[0], -1), [TILE_BLOCKS, means.shape[2]])


def _shape(
    means: torch.Tensor, layout: DocumentLayout, plan: _Plan, dim: int, top_k: int, score: str
) -> dict[str, int]:
    """Returns the compile-time sizes that both product kernels take."""
    return {
        "BLOCK_SIZE": layout.block_size,
        # With fewer candidates all are chosen, except that official_compat may lose some.
        "TOP_K": 1 if score == "official_compat" else top_k,
        "GROUP_SIZE": plan.group_size,
        "PADDED_GROUP": plan.padded_group,
        "HEAD_DIM": dim,
        "DIM": means.shape[2],
        "TILE_TOKENS": plan.tile,
        "TILE_BLOCKS": TILE_BLOCKS,
    }
