"""Attention for decoding (Triton): over the chosen blocks, or over all keys by splits whose results are combined.

    o[h] = sum_j 2^(x[h, j] - lse[h]) v[j],   x[h, j] = scale log2(e) q[h] . k[j],   lse[h] = log2 sum_j 2^x[h, j]

over the visible keys j, those up to the query's own position. The heads of a group are the rows of a tensor-core tile, so a key is read
once for all of them; in full mode the rows are the heads of all new tokens.

* `chosen_kernel`, one program per (list, new token): folds the slices' candidates into the choice (select_triton.py) and attends to it, CHUNK
  keys at a time with a running maximum. 16 blocks of 16 keys are one chunk: all of their loads are in flight at once.
* `split_kernel`, one program per (split, list x tile of rows, sequence): the splits share a sequence's blocks evenly, whatever its length, and
  write o without its division, the maximum and the sum.
* `combine_kernel`, one program per query head: adds the splits in their order, so the result is the same every time.

Pages lie anywhere, so a tile of keys is gathered block by block (INDEXED: key by key); keys past a query's position are neither read nor counted.
"""

import triton
import triton.language as tl

from .pages_triton import (
    let_next_start,
    page_of_block,
    query_offsets,
    query_position,
    rows_of_tile,
    sequence_state,
    wait_for_previous,
)
from .select_triton import choose

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _keys_of_blocks(
    k_ptr, v_ptr, page_table_ptr, key_table_ptr, sequence, blocks, kv_head, last, blocks_per_sequence, num_pages, row_keys,
    PAGED: tl.constexpr, INDEXED: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Returns (position, k, v) of the keys of `blocks` up to position `last`: [n], [n, DIM] twice, n = blocks x KEYS.

    Positions of what is not a key are 2^31 - 1, and its k and v are 0.
    """
    NUM: tl.constexpr = blocks.shape[0] * KEYS
    page = page_of_block(page_table_ptr, sequence, blocks, blocks >= 0, blocks_per_sequence, num_pages, PAGED)
    key = tl.arange(0, KEYS)
    position = blocks[:, None] * BLOCK_SIZE + key[None, :]
    visible = (blocks >= 0)[:, None] & (key < BLOCK_SIZE)[None, :] & (position <= last)
    position = tl.reshape(tl.where(visible, position, 2147483647), [NUM])
    at = page[:, None] * BLOCK_SIZE + key[None, :]
    if INDEXED:
        place = tl.load(key_table_ptr + at, mask=visible, other=0)
        at = sequence.to(tl.int64) * row_keys + tl.minimum(tl.maximum(place, 0), row_keys - 1)
    at = tl.reshape(at * KV_HEADS + kv_head, [NUM])
    dim = tl.arange(0, DIM)
    offsets = at[:, None] * HEAD_DIM + dim[None, :]
    inside = (position <= last)[:, None] & (dim < HEAD_DIM)[None, :]
    return position, tl.load(k_ptr + offsets, mask=inside, other=0.0), tl.load(v_ptr + offsets, mask=inside, other=0.0)


@triton.jit
def _attend(q, k, v, position, own_position, scale_log2, top, total, acc):
    """Returns (top, total, acc) with the keys included that lie at or before each row's own position."""
    x = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    x = tl.where(position[None, :] <= own_position[:, None], x, float("-inf"))
    higher = tl.maximum(top, tl.max(x, 1))
    p = tl.exp2(x - higher[:, None])
    shrink = tl.exp2(top - higher)
    acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return higher, total * shrink + tl.sum(p, 1), acc


@triton.jit
def _store(o_ptr, lse_ptr, at, valid, top, total, acc, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """Writes o and lse (natural logarithm) of rows at the offsets `at` of o; 0 and -inf for rows without keys."""
    dim = tl.arange(0, DIM)
    o = acc / tl.where(total > 0, total, 1.0)[:, None]
    lse = tl.where(total > 0, (top + tl.log2(tl.where(total > 0, total, 1.0))) * LN2, float("-inf"))
    tl.store(
        o_ptr + at[:, None] + dim[None, :],
        o.to(o_ptr.dtype.element_ty),
        mask=valid[:, None] & (dim < HEAD_DIM)[None, :],
    )
    tl.store(lse_ptr + at // HEAD_DIM, lse, mask=valid)


@triton.jit(do_not_specialize=["most", "blocks_per_sequence", "num_pages", "row_keys", "slices"])
def chosen_kernel(
    q_ptr, k_ptr, v_ptr, seq_lens_ptr, num_new_ptr, page_table_ptr, key_table_ptr, best_ptr, o_ptr, lse_ptr,
    scale_log2, most, blocks_per_sequence, num_pages, row_keys, slices,
    NUM_NEW: tl.constexpr, RAGGED: tl.constexpr, PAGED: tl.constexpr, INDEXED: tl.constexpr, LISTS: tl.constexpr,
    LISTS_PER_KV_HEAD: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TOP_K: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SLOTS: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr, SLICE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """o and lse of one new token and list over its chosen blocks, STEP blocks at a time. Grid: (lists, sequences x new tokens)."""
    chosen_list, sequence, t = tl.program_id(0), tl.program_id(1) // NUM_NEW, tl.program_id(1) % NUM_NEW
    length, new = sequence_state(seq_lens_ptr, num_new_ptr, sequence, most, NUM_NEW, RAGGED)
    own_position = query_position(length, new, t)
    head, dim = tl.arange(0, ROWS), tl.arange(0, DIM)
    at = query_offsets(t * HEADS + head, sequence, chosen_list, NUM_NEW, LISTS, HEADS, HEAD_DIM)
    valid = head < HEADS
    top = tl.full([ROWS], -1e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    inside = (valid & (own_position >= 0))[:, None] & (dim < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + at[:, None] + dim[None, :], mask=inside, other=0.0)
    wait_for_previous(OVERLAP)
    if own_position >= 0:
        entry = (sequence.to(tl.int64) * LISTS + chosen_list) * NUM_NEW + t
        chosen = choose(best_ptr, entry, own_position // BLOCK_SIZE, slices, TOP_K, SLOTS, CHUNK, SLICE)
        rows = tl.full([ROWS], 0, tl.int32) + own_position
        for first in range(0, TOP_K, STEP):
            if STEP == SLOTS:
                blocks = chosen
            else:
                wanted = (first + tl.arange(0, STEP))[:, None] == tl.arange(0, SLOTS)[None, :]
                blocks = tl.max(tl.where(wanted, chosen[None, :], -1), 1)
            position, k, v = _keys_of_blocks(
                k_ptr, v_ptr, page_table_ptr, key_table_ptr, sequence, blocks, chosen_list // LISTS_PER_KV_HEAD, own_position,
                blocks_per_sequence, num_pages, row_keys, PAGED, INDEXED, LISTS // LISTS_PER_KV_HEAD, HEAD_DIM, DIM, BLOCK_SIZE, KEYS,
            )  # fmt: skip
            top, total, acc = _attend(q, k, v, position, rows, scale_log2, top, total, acc)
    _store(o_ptr, lse_ptr, at, valid, top, total, acc, HEAD_DIM, DIM)


@triton.jit(do_not_specialize=["most", "blocks_per_sequence", "num_pages", "row_keys"])
def split_kernel(
    q_ptr, k_ptr, v_ptr, seq_lens_ptr, num_new_ptr, page_table_ptr, key_table_ptr, part_ptr, top_ptr, total_ptr,
    scale_log2, most, blocks_per_sequence, num_pages, row_keys,
    NUM_NEW: tl.constexpr, RAGGED: tl.constexpr, PAGED: tl.constexpr, INDEXED: tl.constexpr, KV_HEADS: tl.constexpr, HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """part[split, b, t, head, DIM], top and total of one split. Grid: (splits, kv heads x tiles of rows, sequences)."""
    let_next_start(OVERLAP)
    split, sequence = tl.program_id(0), tl.program_id(2)
    kv_head = tl.program_id(1) % KV_HEADS
    length, new = sequence_state(seq_lens_ptr, num_new_ptr, sequence, most, NUM_NEW, RAGGED)
    row, own_position, has_query = rows_of_tile(length, new, tl.program_id(1) // KV_HEADS * ROWS, NUM_NEW, HEADS, ROWS)
    own_position = tl.where(has_query, own_position, -1)
    last = tl.max(own_position, 0)
    steps = (last // BLOCK_SIZE + STEP) // STEP  # of STEP blocks
    per_split = (steps + tl.num_programs(0) - 1) // tl.num_programs(0)
    dim = tl.arange(0, DIM)
    at = query_offsets(row, sequence, kv_head, NUM_NEW, KV_HEADS, HEADS, HEAD_DIM)
    q = tl.load(q_ptr + at[:, None] + dim[None, :], mask=has_query[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    top = tl.full([ROWS], -1e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    end = tl.where(last < 0, 0, tl.minimum((split + 1) * per_split, steps))
    for step in tl.range(split * per_split, end, num_stages=STAGES):
        blocks = step * STEP + tl.arange(0, STEP)
        blocks = tl.where(blocks * BLOCK_SIZE <= last, blocks, -1)
        position, k, v = _keys_of_blocks(
            k_ptr, v_ptr, page_table_ptr, key_table_ptr, sequence, blocks, kv_head, last, blocks_per_sequence, num_pages, row_keys,
            PAGED, INDEXED, KV_HEADS, HEAD_DIM, DIM, BLOCK_SIZE, KEYS,
        )  # fmt: skip
        top, total, acc = _attend(q, k, v, position, own_position, scale_log2, top, total, acc)
    rows_in_all = tl.num_programs(2).to(tl.int64) * (NUM_NEW * KV_HEADS * HEADS)
    out = split * rows_in_all + at // HEAD_DIM
    inside = row < NUM_NEW * HEADS
    tl.store(part_ptr + out[:, None] * DIM + dim[None, :], acc, mask=inside[:, None])
    tl.store(top_ptr + out, top, mask=inside)
    tl.store(total_ptr + out, total, mask=inside)


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    part_ptr,
    top_ptr,
    total_ptr,
    o_ptr,
    lse_ptr,
    splits,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """o and lse of one query head from all splits. Grid: (sequences x new tokens x heads)."""
    wait_for_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    split, dim = tl.arange(0, SPLITS), tl.arange(0, DIM)
    at = split.to(tl.int64) * tl.num_programs(0) + row
    inside = split < splits
    tops = tl.load(top_ptr + at, mask=inside, other=-1e38)
    totals = tl.load(total_ptr + at, mask=inside, other=0.0)
    top = tl.max(tops, 0)
    weight = tl.exp2(tops - top)
    total = tl.sum(totals * weight, 0)
    parts = tl.load(part_ptr + at[:, None] * DIM + dim[None, :], mask=inside[:, None], other=0.0)
    o = tl.sum(parts * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    lse = tl.where(total > 0, (top + tl.log2(tl.where(total > 0, total, 1.0))) * LN2, float("-inf"))
    tl.store(o_ptr + row * HEAD_DIM + dim, o.to(o_ptr.dtype.element_ty), mask=dim < HEAD_DIM)
    tl.store(lse_ptr + row, lse)
