"""The sparse stream's portable kernels, forward and backward (Triton): for everything that tensor_core/ does not support.

That is AMD's GPUs, float32, other block sizes, more heads per list or features per head, and Triton's interpreter on a CPU, where the tests
run them.
They are written to be read. The forward uses an online softmax (m is the running maximum):

    m' = max(m, max_j s)    l' = l exp(m - m') + sum_j exp(s - m')    acc' = acc exp(m - m') + sum_j exp(s - m') v    o = acc / l

The backward's formulas are in tensor_core/backward.py.

Grids: forward and dq, one program per (query, list); dk and dv, one program per segment of the inverted index (index.py) and part of the
block. A query without blocks gets o = 0 and lse = -inf. HEADS are the query heads of one list and DIM the head dim, both padded for tl.dot.
KEYS is the block size, padded, or the part of a block that registers hold at a time.
"""

import torch
import triton
import triton.language as tl

from ..documents import DocumentLayout
from ..launch import launch, next_power_of_2
from .index import InvertedIndex

TILE_ELEMENTS = 8192  # of a tile of keys or values: more spill
DKDV_ELEMENTS = 4096  # the same where dk and dv are summed beside them


@triton.jit
def _query_of_program(start_ptr, position_ptr, num_queries, LISTS: tl.constexpr):
    """Returns (entry, list, first token of the query's document, the query's position in it)."""
    program = tl.program_id(0)
    query, chosen_list = program % num_queries, program // num_queries
    entry = query.to(tl.int64) * LISTS + chosen_list
    return entry, chosen_list, tl.load(start_ptr + query), tl.load(position_ptr + query)


@triton.jit
def _vector_offsets(entry, HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """Returns the offsets [PADDED_HEADS, DIM] of an entry's heads in q, and their mask."""
    head = tl.arange(0, PADDED_HEADS)
    dim = tl.arange(0, DIM)
    inside = (head < HEADS)[:, None] & (dim < HEAD_DIM)[None, :]
    return (entry * HEADS + head[:, None]) * HEAD_DIM + dim[None, :], inside


@triton.jit
def _load_keys(
    k_ptr, v_ptr, first, kv_head, mask,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Returns k and v [KEYS, DIM] of one kv head from token `first` on, zeros outside the mask."""
    token = (first + tl.arange(0, KEYS)).to(tl.int64)
    dim = tl.arange(0, DIM)
    offsets = (token * KV_HEADS + kv_head)[:, None] * HEAD_DIM + dim[None, :]
    inside = mask[:, None] & (dim < HEAD_DIM)[None, :]
    return tl.load(k_ptr + offsets, mask=inside, other=0.0), tl.load(v_ptr + offsets, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["num_queries"])
def portable_forward_kernel(
    q_ptr, k_ptr, v_ptr, indices_ptr, start_ptr, position_ptr, o_ptr, lse_ptr, scale, num_queries,
    LISTS: tl.constexpr, KV_HEADS: tl.constexpr, HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """o and lse of one query and list."""
    entry, chosen_list, start, position = _query_of_program(start_ptr, position_ptr, num_queries, LISTS)
    head = tl.arange(0, PADDED_HEADS)
    offsets, inside = _vector_offsets(entry, HEADS, PADDED_HEADS, HEAD_DIM, DIM)
    q = tl.load(q_ptr + offsets, mask=inside, other=0.0)
    m = tl.full([PADDED_HEADS], float("-inf"), tl.float32)
    total = tl.zeros([PADDED_HEADS], tl.float32)
    acc = tl.zeros([PADDED_HEADS, DIM], tl.float32)
    for slot in range(TOP_K):
        block = tl.load(indices_ptr + entry * TOP_K + slot)
        if (block >= 0) & (block <= position // BLOCK_SIZE):
            kv_head = chosen_list // (LISTS // KV_HEADS)
            for part in range(0, tl.minimum(BLOCK_SIZE, position - block * BLOCK_SIZE + 1), KEYS):
                key = part + tl.arange(0, KEYS)
                visible = (key < BLOCK_SIZE) & (block * BLOCK_SIZE + key <= position)
                first = start + block * BLOCK_SIZE + part
                k, v = _load_keys(k_ptr, v_ptr, first, kv_head, visible, KV_HEADS, HEAD_DIM, KEYS, DIM)
                s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
                s = tl.where(visible[None, :], s, float("-inf"))
                higher = tl.maximum(m, tl.max(s, 1))
                p = tl.exp(s - higher[:, None])
                shrink = tl.exp(m - higher)
                total = total * shrink + tl.sum(p, 1)
                acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
                m = higher
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(o_ptr + offsets, acc.to(o_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + entry * HEADS + head, m + tl.log(total), mask=head < HEADS)


@triton.jit(do_not_specialize=["num_queries"])
def portable_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, o_ptr, indices_ptr, start_ptr, position_ptr, lse_ptr, delta_ptr, dq_ptr, scale, num_queries,
    LISTS: tl.constexpr, KV_HEADS: tl.constexpr, HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, TOP_K: tl.constexpr,
    HAS_DELTA: tl.constexpr,
):  # fmt: skip
    """dq of one query and list, and delta if it was not given."""
    entry, chosen_list, start, position = _query_of_program(start_ptr, position_ptr, num_queries, LISTS)
    head = tl.arange(0, PADDED_HEADS)
    offsets, inside = _vector_offsets(entry, HEADS, PADDED_HEADS, HEAD_DIM, DIM)
    q = tl.load(q_ptr + offsets, mask=inside, other=0.0)
    do = tl.load(do_ptr + offsets, mask=inside, other=0.0)
    lse = tl.load(lse_ptr + entry * HEADS + head, mask=head < HEADS, other=0.0)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + entry * HEADS + head, mask=head < HEADS, other=0.0)
    else:
        delta = tl.sum(do.to(tl.float32) * tl.load(o_ptr + offsets, mask=inside, other=0.0).to(tl.float32), 1)
        tl.store(delta_ptr + entry * HEADS + head, delta, mask=head < HEADS)
    acc = tl.zeros([PADDED_HEADS, DIM], tl.float32)
    for slot in range(TOP_K):
        block = tl.load(indices_ptr + entry * TOP_K + slot)
        if (block >= 0) & (block <= position // BLOCK_SIZE):
            kv_head = chosen_list // (LISTS // KV_HEADS)
            for part in range(0, tl.minimum(BLOCK_SIZE, position - block * BLOCK_SIZE + 1), KEYS):
                key = part + tl.arange(0, KEYS)
                visible = (key < BLOCK_SIZE) & (block * BLOCK_SIZE + key <= position)
                first = start + block * BLOCK_SIZE + part
                k, v = _load_keys(k_ptr, v_ptr, first, kv_head, visible, KV_HEADS, HEAD_DIM, KEYS, DIM)
                s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
                p = tl.where(visible[None, :], tl.exp(s - lse[:, None]), 0.0)
                ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
                acc += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    tl.store(dq_ptr + offsets, (acc * scale).to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_block_rows"])
def portable_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, query_key_ptr, choices_ptr, segments_ptr, schedule_ptr, num_segments_ptr,
    block_start_ptr, block_length_ptr, sums_ptr, scale, num_block_rows,
    LISTS: tl.constexpr, KV_HEADS: tl.constexpr, HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """Sums of dk (without its scale) and dv over one segment, of KEYS keys. Grid: (segments of the bound, parts of a block)."""
    if tl.program_id(0) < tl.load(num_segments_ptr):
        segment = tl.load(schedule_ptr + tl.program_id(0))
        bucket = tl.load(segments_ptr + segment * 3)
        begin = tl.load(segments_ptr + segment * 3 + 1)
        length = tl.load(segments_ptr + segment * 3 + 2)
        start = tl.load(block_start_ptr + bucket % num_block_rows)
        head = tl.arange(0, PADDED_HEADS)
        part = tl.program_id(1) * KEYS
        key = part + tl.arange(0, KEYS)
        in_block = key < tl.load(block_length_ptr + bucket % num_block_rows)
        k, v = _load_keys(k_ptr, v_ptr, start + part, bucket // num_block_rows, in_block, KV_HEADS, HEAD_DIM, KEYS, DIM)
        dk = tl.zeros([KEYS, DIM], tl.float32)
        dv = tl.zeros([KEYS, DIM], tl.float32)
        for i in range(length):
            entry = tl.load(choices_ptr + begin + i) // TOP_K
            own_key = tl.load(query_key_ptr + entry // LISTS)
            offsets, inside = _vector_offsets(entry, HEADS, PADDED_HEADS, HEAD_DIM, DIM)
            q = tl.load(q_ptr + offsets, mask=inside, other=0.0)
            do = tl.load(do_ptr + offsets, mask=inside, other=0.0)
            lse = tl.load(lse_ptr + entry * HEADS + head, mask=head < HEADS, other=0.0)
            delta = tl.load(delta_ptr + entry * HEADS + head, mask=head < HEADS, other=0.0)
            visible = (key < BLOCK_SIZE) & (start + key <= own_key)
            s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
            p = tl.where(visible[:, None], tl.exp(s - lse[None, :]), 0.0)
            ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
            dv += tl.dot(p.to(do.dtype), do, input_precision="ieee")
            dk += tl.dot(ds.to(q.dtype), q, input_precision="ieee")
        block_keys = tl.num_programs(1) * KEYS
        sums_ptr += segment * (2 * block_keys * DIM)
        offsets = key[:, None] * DIM + tl.arange(0, DIM)[None, :]
        tl.store(sums_ptr + offsets, dk)
        tl.store(sums_ptr + block_keys * DIM + offsets, dv)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, layout: DocumentLayout, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (o, lse); contiguous arguments as in `sparse_attention`, with the layout built."""
    queries, heads, _ = q.shape
    o = torch.empty_like(q)
    lse = torch.empty(queries, heads, dtype=torch.float32, device=q.device)
    launch(
        portable_forward_kernel, (queries * indices.shape[1],),
        q, k, v, indices, layout.query_start, layout.query_position, o, lse, scale, queries,
        **_sizes(q, k, indices, layout), num_stages=1,
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
    queries = q.shape[0]
    dq = torch.empty_like(q)
    launch(
        portable_dq_kernel, (queries * indices.shape[1],),
        q, k, v, do, do if o is None else o, indices, layout.query_start, layout.query_position, lse, delta, dq, scale, queries,
        **_sizes(q, k, indices, layout), HAS_DELTA=has_delta, num_stages=1,
    )  # fmt: skip
    return dq if add_to is None else add_to.add_(dq)


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
    """Returns the segments' sums, float32 [segments, 2 (dk without its scale, dv), padded K, padded D]."""
    sizes, keys = _sizes(q, k, indices, layout), _padded(layout.block_size)
    sums = torch.empty(index.max_segments, 2, keys, sizes["DIM"], dtype=torch.float32, device=q.device)
    sizes["KEYS"] = min(sizes["KEYS"], max(16, DKDV_ELEMENTS // sizes["DIM"]))
    launch(
        portable_dkdv_kernel, (index.max_segments, keys // sizes["KEYS"]),
        q, k, v, do, lse, delta, layout.query_keys, index.choices, index.segments, index.schedule, index.num_segments,
        layout.block_start, layout.block_length, sums, scale, layout.num_block_rows,
        **sizes, num_stages=1,
    )  # fmt: skip
    return sums


def _sizes(q: torch.Tensor, k: torch.Tensor, indices: torch.Tensor, layout: DocumentLayout) -> dict[str, int]:
    """Returns the sizes that all portable kernels take."""
    heads_per_list = q.shape[1] // indices.shape[1]
    return {
        "LISTS": indices.shape[1],
        "KV_HEADS": k.shape[1],
        "HEADS": heads_per_list,
        "PADDED_HEADS": _padded(heads_per_list),
        "HEAD_DIM": q.shape[2],
        "DIM": _padded(q.shape[2]),
        "BLOCK_SIZE": layout.block_size,
        "KEYS": min(_padded(layout.block_size), max(16, TILE_ELEMENTS // _padded(q.shape[2]))),
        "TOP_K": indices.shape[2],
    }


def _padded(size: int) -> int:
    """Returns the smallest power of two that holds `size`, at least 16, as tl.dot requires."""
    return max(16, next_power_of_2(size))
