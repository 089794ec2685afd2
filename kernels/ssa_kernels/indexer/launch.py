"""Launches the trained scorer's kernels: block masses by chunks of queries, then the choice, or the loss and its gradients.

Memory beyond the results: the masses of as many queries as fit WORKSPACE_BYTES (twice for the loss), the choice, one fp32 per index query for its
softmax sum and one for its part of the gradient, and the two gradients in fp32. Sizes depend on shapes and the layout's
`max_length` only, so nothing waits for the device.
"""

from typing import Any

import torch

from ..devices import gpu_of, multiprocessors
from ..documents import DocumentLayout
from ..launch import cdiv, launch, next_power_of_2
from ..select.topk import top_k_kernel
from .gradient_triton import key_gradient_kernel, query_gradient_kernel, ratio_sums_kernel
from .mass_triton import log_block_mass_kernel, log_block_sums_kernel
from .reference import NOTHING
from .terms_triton import terms_kernel

WORKSPACE_BYTES = 32 * 2**20
LOG2E = 1.4426950408889634
TILE_ROWS, LEAST_ROWS = 128, 32  # (queries x heads) of one tile of the gradients
SCORE_ROWS = 64  # of one tile of the masses and sums
STEP_KEYS = 64  # keys of one step, or one block if that is longer
PROGRAMS = 16  # of `log_block_sums_kernel` per multiprocessor
LEAST_WIDTH, MOST_WIDTH = 128, 512  # columns per pass of top-k and of the loss's terms


def log_block_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    layout: DocumentLayout,
    scale: float,
    queries: slice | None = None,
    columns: int | None = None,
    top_k: int = 0,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the natural logarithm of the block mass [n, G, C] of some neighbouring queries, and the log2 softmax sums [T, H] of all.

    Args:
        q, k, layout, scale: as in `block_mass`, checked.
        queries: which; None: all.
        columns: C; None: the blocks of the longest document possible.
        top_k: 0: all queries, with NOTHING at blocks after a query's own. Otherwise queries with at most so many blocks may be left out, and anything
            is there and at blocks after a query's own.
        lse: receives the sums; None: a new tensor.
    """
    tokens, kv_heads = q.shape[0], k.shape[1]
    queries = queries or slice(0, tokens)
    columns = columns or cdiv(layout.max_length, layout.block_size)
    mass = torch.empty((queries.stop - queries.start, kv_heads, columns), dtype=torch.float32, device=q.device)
    if not top_k:
        mass.fill_(NOTHING)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) if lse is None else lse
    warps = _score_warps(layout.block_size, q.device)
    # On Hopper twice the rows are an eighth faster where a step is one long block, from four heads on, in spite of a few spilled bytes.
    twice = layout.block_size > STEP_KEYS and warps == 4 and q.shape[1] >= 4 * kv_heads
    sizes = _sizes(q, k, layout, top_k, rows=2 * SCORE_ROWS if twice else SCORE_ROWS)
    launch(
        log_block_mass_kernel, (cdiv(len(mass), sizes["TILE_TOKENS"]), kv_heads),
        q, k, *_arrays(layout), lse, mass, queries.start, queries.stop, columns, scale * LOG2E, **sizes, num_warps=warps, num_stages=2,
    )  # fmt: skip
    return mass, lse


def log_block_sums(
    iq: torch.Tensor,
    ik: torch.Tensor,
    *,
    layout: DocumentLayout,
    scale: float,
    queries: slice,
    columns: int,
    top_k: int,
) -> torch.Tensor:
    """Returns ln of each block's sum of 2^logits [n, G, C]: the block mass up to a number per query. Needs one index head per kv head.

    Arguments as in `log_block_mass`; anything may be where that function leaves anything.
    """
    sums = torch.empty((queries.stop - queries.start, ik.shape[1], columns), dtype=torch.float32, device=iq.device)
    sizes = _sizes(iq, ik, layout, top_k, rows=SCORE_ROWS)
    tiles, lists = cdiv(len(sums), sizes["TILE_TOKENS"]), ik.shape[1]
    parts = cdiv(PROGRAMS * multiprocessors(iq.device), tiles * lists)
    parts = min(max(parts, 1), cdiv(columns, sizes["BLOCK_ROWS"]))
    launch(
        log_block_sums_kernel, (tiles, lists, parts),
        iq, ik, *_arrays(layout), sums, queries.start, queries.stop, columns, scale * LOG2E, **sizes,
        num_warps=_score_warps(layout.block_size, iq.device), num_stages=3 if gpu_of(iq.device).backend == "cuda" else 2,
    )  # fmt: skip
    return sums


def choose_triton(
    iq: torch.Tensor, ik: torch.Tensor, *, layout: DocumentLayout, top_k: int, scale: float
) -> torch.Tensor:
    """Returns indices; arguments as in `choose_by_index`, checked, with the layout built."""
    iq, ik = iq.detach(), ik.detach()
    tokens, lists = iq.shape[0], ik.shape[1]
    columns = _columns(layout)
    chunk = min(_queries_per_chunk(lists * columns), tokens)
    indices, scratch = _choice(iq, lists, chunk, top_k)
    common: dict[str, Any] = {"layout": layout, "scale": scale, "columns": columns, "top_k": top_k}
    single, lse = iq.shape[1] == lists, None
    for start in range(0, tokens, chunk):
        queries = slice(start, min(start + chunk, tokens))
        if single:
            score = log_block_sums(iq, ik, queries=queries, **common)
        else:
            score, lse = log_block_mass(iq, ik, queries=queries, lse=lse, **common)
        _choose(score, layout, start, scratch, indices)
    return indices


def _choice(iq: torch.Tensor, lists: int, chunk: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the tensor of the choice, int32 [T, G, top_k], and the scratch rows of top-k for a chunk of queries."""
    scratch = torch.empty(chunk, lists, max(32, next_power_of_2(2 * top_k)), dtype=torch.int32, device=iq.device)
    return torch.empty(iq.shape[0], lists, top_k, dtype=torch.int32, device=iq.device), scratch


def _choose(
    score: torch.Tensor, layout: DocumentLayout, start: int, scratch: torch.Tensor, indices: torch.Tensor
) -> None:
    """Writes the choice of a chunk's queries, from query `start` on, by its masses or block sums [n, G, C] of whole passes."""
    lists, top_k = indices.shape[1:]
    launch(
        top_k_kernel, (len(score) * lists,),
        score, layout.query_position, score, scratch, indices, start, score.shape[2],
        LISTS=lists, BLOCK_SIZE=layout.block_size, TOP_K=top_k, PADDED_TOP_K=next_power_of_2(top_k), SCRATCH=scratch.shape[2],
        WIDTH=_width(score.shape[2]), SIGNED=True, OFFICIAL=False, BINS_PER_ROW=0, num_warps=1,
    )  # fmt: skip


def loss_triton(
    iq: torch.Tensor,
    ik: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    layout: DocumentLayout,
    top_k: int,
    scales: tuple[float, float],
    with_gradients: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Returns what `loss_reference` returns, by the kernels."""
    device, tokens, kv_heads = iq.device, iq.shape[0], ik.shape[1]
    columns = _columns(layout)
    loss, captured = (torch.empty(tokens, kv_heads, dtype=torch.float32, device=device) for _ in range(2))
    grad_q, grad_k = (
        torch.zeros(x.shape, dtype=torch.float32, device=device) if with_gradients else None for x in (iq, ik)
    )
    sums = torch.zeros(iq.shape[:2], dtype=torch.float32, device=device)
    # A tile of the gradients can have queries whose tile of the masses writes nothing: they see nothing.
    lse = torch.full_like(sums, -NOTHING)
    ranges = _later_queries(layout) if with_gradients else None
    chunk, target_lse = min(_queries_per_chunk(kv_heads * columns), tokens), None
    single = iq.shape[1] == kv_heads
    indices, scratch = _choice(iq, kv_heads, chunk, top_k)
    rows = _gradient_rows(iq.shape[2], layout.block_size, chunk * iq.shape[1], device)
    sizes = _sizes(iq, ik, layout, top_k, rows=rows)
    common: dict[str, Any] = {"layout": layout, "columns": columns, "top_k": top_k}
    for start in range(0, tokens, chunk):
        queries = slice(start, min(start + chunk, tokens))
        target, target_lse = log_block_mass(q, k, queries=queries, scale=scales[0], lse=target_lse, **common)
        if single:
            ratio = log_block_sums(iq, ik, queries=queries, scale=scales[1], **common)
        else:
            ratio, _ = log_block_mass(iq, ik, queries=queries, scale=scales[1], lse=lse, **common)
        _choose(ratio, layout, start, scratch, indices)
        launch(
            terms_kernel, (len(ratio) * kv_heads,),
            target, ratio, layout.query_position, indices, loss, captured, lse, sums, start, columns,
            LISTS=kv_heads, BLOCK_SIZE=layout.block_size, TOP_K=top_k, PADDED_TOP_K=next_power_of_2(top_k),
            WIDTH=_width(columns), SINGLE=single, num_warps=1,
        )  # fmt: skip
        if grad_q is not None and grad_k is not None and ranges is not None:
            tensors = (iq, ik, *_arrays(layout), lse, ratio, sums)
            _add_gradients(tensors, (grad_q, grad_k), ranges, queries, scales[1], sizes)
    return loss.sum(), captured.sum(), grad_q, grad_k


def _add_gradients(
    tensors: tuple[torch.Tensor, ...],
    grads: tuple[torch.Tensor, torch.Tensor],
    ranges: tuple[torch.Tensor, torch.Tensor],
    queries: slice,
    scale: float,
    sizes: dict[str, Any],
) -> None:
    """Writes the gradient of a chunk's index queries, and adds its part of the keys'.

    Args:
        tensors: the kernels' first arguments.
        grads: of iq and ik.
        ranges: by `_later_queries`.
        queries: the chunk.
        scale: factor of the index scores.
        sizes: by `_sizes`.
    """
    ratio, num_block_rows = tensors[-2], len(ranges[0])
    place, settings = (queries.start, queries.stop, ratio.shape[2]), {**sizes, "num_warps": 8, "num_stages": 2}
    tiles, rows = cdiv(len(ratio), sizes["TILE_TOKENS"]), cdiv(num_block_rows, sizes["BLOCK_ROWS"])
    kv_heads, factors = ratio.shape[1], (scale * LOG2E, scale)
    if sizes["GROUP_SIZE"] > 1:  # otherwise `terms_kernel` has written them
        launch(ratio_sums_kernel, (tiles, kv_heads), *tensors, *place, factors[0], **settings)
    launch(query_gradient_kernel, (tiles, kv_heads), *tensors, grads[0], *place, *factors, **settings)
    arguments = (*tensors, grads[1], *ranges, *place, num_block_rows, *factors)
    launch(key_gradient_kernel, (rows, kv_heads), *arguments, **settings)


def _later_queries(layout: DocumentLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns, for each block row, the first query of its document at or after its first key, and the query after the document's last: int32 [R]."""
    keys = layout.query_keys
    row = torch.arange(layout.num_block_rows, dtype=torch.int32, device=keys.device)
    documents = layout.document_first_block_row.shape[0] - 1
    document = torch.searchsorted(layout.document_first_block_row[1:], row, right=True).clamp(max=documents - 1)
    document_end = layout.cu_seqlens[document + 1]
    begin, end = (torch.searchsorted(keys, edge, out_int32=True) for edge in (layout.block_start, document_end))
    return begin, torch.where(layout.block_length > 0, end, 0)


def _columns(layout: DocumentLayout) -> int:
    """Returns the columns of a chunk's masses: the blocks of the longest document possible, in whole passes."""
    columns = cdiv(layout.max_length, layout.block_size)
    return cdiv(columns, _width(columns)) * _width(columns)


def _width(columns: int) -> int:
    """Returns the columns of one pass over a row of masses."""
    return min(max(next_power_of_2(columns), LEAST_WIDTH), MOST_WIDTH)


def _queries_per_chunk(numbers: int) -> int:
    """Returns how many queries share the workspace, each with so many fp32 numbers: a multiple of a tile."""
    return max(WORKSPACE_BYTES // (4 * numbers) // TILE_ROWS, 1) * TILE_ROWS


def _arrays(layout: DocumentLayout) -> tuple[torch.Tensor, ...]:
    """Returns the layout's arrays in the order in which the kernels take them."""
    queries = layout.query_first_block_row, layout.query_position, layout.query_start
    return *queries, layout.block_start, layout.block_length


def _sizes(q: torch.Tensor, k: torch.Tensor, layout: DocumentLayout, top_k: int, *, rows: int) -> dict[str, Any]:
    """Returns the compile-time sizes that all kernels take, for tiles of so many rows."""
    group_size = q.shape[1] // k.shape[1]
    padded_group, padded_block = next_power_of_2(group_size), next_power_of_2(layout.block_size)
    return {
        "KV_HEADS": k.shape[1],
        "BLOCK_SIZE": layout.block_size,
        "PADDED_BLOCK": padded_block,
        "BLOCK_ROWS": max(1, STEP_KEYS // padded_block),
        "GROUP_SIZE": group_size,
        "PADDED_GROUP": padded_group,
        "HEAD_DIM": q.shape[2],
        "DIM": next_power_of_2(q.shape[2]),
        "TILE_TOKENS": rows // padded_group,
        "TOP_K": top_k,
    }


def _gradient_rows(dim: int, block_size: int, num_rows: int, device: torch.device) -> int:
    """Returns the rows of one tile of the gradients' kernels, of `num_rows` in all.

    At most so many that nothing spills on Hopper with eight warps (bench/compile.py). Fewer while twice as many programs would still have a multiprocessor
    each: a share of a row's queries has few tiles, and so has a chunk of queries with many blocks (kernels/LOG.md).
    """
    rows = TILE_ROWS
    if dim > 64:
        rows = 64 if block_size <= STEP_KEYS else LEAST_ROWS
    while rows > LEAST_ROWS and cdiv(num_rows, rows // 2) <= multiprocessors(device):
        rows //= 2
    return rows


def _score_warps(block_size: int, device: torch.device) -> int:
    """Returns the warps of the masses' and sums' kernels: 4 are fastest on Hopper; elsewhere they spill where a step is one long block."""
    return 4 if block_size <= STEP_KEYS or gpu_of(device).capability == 90 else 8
