"""Attention in which each query sees one run of neighbouring keys, forward and backward (Triton): the kernels of both branches.

Query t sees the keys [begin_t, end_t), where

    end_t = base_t + (position_t + 1) // UNIT        begin_t = base_t, or max(base_t, end_t - WINDOW) with a WINDOW

* window: keys are tokens, base is the document's first token, UNIT 1. So a query sees the last WINDOW tokens of its document, itself included.
* compressed: keys are the means of block rows, base is the document's first block row, UNIT the block size, no WINDOW. So a query sees the blocks of
  its document that are complete at its position.

With s = scale q . k over the visible keys, in float32:

    lse = log sum exp s     p = exp(s - lse)     o = sum p v
    delta = do . o          ds = p (do . v - delta)     dq = scale sum ds k     dk = scale sum ds q     dv = sum p do

A query that sees nothing gets o = 0, lse = -inf and no gradient.

Queries ascend, so begin and end never decrease. That bounds the keys of a tile of queries by its first and its last query, and the queries of a tile
of keys by two binary searches. A tile of queries is TILE_ROWS rows: neighbouring tokens with all their heads of one kv head, which share the keys.

Grids: forward and dq, one program per (tile of queries, kv head); dk and dv, one program per (tile of keys, kv head, part of its queries). The queries
of a tile of keys are cut into SPLITS parts, since few block rows are seen by very many queries. Each part's sums have a place of their own; there are
no atomic sums, so results are bit-identical from run to run. They may differ in the last bits with what else is in the batch, since tiles do.
A tile may span documents, and what a mask hides is multiplied by 0. So a NaN can spread to a neighbouring document, which it does in no other operator.

Source: the branches are NSA's (arXiv 2502.11089); the online softmax is FlashAttention-2's (arXiv 2307.08691).
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _range(base_ptr, position_ptr, token, num_queries, UNIT: tl.constexpr, WINDOW: tl.constexpr):
    """Returns the first and last (exclusive) key that a query sees; of one past the end, those of the last query."""
    token = tl.minimum(token, num_queries - 1)
    begin = tl.load(base_ptr + token)
    end = begin + (tl.load(position_ptr + token) + 1) // UNIT
    if WINDOW > 0:
        begin = tl.maximum(begin, end - WINDOW)
    return begin, end


@triton.jit
def _first_query(
    base_ptr, position_ptr, num_queries, search_steps, key, UNIT: tl.constexpr, WINDOW: tl.constexpr, BEGIN: tl.constexpr
):  # fmt: skip
    """Returns the first query whose begin is at least `key` (BEGIN), or whose end is above it; num_queries if there is none."""
    low = num_queries * 0
    high = num_queries
    for _ in range(search_steps):
        middle = (low + high) // 2
        begin, end = _range(base_ptr, position_ptr, middle, num_queries, UNIT, WINDOW)
        reached = (begin >= key) if BEGIN else (end > key)
        reached = reached | (middle >= num_queries)
        low = tl.where(reached, low, tl.minimum(middle + 1, high))
        high = tl.where(reached, middle, high)
    return low


@triton.jit
def _rows(base, limit, num_queries, GROUP_SIZE: tl.constexpr, PADDED_GROUP: tl.constexpr, TILE_ROWS: tl.constexpr):
    """Returns (token, head of the group, whether it exists) of each row of a tile from token `base` on, up to token `limit`."""
    row = tl.arange(0, TILE_ROWS)
    token, head = base + row // PADDED_GROUP, row % PADDED_GROUP
    return token, head, (token < limit) & (head < GROUP_SIZE)


@triton.jit
def _load_rows(
    x_ptr, token, head, valid, kv_head, KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr
):  # fmt: skip
    """Returns the vectors [TILE_ROWS, DIM] of a tile's rows, zeros where a row does not exist."""
    dim = tl.arange(0, DIM)
    vector = (token.to(tl.int64) * KV_HEADS + kv_head) * GROUP_SIZE + head
    inside = valid[:, None] & (dim < HEAD_DIM)[None, :]
    return tl.load(x_ptr + vector[:, None] * HEAD_DIM + dim[None, :], mask=inside, other=0.0)


@triton.jit
def _load_numbers(x_ptr, token, head, valid, kv_head, KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr):
    """Returns one float32 per row, zeros where a row does not exist."""
    return tl.load(x_ptr + (token.to(tl.int64) * KV_HEADS + kv_head) * GROUP_SIZE + head, mask=valid, other=0.0)


@triton.jit
def _load_keys(x_ptr, key, end, kv_head, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """Returns the vectors [TILE_KEYS, DIM] of keys, zeros from `end` on."""
    dim = tl.arange(0, DIM)
    inside = (key < end)[:, None] & (dim < HEAD_DIM)[None, :]
    offsets = (key.to(tl.int64) * KV_HEADS + kv_head)[:, None] * HEAD_DIM + dim[None, :]
    return tl.load(x_ptr + offsets, mask=inside, other=0.0)


@triton.jit
def _tile(
    base_ptr, position_ptr, first, num_queries, UNIT: tl.constexpr, WINDOW: tl.constexpr,
    PADDED_GROUP: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_KEYS: tl.constexpr,
):  # fmt: skip
    """Returns (low, whole, high) of a tile of queries: its keys are [low, high), and every query sees all of [low, whole), in tiles of keys."""
    last = tl.minimum(first + TILE_ROWS // PADDED_GROUP, num_queries) - 1
    low, end = _range(base_ptr, position_ptr, first, num_queries, UNIT, WINDOW)
    begin, high = _range(base_ptr, position_ptr, last, num_queries, UNIT, WINDOW)
    whole = tl.where(begin == low, low + tl.maximum(end - low, 0) // TILE_KEYS * TILE_KEYS, low)
    return low, whole, high


@triton.jit
def _attend(q, k, v, m, total, acc, visible, scale_log2, MASKED: tl.constexpr):
    """Returns the running maximum, sum and output of the online softmax after one tile of keys."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    if MASKED:
        s = tl.where(visible, s, float("-inf"))
    higher = tl.maximum(m, tl.max(s, 1))
    finite = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
    p = tl.exp2(s - finite[:, None])
    shrink = tl.exp2(m - finite)
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return higher, total, acc


@triton.jit(do_not_specialize=["num_queries"])
def range_forward_kernel(
    q_ptr, k_ptr, v_ptr, base_ptr, position_ptr, o_ptr, lse_ptr, num_queries, scale_log2,
    UNIT: tl.constexpr, WINDOW: tl.constexpr, KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_KEYS: tl.constexpr,
):  # fmt: skip
    """o and lse of one tile of queries and kv head; the last tiles, which see most, come first."""
    kv_head = tl.program_id(1)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * (TILE_ROWS // PADDED_GROUP)
    low, whole, high = _tile(
        base_ptr, position_ptr, first, num_queries, UNIT, WINDOW, PADDED_GROUP, TILE_ROWS, TILE_KEYS
    )
    token, head, valid = _rows(first, num_queries, num_queries, GROUP_SIZE, PADDED_GROUP, TILE_ROWS)
    begin, end = _range(base_ptr, position_ptr, token, num_queries, UNIT, WINDOW)
    q = _load_rows(q_ptr, token, head, valid, kv_head, KV_HEADS, GROUP_SIZE, HEAD_DIM, DIM)
    m = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    acc = tl.zeros([TILE_ROWS, DIM], tl.float32)
    for start in range(low, whole, TILE_KEYS):
        key = start + tl.arange(0, TILE_KEYS)
        k = _load_keys(k_ptr, key, high, kv_head, KV_HEADS, HEAD_DIM, DIM)
        v = _load_keys(v_ptr, key, high, kv_head, KV_HEADS, HEAD_DIM, DIM)
        m, total, acc = _attend(q, k, v, m, total, acc, valid[:, None], scale_log2, False)
    for start in range(whole, high, TILE_KEYS):
        key = start + tl.arange(0, TILE_KEYS)
        visible = (key[None, :] >= begin[:, None]) & (key[None, :] < end[:, None])
        k = _load_keys(k_ptr, key, high, kv_head, KV_HEADS, HEAD_DIM, DIM)
        v = _load_keys(v_ptr, key, high, kv_head, KV_HEADS, HEAD_DIM, DIM)
        m, total, acc = _attend(q, k, v, m, total, acc, visible, scale_log2, True)
    some = total > 0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    lse = tl.where(some, (m + tl.log2(tl.where(some, total, 1.0))) * LN2, float("-inf"))
    dim = tl.arange(0, DIM)
    vector = (token.to(tl.int64) * KV_HEADS + kv_head) * GROUP_SIZE + head
    inside = valid[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(o_ptr + vector[:, None] * HEAD_DIM + dim[None, :], acc.to(o_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + vector, lse, mask=valid)


@triton.jit
def _dq(q, k, v, do, lse_log2, delta, acc, visible, scale_log2, MASKED: tl.constexpr):
    """Returns dq (without its scale) after one tile of keys."""
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - lse_log2[:, None])
    if MASKED:
        p = tl.where(visible, p, 0.0)
    ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
    return acc + tl.dot(ds.to(k.dtype), k, input_precision="ieee")


@triton.jit(do_not_specialize=["num_queries"])
def range_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, o_ptr, base_ptr, position_ptr, lse_ptr, delta_ptr, dq_ptr, num_queries, scale, scale_log2,
    UNIT: tl.constexpr, WINDOW: tl.constexpr, KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_KEYS: tl.constexpr,
):  # fmt: skip
    """dq and delta of one tile of queries and kv head."""
    kv_head = tl.program_id(1)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * (TILE_ROWS // PADDED_GROUP)
    low, whole, high = _tile(
        base_ptr, position_ptr, first, num_queries, UNIT, WINDOW, PADDED_GROUP, TILE_ROWS, TILE_KEYS
    )
    token, head, valid = _rows(first, num_queries, num_queries, GROUP_SIZE, PADDED_GROUP, TILE_ROWS)
    begin, end = _range(base_ptr, position_ptr, token, num_queries, UNIT, WINDOW)
    q = _load_rows(q_ptr, token, head, valid, kv_head, KV_HEADS, GROUP_SIZE, HEAD_DIM, DIM)
    do = _load_rows(do_ptr, token, head, valid, kv_head, KV_HEADS, GROUP_SIZE, HEAD_DIM, DIM)
    o = _load_rows(o_ptr, token, head, valid, kv_head, KV_HEADS, GROUP_SIZE, HEAD_DIM, DIM)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    lse_log2 = _load_numbers(lse_ptr, token, head, valid, kv_head, KV_HEADS, GROUP_SIZE) / LN2
    lse_log2 = tl.where(lse_log2 == float("-inf"), 0.0, lse_log2)
    acc = tl.zeros([TILE_ROWS, DIM], tl.float32)
    for start in range(low, whole, TILE_KEYS):
        key = start + tl.arange(0, TILE_KEYS)
        k = _load_keys(k_ptr, key, high, kv_head, KV_HEADS, HEAD_DIM, DIM)
        v = _load_keys(v_ptr, key, high, kv_head, KV_HEADS, HEAD_DIM, DIM)
        acc = _dq(q, k, v, do, lse_log2, delta, acc, valid[:, None], scale_log2, False)
    for start in range(whole, high, TILE_KEYS):
        key = start + tl.arange(0, TILE_KEYS)
        visible = (key[None, :] >= begin[:, None]) & (key[None, :] < end[:, None])
        k = _load_keys(k_ptr, key, high, kv_head, KV_HEADS, HEAD_DIM, DIM)
        v = _load_keys(v_ptr, key, high, kv_head, KV_HEADS, HEAD_DIM, DIM)
        acc = _dq(q, k, v, do, lse_log2, delta, acc, visible, scale_log2, True)
    dim = tl.arange(0, DIM)
    vector = (token.to(tl.int64) * KV_HEADS + kv_head) * GROUP_SIZE + head
    inside = valid[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(dq_ptr + vector[:, None] * HEAD_DIM + dim[None, :], (acc * scale).to(dq_ptr.dtype.element_ty), mask=inside)
    tl.store(delta_ptr + vector, delta, mask=valid)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "search_steps"])
def range_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, base_ptr, position_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    num_queries, num_keys, search_steps, scale, scale_log2,
    UNIT: tl.constexpr, WINDOW: tl.constexpr, KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_KEYS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Sums of dk and dv of one tile of keys and kv head over one part of its queries: dk and dv are [SPLITS, keys, G, D]."""
    kv_head, split = tl.program_id(1), tl.program_id(2)
    start = tl.program_id(0) * TILE_KEYS
    key = start + tl.arange(0, TILE_KEYS)
    TOKENS: tl.constexpr = TILE_ROWS // PADDED_GROUP
    low = _first_query(base_ptr, position_ptr, num_queries, search_steps, start, UNIT, WINDOW, False)
    high = _first_query(base_ptr, position_ptr, num_queries, search_steps, start + TILE_KEYS, UNIT, WINDOW, True)
    part = tl.cdiv(tl.cdiv(high - low, TOKENS), SPLITS) * TOKENS
    low += split * part
    high = tl.minimum(low + part, high)
    k = _load_keys(k_ptr, key, num_keys, kv_head, KV_HEADS, HEAD_DIM, DIM)
    v = _load_keys(v_ptr, key, num_keys, kv_head, KV_HEADS, HEAD_DIM, DIM)
    dk = tl.zeros([TILE_KEYS, DIM], tl.float32)
    dv = tl.zeros([TILE_KEYS, DIM], tl.float32)
    for first in range(low, high, TOKENS):
        token, head, valid = _rows(first, high, num_queries, GROUP_SIZE, PADDED_GROUP, TILE_ROWS)
        begin, end = _range(base_ptr, position_ptr, token, num_queries, UNIT, WINDOW)
        visible = (key[:, None] >= begin[None, :]) & (key[:, None] < end[None, :]) & valid[None, :]
        q = _load_rows(q_ptr, token, head, valid, kv_head, KV_HEADS, GROUP_SIZE, HEAD_DIM, DIM)
        do = _load_rows(do_ptr, token, head, valid, kv_head, KV_HEADS, GROUP_SIZE, HEAD_DIM, DIM)
        lse_log2 = _load_numbers(lse_ptr, token, head, valid, kv_head, KV_HEADS, GROUP_SIZE) / LN2
        delta = _load_numbers(delta_ptr, token, head, valid, kv_head, KV_HEADS, GROUP_SIZE)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2
        p = tl.where(visible, tl.exp2(s - lse_log2[None, :]), 0.0)
        ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
        dv += tl.dot(p.to(do.dtype), do, input_precision="ieee")
        dk += tl.dot(ds.to(q.dtype), q, input_precision="ieee")
    dim = tl.arange(0, DIM)
    place = (split.to(tl.int64) * num_keys + key) * KV_HEADS + kv_head
    inside = (key < num_keys)[:, None] & (dim < HEAD_DIM)[None, :]
    offsets = place[:, None] * HEAD_DIM + dim[None, :]
    tl.store(dk_ptr + offsets, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + offsets, dv.to(dv_ptr.dtype.element_ty), mask=inside)


@triton.jit
def means_kernel(
    k_ptr, v_ptr, start_ptr, length_ptr, mean_k_ptr, mean_v_ptr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PADDED_BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Means of k and v over one block row and kv head, summed in float32; 0 for an unused block row."""
    block_row, kv_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.load(length_ptr + block_row)
    token, dim = tl.load(start_ptr + block_row).to(tl.int64) + tl.arange(0, PADDED_BLOCK_SIZE), tl.arange(0, DIM)
    inside = (tl.arange(0, PADDED_BLOCK_SIZE) < length)[:, None] & (dim < HEAD_DIM)[None, :]
    offsets = (token * tl.num_programs(1) + kv_head)[:, None] * HEAD_DIM + dim[None, :]
    out = (block_row.to(tl.int64) * tl.num_programs(1) + kv_head) * HEAD_DIM + dim
    k = tl.load(k_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    count = tl.maximum(length, 1)
    tl.store(mean_k_ptr + out, (tl.sum(k, 0) / count).to(mean_k_ptr.dtype.element_ty), mask=dim < HEAD_DIM)
    tl.store(mean_v_ptr + out, (tl.sum(v, 0) / count).to(mean_v_ptr.dtype.element_ty), mask=dim < HEAD_DIM)


@triton.jit(do_not_specialize=["num_block_rows"])
def means_backward_kernel(
    sums_k_ptr, sums_v_ptr, start_ptr, length_ptr, dk_ptr, dv_ptr, num_block_rows,
    SPLITS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PADDED_BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block row and kv head from the parts' sums of its means' gradients, in order. Every token lies in one block row."""
    block_row, kv_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.load(length_ptr + block_row)
    token, dim = tl.load(start_ptr + block_row).to(tl.int64) + tl.arange(0, PADDED_BLOCK_SIZE), tl.arange(0, DIM)
    inside = (tl.arange(0, PADDED_BLOCK_SIZE) < length)[:, None] & (dim < HEAD_DIM)[None, :]
    dk = tl.zeros([DIM], tl.float32)
    dv = tl.zeros([DIM], tl.float32)
    for split in range(SPLITS):
        place = block_row.to(tl.int64) + split * num_block_rows
        offsets = (place * tl.num_programs(1) + kv_head) * HEAD_DIM + dim
        dk += tl.load(sums_k_ptr + offsets, mask=dim < HEAD_DIM, other=0.0)
        dv += tl.load(sums_v_ptr + offsets, mask=dim < HEAD_DIM, other=0.0)
    count = tl.maximum(length, 1)
    offsets = (token * tl.num_programs(1) + kv_head)[:, None] * HEAD_DIM + dim[None, :]
    dk = tl.broadcast_to((dk / count)[None, :], [PADDED_BLOCK_SIZE, DIM])
    dv = tl.broadcast_to((dv / count)[None, :], [PADDED_BLOCK_SIZE, DIM])
    tl.store(dk_ptr + offsets, dk.to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + offsets, dv.to(dv_ptr.dtype.element_ty), mask=inside)
