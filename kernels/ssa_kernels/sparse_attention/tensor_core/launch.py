"""Launches the tensor-core kernels: sizes, padding, and which kernels run for how many heads per list."""

# pyright: reportIndexIssue=false
# (gluon.jit is typed as if it returned the function, which a grid cannot index.)

import torch
from triton.experimental.gluon import language as gl

from ...devices import gpu_of
from ...documents import DocumentLayout
from ...launch import launch, next_power_of_2
from ..index import InvertedIndex
from . import backward, few_heads, wide_heads
from . import forward as forward_by_rows
from .fragments import LOG2E
from .tiles import pack_tiles, padded_dim

FEW_HEADS = few_heads.COLUMNS.value  # per list: up to so many, few_heads.py runs
# wide_heads.py holds rows of q and dO in a ring in shared memory. At D 64, where they fit into registers too, the ring is faster up to this
# many heads per list.
RING_HEADS = 16
RING_STAGES = 2
# Wider heads (128 < D <= 256): dK and dV by 16 keys of a block at a time, which four warps share, and 32 rows of q and dO per step.
WIDE_KEYS, WIDE_COLUMN_WARPS, WIDE_STEP_ROWS = 16, 4, 32


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, layout: DocumentLayout, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (o, lse); contiguous arguments as in `sparse_attention`, with the layout built."""
    queries, heads, _ = q.shape
    indices = _split_lists(q, indices)
    few = heads // indices.shape[1] <= FEW_HEADS
    kernel = few_heads.forward_kernel if few else forward_by_rows.forward_kernel
    tiles = pack_tiles(k, v, layout, v_columns=True, left=few)
    o = torch.empty_like(q)
    lse = torch.empty(queries, heads, dtype=torch.float32, device=q.device)
    launch(
        kernel, (queries * indices.shape[1],),
        q.view(torch.int32), tiles.view(torch.int32), indices, layout.query_position, layout.query_first_block_row, o, lse,
        scale * LOG2E.value, queries,
        **_query_sizes(q, k, indices, layout), LIMIT=6e4 if q.dtype == torch.float16 else 1e30, num_warps=1,
    )  # fmt: skip
    return o, lse


def backward_q(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    o: torch.Tensor | None,
    lse: torch.Tensor,
    do: torch.Tensor,
    layout: DocumentLayout,
    scale: float,
    delta: torch.Tensor,
    has_delta: bool,
    add_to: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns dq, and fills delta unless has_delta; arguments as in `sparse_attention_backward`, with dq's `add_to`."""
    queries, heads, _ = q.shape
    indices = _split_lists(q, indices)
    few = heads // indices.shape[1] <= FEW_HEADS
    dq = torch.empty_like(q) if add_to is None else add_to
    kernel = few_heads.dq_kernel if few else backward.dq_kernel
    tiles = pack_tiles(k, v, layout, v_columns=False, left=few)
    q_words, do_words = q.view(torch.int32), do.view(torch.int32)
    launch(
        kernel, (queries * indices.shape[1],),
        q_words, do_words, do_words if o is None else o.view(torch.int32), tiles.view(torch.int32), indices,
        layout.query_position, layout.query_first_block_row, lse, delta, dq, scale, scale * LOG2E.value, queries,
        **_query_sizes(q, k, indices, layout), HAS_DELTA=has_delta, ADD=add_to is not None, num_warps=1,
    )  # fmt: skip
    return dq


def backward_k_v(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    lse: torch.Tensor,
    do: torch.Tensor,
    layout: DocumentLayout,
    scale: float,
    delta: torch.Tensor,
    index: InvertedIndex,
) -> torch.Tensor:
    """Returns the segments' sums, float32 [segments, 2 (dk without its scale, dv), K, padded D]."""
    _, heads, head_dim = q.shape
    lists, top_k = indices.shape[1:]
    heads_per_list, dim, block_size = heads // lists, padded_dim(head_dim), layout.block_size
    entry_rows = next_power_of_2(heads_per_list)
    wide = dim > 128
    keys, column_warps = (WIDE_KEYS, WIDE_COLUMN_WARPS) if wide else (block_size, 1)
    sums = torch.empty(index.max_segments, 2, block_size, dim, dtype=torch.float32, device=q.device)
    common = {
        "LISTS": lists, "KV_HEADS": k.shape[1], "HEADS": heads_per_list, "ENTRY_ROWS": entry_rows,
        "STEP_ROWS": max(WIDE_STEP_ROWS if wide else 16, entry_rows),
        "HEAD_DIM": head_dim, "DIM": dim, "BLOCK_SIZE": block_size, "TOP_K": top_k, "DTYPE": _gluon_dtype(q.dtype),
    }  # fmt: skip
    rest = (
        lse, delta, layout.query_keys, index.choices, index.segments, index.schedule,
        index.num_segments, layout.block_start, layout.block_length, sums, scale * LOG2E.value, layout.num_block_rows,
    )  # fmt: skip
    if dim > 64 or heads_per_list <= RING_HEADS:
        launch(
            wide_heads.dkdv_kernel, (index.max_segments, block_size // keys),
            q, do, k, v, *rest,
            **common, KEYS=keys, COLUMN_WARPS=column_warps, KEYS_IN_SHARED=_keys_in_shared(q, dim, block_size),
            STAGES=RING_STAGES, num_warps=keys // 16 * column_warps,
        )  # fmt: skip
    else:
        words = (x.view(torch.int32) for x in (q, do, k, v))
        launch(backward.dkdv_kernel, (index.max_segments,), *words, *rest, **common, num_warps=block_size // 16)
    return sums


def _split_lists(q: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Returns the indices, with each list repeated for parts of its heads if one program cannot hold them all at this head dim.

    From D 136 on a program holds FEW_HEADS heads. A list of more becomes the fewest equal lists of that many or fewer.
    """
    lists = indices.shape[1]
    heads_per_list = q.shape[1] // lists
    if padded_dim(q.shape[2]) <= 128 or heads_per_list <= FEW_HEADS:
        return indices
    parts = next(
        n for n in range(2, heads_per_list + 1) if heads_per_list % n == 0 and heads_per_list // n <= FEW_HEADS
    )
    return indices.repeat_interleave(parts, 1)


def _query_sizes(q: torch.Tensor, k: torch.Tensor, indices: torch.Tensor, layout: DocumentLayout) -> dict[str, object]:
    """Returns the sizes that the kernels by queries take."""
    heads_per_list, head_dim = q.shape[1] // indices.shape[1], q.shape[2]
    return {
        "LISTS": indices.shape[1],
        "KV_HEADS": k.shape[1],
        "HEADS": heads_per_list,
        "PADDED_HEADS": padded_heads(heads_per_list),
        "HEAD_DIM": head_dim,
        "DIM": padded_dim(head_dim),
        "BLOCK_SIZE": layout.block_size,
        "TOP_K": indices.shape[2],
        "PADDED_TOP_K": next_power_of_2(indices.shape[2]),
        "DTYPE": _gluon_dtype(q.dtype),
    }


def _keys_in_shared(q: torch.Tensor, dim: int, block_size: int) -> bool:
    """Returns whether dK and dV of heads wider than 64 read K and V from shared memory, because registers would spill (bench.compile)."""
    return dim > 128 or (dim > 64 and (block_size == 128 or gpu_of(q.device).capability >= 100))


def padded_heads(heads_per_list: int) -> int:
    """Returns the rows (or columns, for few heads) of a program's products, which hold the heads of a list."""
    return FEW_HEADS if heads_per_list <= FEW_HEADS else 16 if heads_per_list <= 16 else 32


def _gluon_dtype(dtype: torch.dtype) -> gl.dtype:
    """Returns Gluon's name of a 16-bit element type."""
    return {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
