"""Launches the tensor-core kernels: sizes, padding and the choice between heads as rows and heads as columns."""

# pyright: reportIndexIssue=false
# (gluon.jit is typed as if it gave back the function, which cannot be indexed by a grid.)

import torch
from triton.experimental.gluon import language as gl

from ..documents import DocumentLayout
from ..launch import launch, next_power_of_2
from . import tensor_core_backward, tensor_core_few_heads, tensor_core_forward, tensor_core_wide
from .fragments import LOG2E
from .index import InvertedIndex
from .tiles import pack_tiles, padded_dim

FEW = tensor_core_few_heads.COLUMNS.value
RING_ROWS = 16  # up to how many heads a list dK and dV take the ring at D 64, where their rows fit registers too
RING = 2  # buffers of rows that wait for their turn


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, layout: DocumentLayout, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (o, lse); contiguous arguments as in `sparse_attention`, with the layout built."""
    queries, heads, head_dim = q.shape
    lists, top_k = indices.shape[1:]
    rows = heads // lists
    kernel = tensor_core_few_heads.forward_kernel if rows <= FEW else tensor_core_forward.forward_kernel
    tiles = pack_tiles(k, v, layout, v_columns=True, left=rows <= FEW)
    o = torch.empty_like(q)
    lse = torch.empty(queries, heads, dtype=torch.float32, device=q.device)
    launch(
        kernel, (queries * lists,),
        q.view(torch.int32), tiles.view(torch.int32), indices, layout.query_position, layout.query_first_row, o, lse,
        scale * LOG2E.value, queries,
        LISTS=lists, KV_HEADS=k.shape[1], ROWS=rows, ROWS_PADDED=padded_rows(rows),
        HEAD_DIM=head_dim, DIM=padded_dim(head_dim), BLOCK_SIZE=layout.block_size, TOP_K=top_k, SLOTS=padded_slots(top_k),
        DTYPE=gluon_dtype(q.dtype), LIMIT=6e4 if q.dtype == torch.float16 else 1e30, num_warps=1,
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
    """Returns dq, and fills delta unless it has been given; arguments as in `sparse_attention_backward`, `add_to` that of dq."""
    queries, heads, head_dim = q.shape
    lists, top_k = indices.shape[1:]
    rows = heads // lists
    dq = torch.empty_like(q) if add_to is None else add_to
    kernel = tensor_core_few_heads.dq_kernel if rows <= FEW else tensor_core_backward.dq_kernel
    tiles = pack_tiles(k, v, layout, v_columns=False, left=rows <= FEW)
    q_words, do_words = q.view(torch.int32), do.view(torch.int32)
    launch(
        kernel, (queries * lists,),
        q_words, do_words, do_words if o is None else o.view(torch.int32), tiles.view(torch.int32), indices,
        layout.query_position, layout.query_first_row, lse, delta, dq, scale, scale * LOG2E.value, queries,
        LISTS=lists, KV_HEADS=k.shape[1], ROWS=rows, ROWS_PADDED=padded_rows(rows),
        HEAD_DIM=head_dim, DIM=padded_dim(head_dim), BLOCK_SIZE=layout.block_size, TOP_K=top_k, SLOTS=padded_slots(top_k),
        DTYPE=gluon_dtype(q.dtype), HAS_DELTA=has_delta, ADD=add_to is not None, num_warps=1,
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
    rows, dim, block_size = heads // lists, padded_dim(head_dim), layout.block_size
    slot = next_power_of_2(rows)
    sums = torch.empty(index.max_segments, 2, block_size, dim, dtype=torch.float32, device=q.device)
    common = {
        "LISTS": lists, "KV_HEADS": k.shape[1], "ROWS": rows, "SLOT": slot, "N": max(16, slot), "HEAD_DIM": head_dim, "DIM": dim,
        "BLOCK_SIZE": block_size, "TOP_K": top_k, "DTYPE": gluon_dtype(q.dtype), "num_warps": block_size // 16,
    }  # fmt: skip
    rest = (
        lse, delta, layout.query_start + layout.query_position, index.choices, index.segments, index.schedule,
        index.num_segments, layout.block_start, layout.block_length, sums, scale * LOG2E.value, layout.num_block_rows,
    )  # fmt: skip
    if dim > 64 or rows <= RING_ROWS:
        launch(tensor_core_wide.dkdv_kernel, (index.max_segments,), q, do, k, v, *rest, **common, STAGES=RING)
    else:
        words = (x.view(torch.int32) for x in (q, do, k, v))
        launch(tensor_core_backward.dkdv_kernel, (index.max_segments,), *words, *rest, **common)
    return sums


def padded_rows(rows: int) -> int:
    """Returns the rows or columns of a program's products that hold a list's heads."""
    return FEW if rows <= FEW else 16 if rows <= 16 else 32


def padded_slots(top_k: int) -> int:
    """Returns the power of two, at least 1, that holds a query's choices."""
    return next_power_of_2(top_k)


def gluon_dtype(dtype: torch.dtype) -> gl.dtype:
    """Returns the kernels' name of a 16-bit element type."""
    return {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
