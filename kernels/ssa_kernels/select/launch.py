"""Launches the selection kernels: block means, softmax sums, then importance and top-k chunk by chunk of tokens.

Beside the result there are the means, one float32 a query and head for the softmax sums, and a workspace bounded by WORKSPACE_BYTES that
holds importance and the survivors' scratch for as many tokens as fit. Grids depend on shapes and on the layout's `max_length` alone:
no synchronisation, and nothing recompiles from batch to batch. Give a layout with the rows' length as `max_length` where documents are
packed into rows: it decides how many tokens make a chunk.

Registers, stages and tile sizes were chosen by measurement at 16 heads a group, D 64 (kernels/README.md); other shapes run the same
way with what their tiles leave room for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from ..documents import DocumentLayout
from ..launch import cdiv, high_priority_stream, launch, next_power_of_2
from .importance import block_means_kernel, importance_kernel, softmax_sums_kernel
from .topk import top_k_kernel

WORKSPACE_BYTES = 64 * 2**20
LOG2E = 1.4426950408889634
PRODUCT_ROWS = 128  # (tokens x heads) of one tile
BLOCK_ROWS = 64  # block rows of one tile
FMA_SHARE = 1  # of 8 exponentials, how many go to the multiply-add pipe: 0, 1, 2 or 4
SPANS = 4  # parts of the softmax sums, so that chunks of an early one run beside a later one
# Rows of that many slices, 64k at blocks of 16, and bins for each chosen block, let the importance kernel make top-k's bins.
BINS_FROM_SLICES = 5
BINS_A_CHOICE = 4
IMPORTANCE_REGISTERS = {False: 112, True: 128}  # without and with bins; four programs a multiprocessor either way
TOP_K_WIDTH = 512  # columns of a pass of top-k
SLICE_ROWS = 1024  # block rows that a program of the importance kernel walks


@dataclass(frozen=True, slots=True)
class _Plan:
    """Sizes of one call, from shapes alone."""

    lists: int  # choices a token: kv heads, or query heads for per_head
    group: int  # query heads a kv head
    tile: int  # tokens of a tile
    columns: int  # importance row: candidates of the longest document, up to a whole pass of top-k
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
    padded = next_power_of_2(dim)
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
        BP=next_power_of_2(layout.block_size),
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
    workspace = torch.empty(plan.chunk, plan.lists, plan.columns, dtype=torch.float32, device=q.device)
    scratch = torch.empty(plan.chunk, plan.lists, plan.survivors, dtype=torch.int32, device=q.device)
    starts = range(0, tokens, plan.chunk)
    before = torch.cuda.current_stream(q.device).record_event() if q.is_cuda else None
    lse, sums_ready = None, {}
    if score != "per_head" and top_k > 1:
        lse = torch.empty(tokens, q.shape[1], dtype=torch.float32, device=q.device)
        spans = starts[:: cdiv(len(starts), SPANS)]
        sums_ready = _softmax_sums(q, means, lse, spans, layout, plan, top_k, scale, score)
    # A tile that spans documents walks a few rows more; one of queries far apart perhaps all.
    rows = max(layout.num_block_rows, plan.columns) if layout.scattered else plan.columns
    slices = cdiv(rows + plan.tile, SLICE_ROWS)
    with_bins = score == "softmax_sum" and slices >= BINS_FROM_SLICES and slices * BLOCK_ROWS >= BINS_A_CHOICE * top_k
    bins = workspace if not with_bins else torch.empty(plan.chunk, plan.lists, slices, BLOCK_ROWS, device=q.device)
    table, narrow = _table(means), means.shape[2] <= 64
    with _urgent(q.device, before) as urgent:
        for start in starts:
            stop = min(start + plan.chunk, tokens)
            if start in sums_ready:
                urgent.wait_event(sums_ready[start])
            if top_k > 1:
                launch(
                    importance_kernel, (cdiv(stop - start, plan.tile), means.shape[1], slices),
                    q, table, layout.query_first_block_row, layout.query_position, lse, workspace, bins, start, stop, q.stride(0),
                    plan.columns, scale * LOG2E,
                    **_shape(means, layout, plan, q.shape[2], top_k, score), SLICE=SLICE_ROWS, STAGES=3 if narrow else 2,
                    FMA_SHARE=FMA_SHARE, PER_HEAD=score == "per_head", WITH_BINS=with_bins,
                    num_warps=4, maxnreg=IMPORTANCE_REGISTERS[with_bins] if narrow else None, stream=urgent,
                )  # fmt: skip
            launch(
                top_k_kernel, ((stop - start) * plan.lists,),
                workspace, layout.query_position, bins, scratch, indices, start, plan.columns,
                LISTS=plan.lists, K=layout.block_size, S=top_k, SP=next_power_of_2(top_k), C=plan.survivors, W=TOP_K_WIDTH,
                SIGNED=score == "per_head", OFFICIAL=score == "official_compat",
                BINS_A_ROW=slices * BLOCK_ROWS if with_bins else 0, num_warps=1, stream=urgent,
            )  # fmt: skip
    return indices


@contextmanager
def _urgent(device: torch.device, before: torch.cuda.Event | None) -> Iterator[torch.cuda.Stream | None]:
    """Gives a stream whose kernels are placed before the current one's, from `before` on, and which that one waits for; None on a CPU.

    Chunks run there as soon as their softmax sums are there, while the current stream works on later sums: importance and sums are bound
    by the exponential unit, top-k by the integer pipe, and what the end of a chunk leaves empty is filled.
    """
    if device.type != "cuda":
        yield None
        return
    urgent = high_priority_stream(device)
    current = torch.cuda.current_stream(device)
    urgent.wait_event(before)
    yield urgent
    current.wait_stream(urgent)


def _plan(q: torch.Tensor, means: torch.Tensor, layout: DocumentLayout, top_k: int, score: str) -> _Plan:
    tokens, heads, _ = q.shape
    kv_heads = means.shape[1]
    lists = heads if score == "per_head" else kv_heads
    # The own block is no candidate, so a document of n blocks needs n - 1 columns.
    columns = cdiv(max(layout.max_blocks - 1, 1), TOP_K_WIDTH) * TOP_K_WIDTH
    kept = layout.block_size if score == "official_compat" else 2 * top_k
    survivors = max(32, next_power_of_2(kept))
    tile = PRODUCT_ROWS // next_power_of_2(heads // kv_heads)
    bins = cdiv(columns + tile, SLICE_ROWS) * BLOCK_ROWS
    most = max(WORKSPACE_BYTES // (lists * (columns + survivors + bins) * 4) // tile, 1) * tile
    chunk = cdiv(cdiv(tokens, cdiv(tokens, most)), tile) * tile  # all of about the same size
    return _Plan(lists, heads // kv_heads, tile, columns, survivors, chunk)


def _softmax_sums(
    q, means, lse, spans: range, layout: DocumentLayout, plan: _Plan, top_k: int, scale: float, score: str
) -> dict[int, torch.cuda.Event]:
    """Fills lse [T, H], span by span; returns an event by the first token of each. Rows whose candidates are all chosen stay unwritten."""
    tokens, _, dim = q.shape
    ready = {}
    for start in spans:
        span = slice(start, min(start + spans.step, tokens))
        launch(
            softmax_sums_kernel, (cdiv(span.stop - start, plan.tile), means.shape[1]),
            q[span], _table(means), layout.query_first_block_row[span], layout.query_position[span], lse[span],
            span.stop - start, q.stride(0), scale * LOG2E,
            **_shape(means, layout, plan, dim, top_k, score), STAGES=2, FMA_SHARE=FMA_SHARE,
            num_warps=4, maxnreg=96 if means.shape[2] <= 64 else 168,
        )  # fmt: skip
        if q.is_cuda:
            ready[start] = torch.cuda.current_stream(q.device).record_event()
    return ready


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
