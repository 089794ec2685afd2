"""The sparse stream's backward: which kernels run, the ordered sums, and the portable kernels (Triton).

The formulas are in tensor_core_backward.py; tensor_core.py chooses among the tensor-core kernels. The portable ones below do the same for
whatever those do not serve (forward.py says what that is), one (query, list) or one segment a program. Steps:

    dq and delta, by queries -> index.invert: the queries of each block, in segments -> dk and dv of each segment, fp32, to a place of its
    own -> the sums of a block's segments, in order

All sums have a fixed order that depends on the document alone: gradients are bit-identical from run to run and do not depend on what
else is in the batch. Memory beyond the results, at 65,536 tokens of 32 heads and 2 kv heads of 64 (N 16, K 16): 336 MB of segment sums,
17 MB of index, 8 MB of delta; before the sums, 34 MB of tiles while dq runs. The segment sums hold max_segments x 2 x K x D x 4 bytes
(index.py), so they grow with the block size and with the number of documents: 2.2 GB for K 128 there, 4.8 GB for 8 kv heads of 128 and
K 128, 1.3 GB for documents of one token.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..documents import DocumentLayout
from ..launch import launch
from .forward import at_least_16, runs_on_tensor_cores
from .index import InvertedIndex, invert_beside, segment_length

SUM_PIECE = 512
SUM_SEGMENTS = 8


@triton.jit(do_not_specialize=["num_queries"])
def portable_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, o_ptr, indices_ptr, start_ptr, position_ptr, lse_ptr, delta_ptr, dq_ptr, scale, num_queries,
    LISTS: tl.constexpr, KV_HEADS: tl.constexpr, ROWS: tl.constexpr, ROWS_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, TOP_K: tl.constexpr,
    HAS_DELTA: tl.constexpr,
):  # fmt: skip
    """dq of one query and list, and delta where it was not given."""
    program = tl.program_id(0)
    query, which = program % num_queries, program // num_queries
    entry = query.to(tl.int64) * LISTS + which
    start = tl.load(start_ptr + query)
    position = tl.load(position_ptr + query)
    row = tl.arange(0, ROWS_PADDED)
    dim = tl.arange(0, DIM)
    inside = (row < ROWS)[:, None] & (dim < HEAD_DIM)[None, :]
    place = (entry * ROWS + row[:, None]) * HEAD_DIM + dim[None, :]
    q = tl.load(q_ptr + place, mask=inside, other=0.0)
    do = tl.load(do_ptr + place, mask=inside, other=0.0)
    lse = tl.load(lse_ptr + entry * ROWS + row, mask=row < ROWS, other=0.0)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + entry * ROWS + row, mask=row < ROWS, other=0.0)
    else:
        delta = tl.sum(do.to(tl.float32) * tl.load(o_ptr + place, mask=inside, other=0.0).to(tl.float32), 1)
        tl.store(delta_ptr + entry * ROWS + row, delta, mask=row < ROWS)
    acc = tl.zeros([ROWS_PADDED, DIM], tl.float32)
    for slot in range(TOP_K):
        block = tl.load(indices_ptr + entry * TOP_K + slot)
        if (block >= 0) & (block <= position // BLOCK_SIZE):
            key = tl.arange(0, KEYS)
            visible = (key < BLOCK_SIZE) & (block * BLOCK_SIZE + key <= position)
            token = (start + block * BLOCK_SIZE + key).to(tl.int64)
            key_place = (token * KV_HEADS + which // (LISTS // KV_HEADS))[:, None] * HEAD_DIM + dim[None, :]
            key_inside = visible[:, None] & (dim < HEAD_DIM)[None, :]
            k = tl.load(k_ptr + key_place, mask=key_inside, other=0.0)
            v = tl.load(v_ptr + key_place, mask=key_inside, other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            p = tl.where(visible[None, :], tl.exp(s - lse[:, None]), 0.0)
            ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
            acc += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    tl.store(dq_ptr + place, (acc * scale).to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def portable_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, query_key_ptr, choices_ptr, segments_ptr, schedule_ptr, num_segments_ptr,
    block_start_ptr, block_length_ptr, sums_ptr, scale, num_rows,
    LISTS: tl.constexpr, KV_HEADS: tl.constexpr, ROWS: tl.constexpr, ROWS_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """Sums of dk (without its scale) and dv over one segment."""
    if tl.program_id(0) < tl.load(num_segments_ptr):
        segment = tl.load(schedule_ptr + tl.program_id(0))
        bucket = tl.load(segments_ptr + segment * 3)
        begin = tl.load(segments_ptr + segment * 3 + 1)
        length = tl.load(segments_ptr + segment * 3 + 2)
        start = tl.load(block_start_ptr + bucket % num_rows)
        row = tl.arange(0, ROWS_PADDED)
        dim = tl.arange(0, DIM)
        key = tl.arange(0, KEYS)
        key_place = ((start + key).to(tl.int64) * KV_HEADS + bucket // num_rows)[:, None] * HEAD_DIM + dim[None, :]
        key_inside = (key < tl.load(block_length_ptr + bucket % num_rows))[:, None] & (dim < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + key_place, mask=key_inside, other=0.0)
        v = tl.load(v_ptr + key_place, mask=key_inside, other=0.0)
        dk = tl.zeros([KEYS, DIM], tl.float32)
        dv = tl.zeros([KEYS, DIM], tl.float32)
        for i in range(length):
            entry = tl.load(choices_ptr + begin + i) // TOP_K
            own_key = tl.load(query_key_ptr + entry // LISTS)
            place = (entry * ROWS + row[:, None]) * HEAD_DIM + dim[None, :]
            inside = (row < ROWS)[:, None] & (dim < HEAD_DIM)[None, :]
            q = tl.load(q_ptr + place, mask=inside, other=0.0)
            do = tl.load(do_ptr + place, mask=inside, other=0.0)
            lse = tl.load(lse_ptr + entry * ROWS + row, mask=row < ROWS, other=0.0)
            delta = tl.load(delta_ptr + entry * ROWS + row, mask=row < ROWS, other=0.0)
            visible = (key < BLOCK_SIZE) & (start + key <= own_key)
            s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
            p = tl.where(visible[:, None], tl.exp(s - lse[None, :]), 0.0)
            ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
            dv += tl.dot(p.to(do.dtype), do, input_precision="ieee")
            dk += tl.dot(ds.to(q.dtype), q, input_precision="ieee")
        sums_ptr += segment * (2 * KEYS * DIM)
        sum_place = key[:, None] * DIM + dim[None, :]
        tl.store(sums_ptr + sum_place, dk)
        tl.store(sums_ptr + KEYS * DIM + sum_place, dv)


@triton.jit(do_not_specialize=["num_rows"])
def add_segments_kernel(
    sums_ptr, first_segment_ptr, block_start_ptr, block_length_ptr, dk_ptr, dv_ptr, scale, num_rows,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr,
    PIECE: tl.constexpr, SEGMENTS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """PIECE elements of a bucket's dk or dv, from its segments' sums in order; ADD: added to what is there. Grid: (buckets, pieces)."""
    bucket = tl.program_id(0)
    block_row = bucket % num_rows
    length = tl.load(block_length_ptr + block_row)
    if length > 0:
        element = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
        segment = tl.load(first_segment_ptr + bucket)
        end = tl.load(first_segment_ptr + bucket + 1)
        acc = tl.zeros([PIECE], tl.float32)
        for first in range(segment, end, SEGMENTS):
            several = first + tl.arange(0, SEGMENTS)
            place = several.to(tl.int64)[:, None] * (2 * KEYS * DIM) + element[None, :]
            acc += tl.sum(tl.load(sums_ptr + place, mask=(several < end)[:, None], other=0.0), 0)
        key, dim = element // DIM % KEYS, element % DIM
        token = (tl.load(block_start_ptr + block_row) + key).to(tl.int64)
        target = (token * KV_HEADS + bucket // num_rows) * HEAD_DIM + dim
        inside = (key < length) & (dim < HEAD_DIM)
        in_dk, in_dv = inside & (element < KEYS * DIM), inside & (element >= KEYS * DIM)
        dk, dv = acc * scale, acc
        if ADD:
            dk += tl.load(dk_ptr + target, mask=in_dk, other=0.0).to(tl.float32)
            dv += tl.load(dv_ptr + target, mask=in_dv, other=0.0).to(tl.float32)
        tl.store(dk_ptr + target, dk.to(dk_ptr.dtype.element_ty), mask=in_dk)
        tl.store(dv_ptr + target, dv.to(dv_ptr.dtype.element_ty), mask=in_dv)


def sparse_attention_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    o: torch.Tensor | None,
    lse: torch.Tensor,
    do: torch.Tensor,
    layout: DocumentLayout,
    scale: float,
    delta: torch.Tensor | None = None,
    index: Callable[[], InvertedIndex] | None = None,
    add_to: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (dq, dk, dv).

    Args:
        q, k, v, indices, layout, scale: the forward's, all contiguous.
        o, lse: what it returned; o may be None where delta is given.
        do: [tokens, H, D], the output's gradient, contiguous.
        delta: [tokens, H] float32, sum over d of do * o, if another kernel has it already (gate_and_align's backward does).
        index: what `invert_beside` returned, if the caller could start it earlier.
        add_to: contiguous gradients of q, k and v to which these are added in float32, in place, and which are returned.
    """
    if o is None and delta is None:
        raise ValueError("o=None of sparse_attention_backward needs delta; give one of them")
    has_delta = delta is not None
    if not has_delta:
        delta = torch.empty_like(lse)
    rows = q.shape[1] // indices.shape[1]
    index = index or invert_beside(indices, layout, kv_heads=k.shape[1], segment=segment_length(rows))
    dq_into = None if add_to is None else add_to[0]
    if runs_on_tensor_cores(q, layout.block_size, rows):
        from .tensor_core import backward_k_v, backward_q  # here: Gluon cannot be defined under the interpreter

        dq = backward_q(q, k, v, indices, o, lse, do, layout, scale, delta, has_delta, dq_into)
        inverted = index()
        sums = backward_k_v(q, k, v, indices, lse, do, layout, scale, delta, inverted)
    else:
        dq = _portable_q(q, k, v, indices, o, lse, do, layout, scale, delta, has_delta)
        dq = dq if dq_into is None else dq_into.add_(dq)
        inverted = index()
        sums = _portable_k_v(q, k, v, indices, lse, do, layout, scale, delta, inverted)
    dk, dv = add_segments(sums, inverted, k, layout, scale, None if add_to is None else add_to[1:])
    return dq, dk, dv


def add_segments(
    sums: torch.Tensor,
    index: InvertedIndex,
    k: torch.Tensor,
    layout: DocumentLayout,
    scale: float,
    add_to: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (dk, dv) in k's shape and dtype from the segments' sums [segments, 2, keys, padded D], added to `add_to` if that is given."""
    _, kv_heads, head_dim = k.shape
    keys, dim = sums.shape[2:]
    dk, dv = (torch.empty_like(k), torch.empty_like(k)) if add_to is None else add_to
    piece = min(SUM_PIECE, keys * dim)
    launch(
        add_segments_kernel, (kv_heads * layout.num_block_rows, 2 * keys * dim // piece),
        sums, index.first_segment, layout.block_start, layout.block_length, dk, dv, scale, layout.num_block_rows,
        KV_HEADS=kv_heads, HEAD_DIM=head_dim, DIM=dim, KEYS=keys, PIECE=piece, SEGMENTS=SUM_SEGMENTS,
        ADD=add_to is not None,
    )  # fmt: skip
    return dk, dv


def query_keys(layout: DocumentLayout) -> torch.Tensor:
    """Returns int32 [queries]: the token of each query's own key."""
    return layout.query_start + layout.query_position


def _portable_q(q, k, v, indices, o, lse, do, layout, scale, delta, has_delta):
    queries, heads, head_dim = q.shape
    lists, top_k = indices.shape[1:]
    dq = torch.empty_like(q)
    launch(
        portable_dq_kernel, (queries * lists,),
        q, k, v, do, do if o is None else o, indices, layout.query_start, layout.query_position, lse, delta, dq, scale, queries,
        LISTS=lists, KV_HEADS=k.shape[1], ROWS=heads // lists, ROWS_PADDED=at_least_16(heads // lists),
        HEAD_DIM=head_dim, DIM=at_least_16(head_dim), BLOCK_SIZE=layout.block_size, KEYS=at_least_16(layout.block_size),
        TOP_K=top_k, HAS_DELTA=has_delta, num_stages=1,
    )  # fmt: skip
    return dq


def _portable_k_v(q, k, v, indices, lse, do, layout, scale, delta, index):
    _, heads, head_dim = q.shape
    lists, top_k = indices.shape[1:]
    keys, dim = at_least_16(layout.block_size), at_least_16(head_dim)
    sums = torch.empty(index.max_segments, 2, keys, dim, dtype=torch.float32, device=q.device)
    launch(
        portable_dkdv_kernel, (index.max_segments,),
        q, k, v, do, lse, delta, query_keys(layout), index.choices, index.segments, index.schedule, index.num_segments,
        layout.block_start, layout.block_length, sums, scale, layout.num_block_rows,
        LISTS=lists, KV_HEADS=k.shape[1], ROWS=heads // lists, ROWS_PADDED=at_least_16(heads // lists),
        HEAD_DIM=head_dim, DIM=dim, BLOCK_SIZE=layout.block_size, KEYS=keys, TOP_K=top_k, num_stages=1,
    )  # fmt: skip
    return sums
