"""Backward on tensor cores, for 16-bit elements: dQ by queries, dK and dV by segments of the inverted index (Gluon).

With p = exp(s - lse) recomputed, per query t, head h and chosen key j (Dao et al., FlashAttention, arXiv 2205.14135, appendix B):

    delta[h] = sum_d do[h, d] o[h, d]        dp[h, j] = do[h] . v[j]        ds = p (dp - delta)
    dq[h] = scale sum_j ds[h, j] k[j]        dk[j] = scale sum_{t, h} ds[h, j] q[t, h]        dv[j] = sum_{t, h} p[h, j] do[t, h]

dQ. Grid: lists * queries programs of one warp, as in the forward and over the same tiles (V in the order of rows). K is loaded once
and used in both orientations, by movmatrix. Writes delta where it was not given.

dK, dV. Grid: one program per segment of the bound, in the schedule's order; a warp for every 16 keys of the block. Keys are the rows
of the products: s^T = K Q^T, dp^T = V dO^T with K and V fixed in registers, and p^T and ds^T feed dv += p^T dO, dk += ds^T Q from the
registers where they arise (D up to 64; tensor_core_wide.py has the rest). A step takes 16 rows of q (or one list's, if more): one entry of 16 heads, two of 8, 16 of one. Every
program writes its sums in fp32 to a place of its own; backward.py adds up a bucket's places in order. No atomics.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .fragments import (
    LOG2E,
    as_left,
    as_right,
    as_right_transposed,
    halves,
    mma_layout,
    packed_layout,
    store_rows,
    tile_rows,
    to_contraction_order,
    weights_as_left,
    words_layout,
)
from .tensor_core_forward import chosen_tiles, tile_number


@gluon.jit
def _ds_and_keys(
    q, do, k, v, lse, delta, scale_log2, MMA: gl.constexpr, ROWS: gl.constexpr, DIM: gl.constexpr, DTYPE: gl.constexpr
):  # fmt: skip
    """Returns (ds without a mask, K as right operand [16, DIM]) of one tile."""
    zeros = gl.zeros([ROWS, 16], gl.float32, MMA)
    k_words = tile_rows(k, DIM, False)
    s = mma_v2(q, as_right_transposed(k_words, MMA, 16, DIM, DTYPE), zeros)
    p = gl.exp2(s * scale_log2 - lse[:, None])
    dp = mma_v2(do, as_right_transposed(tile_rows(v, DIM, False), MMA, 16, DIM, DTYPE), zeros)
    return p * (dp - delta[:, None]), as_right(k_words, MMA, 16, DIM, DTYPE)


@gluon.jit(do_not_specialize=["num_queries"])
def dq_kernel(
    q_ptr, do_ptr, o_ptr, tiles_ptr, indices_ptr, position_ptr, first_row_ptr, lse_ptr, delta_ptr, dq_ptr,
    scale, scale_log2, num_queries,
    LISTS: gl.constexpr, KV_HEADS: gl.constexpr, ROWS: gl.constexpr, ROWS_PADDED: gl.constexpr,
    HEAD_DIM: gl.constexpr, DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, TOP_K: gl.constexpr, SLOTS: gl.constexpr,
    DTYPE: gl.constexpr, HAS_DELTA: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """dq of one query and list, ADD: added to what is there. q_ptr, do_ptr, o_ptr, tiles_ptr: words."""
    MMA: gl.constexpr = mma_layout(1)
    TILES: gl.constexpr = BLOCK_SIZE // 16
    WORDS: gl.constexpr = 8 * DIM
    STRIDE: gl.constexpr = 2 * WORDS * KV_HEADS
    LAYOUT: gl.constexpr = words_layout(ROWS_PADDED, DIM // 2, ROWS_PADDED)
    program = gl.program_id(0)
    query, which = program % num_queries, program // num_queries
    entry = query.to(gl.int64) * LISTS + which
    indices_ptr += entry * TOP_K
    position = gl.load(position_ptr + query)
    last, own_tile, full, any_block = chosen_tiles(indices_ptr, position, TOP_K, SLOTS, BLOCK_SIZE)
    first_tile = gl.load(first_row_ptr + query).to(gl.int64) * TILES
    tiles_ptr += (first_tile * KV_HEADS + which // (LISTS // KV_HEADS)) * (2 * WORDS)

    row = gl.arange(0, ROWS_PADDED, gl.SliceLayout(1, LAYOUT))
    word = gl.arange(0, DIM // 2, gl.SliceLayout(0, LAYOUT))
    inside = (row < ROWS)[:, None] & (word < HEAD_DIM // 2)[None, :]
    place = entry * (ROWS * HEAD_DIM // 2) + row[:, None] * (HEAD_DIM // 2) + word[None, :]
    q_words = gl.load(q_ptr + place, mask=inside, other=0)
    q = as_left(to_contraction_order(q_words, ROWS_PADDED, DIM), MMA, ROWS_PADDED, DIM, DTYPE)
    do_words = gl.load(do_ptr + place, mask=inside, other=0)
    do = as_left(to_contraction_order(do_words, ROWS_PADDED, DIM), MMA, ROWS_PADDED, DIM, DTYPE)
    head = gl.arange(0, ROWS_PADDED, gl.SliceLayout(1, MMA))
    lse = gl.load(lse_ptr + entry * ROWS + head, mask=head < ROWS, other=0.0) * LOG2E
    if HAS_DELTA:
        delta = gl.load(delta_ptr + entry * ROWS + head, mask=head < ROWS, other=0.0)
    else:
        o_words = gl.load(o_ptr + place, mask=inside, other=0)
        products = halves(do_words, DTYPE).to(gl.float32) * halves(o_words, DTYPE).to(gl.float32)
        delta = gl.sum(gl.reshape(products, [ROWS_PADDED, DIM]), 1)
        delta = gl.convert_layout(delta, gl.SliceLayout(1, MMA), assert_trivial=True)
        gl.store(delta_ptr + entry * ROWS + head, delta, mask=head < ROWS)

    own = tiles_ptr + (last * TILES + own_tile).to(gl.int64) * STRIDE
    offsets = gl.arange(0, WORDS, packed_layout(WORDS))
    k = gl.load(own + offsets)
    v = gl.load(own + WORDS + offsets)
    tile = gl.where(full > 0, tiles_ptr + tile_number(indices_ptr, 0, last, TILES).to(gl.int64) * STRIDE, own)
    number = tile_number(indices_ptr, gl.minimum(1, full - 1), last, TILES)
    ds, k_rows = _ds_and_keys(q, do, k, v, lse, delta, scale_log2, MMA, ROWS_PADDED, DIM, DTYPE)
    k = gl.load(tile + offsets)
    v = gl.load(tile + WORDS + offsets)
    key = last * BLOCK_SIZE + own_tile * 16 + gl.arange(0, 16, gl.SliceLayout(0, MMA))
    ds = gl.where(((key <= position) & any_block)[None, :], ds, 0.0)
    acc = mma_v2(weights_as_left(ds, MMA, DTYPE), k_rows, gl.zeros([ROWS_PADDED, DIM], gl.float32, MMA))
    for i in range(full):
        tile = tiles_ptr + number.to(gl.int64) * STRIDE
        number = tile_number(indices_ptr, gl.minimum(i + 2, full - 1), last, TILES)
        ds, k_rows = _ds_and_keys(q, do, k, v, lse, delta, scale_log2, MMA, ROWS_PADDED, DIM, DTYPE)
        k = gl.load(tile + offsets)
        v = gl.load(tile + WORDS + offsets)
        acc = mma_v2(weights_as_left(ds, MMA, DTYPE), k_rows, acc)
    store_rows(dq_ptr + entry * (ROWS * HEAD_DIM), acc * scale, ROWS, ROWS_PADDED, HEAD_DIM, DIM, ADD)


@gluon.jit
def entries(
    choices_ptr, step, length, TOP_K: gl.constexpr, ROWS: gl.constexpr, SLOT: gl.constexpr, N: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    """Entries of a step's N rows (a scalar if they have but one; past the end the last again), and whether the rows exist."""
    row = gl.arange(0, N, LAYOUT)
    place = step * (N // SLOT) + row // SLOT
    used = (place < length) & (row % SLOT < ROWS)
    if N == SLOT:
        place = step
    return (gl.load(choices_ptr + gl.minimum(place, length - 1)) // TOP_K).to(gl.int32), used


@gluon.jit
def _heads(entry, ROWS: gl.constexpr, SLOT: gl.constexpr, N: gl.constexpr, LAYOUT: gl.constexpr):
    """Heads [N] of entries: rows of the flattened q. Rows of a slot that do not exist repeat the last."""
    row = gl.arange(0, N, LAYOUT) % SLOT
    if ROWS < SLOT:
        row = gl.minimum(row, ROWS - 1)
    return entry.to(gl.int64) * ROWS + row


@gluon.jit
def _load_step(
    q_ptr, do_ptr, lse_ptr, delta_ptr, query_key_ptr, entry, column_entry, used,
    LISTS: gl.constexpr, ROWS: gl.constexpr, SLOT: gl.constexpr, N: gl.constexpr, HEAD_DIM: gl.constexpr, DIM: gl.constexpr,
    LAYOUT: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """Loads a step's rows of q and dO (words), and lse, delta and own key (-1 for rows that do not exist) of each column of s^T."""
    word = gl.arange(0, DIM // 2, gl.SliceLayout(0, LAYOUT))
    place = (_heads(entry, ROWS, SLOT, N, gl.SliceLayout(1, LAYOUT)) * (HEAD_DIM // 2))[:, None] + word[None, :]
    if HEAD_DIM == DIM:
        q_words, do_words = gl.load(q_ptr + place), gl.load(do_ptr + place)
    else:
        inside = (place >= 0) & (word < HEAD_DIM // 2)[None, :]
        q_words, do_words = gl.load(q_ptr + place, mask=inside, other=0), gl.load(do_ptr + place, mask=inside, other=0)
    head = _heads(column_entry, ROWS, SLOT, N, COLUMNS)
    own_key = gl.where(used, gl.load(query_key_ptr + column_entry // LISTS), -1)
    return q_words, do_words, gl.load(lse_ptr + head), gl.load(delta_ptr + head), own_key


@gluon.jit
def _keys(ptr, place, inside, MMA: gl.constexpr, BLOCK_SIZE: gl.constexpr, DIM: gl.constexpr, DTYPE: gl.constexpr):
    """A block's rows of k or v as left operand."""
    words = gl.load(ptr + place, mask=inside, other=0)
    return as_left(to_contraction_order(words, BLOCK_SIZE, DIM), MMA, BLOCK_SIZE, DIM, DTYPE)


@gluon.jit(do_not_specialize=["num_rows"])
def dkdv_kernel(
    q_ptr, do_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, query_key_ptr, choices_ptr, segments_ptr, schedule_ptr, num_segments_ptr,
    block_start_ptr, block_length_ptr, sums_ptr, scale_log2, num_rows,
    LISTS: gl.constexpr, KV_HEADS: gl.constexpr, ROWS: gl.constexpr, SLOT: gl.constexpr, N: gl.constexpr,
    HEAD_DIM: gl.constexpr, DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, TOP_K: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Sums of dk (without its scale) and dv over one segment. q_ptr, do_ptr, k_ptr, v_ptr: words."""
    MMA: gl.constexpr = mma_layout(BLOCK_SIZE // 16)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, MMA)
    KEYS: gl.constexpr = words_layout(BLOCK_SIZE, DIM // 2, 16)
    LAYOUT: gl.constexpr = words_layout(N, DIM // 2, N, BLOCK_SIZE // 16)
    if gl.program_id(0) < gl.load(num_segments_ptr):
        segment = gl.load(schedule_ptr + gl.program_id(0))
        bucket = gl.load(segments_ptr + segment * 3)
        choices_ptr += gl.load(segments_ptr + segment * 3 + 1)
        length = gl.load(segments_ptr + segment * 3 + 2)
        block_row = bucket % num_rows
        start = gl.load(block_start_ptr + block_row)
        key = gl.arange(0, BLOCK_SIZE, gl.SliceLayout(1, KEYS))
        key_word = gl.arange(0, DIM // 2, gl.SliceLayout(0, KEYS))
        key_row = (start + key).to(gl.int64) * KV_HEADS + bucket // num_rows
        key_place = key_row[:, None] * (HEAD_DIM // 2) + key_word[None, :]
        key_inside = (key < gl.load(block_length_ptr + block_row))[:, None] & (key_word < HEAD_DIM // 2)[None, :]
        k = _keys(k_ptr, key_place, key_inside, MMA, BLOCK_SIZE, DIM, DTYPE)
        v = _keys(v_ptr, key_place, key_inside, MMA, BLOCK_SIZE, DIM, DTYPE)
        key_number = start + gl.arange(0, BLOCK_SIZE, gl.SliceLayout(1, MMA))

        entry, _ = entries(choices_ptr, 0, length, TOP_K, ROWS, SLOT, N, gl.SliceLayout(1, LAYOUT))
        column_entry, used = entries(choices_ptr, 0, length, TOP_K, ROWS, SLOT, N, COLUMNS)
        q_words, do_words, lse, delta, own_key = _load_step(
            q_ptr, do_ptr, lse_ptr, delta_ptr, query_key_ptr, entry, column_entry, used,
            LISTS, ROWS, SLOT, N, HEAD_DIM, DIM, LAYOUT, COLUMNS,
        )  # fmt: skip
        entry, _ = entries(choices_ptr, 1, length, TOP_K, ROWS, SLOT, N, gl.SliceLayout(1, LAYOUT))
        column_entry, used = entries(choices_ptr, 1, length, TOP_K, ROWS, SLOT, N, COLUMNS)
        dk = gl.zeros([BLOCK_SIZE, DIM], gl.float32, MMA)
        dv = gl.zeros([BLOCK_SIZE, DIM], gl.float32, MMA)
        zeros = gl.zeros([BLOCK_SIZE, N], gl.float32, MMA)
        for step in range((length + N // SLOT - 1) // (N // SLOT)):
            q_words = to_contraction_order(q_words, N, DIM)
            do_words = to_contraction_order(do_words, N, DIM)
            s = mma_v2(k, as_right_transposed(q_words, MMA, N, DIM, DTYPE), zeros)
            p = gl.exp2(s * scale_log2 - (lse * LOG2E)[None, :])
            p = gl.where(key_number[:, None] <= own_key[None, :], p, 0.0)
            dp = mma_v2(v, as_right_transposed(do_words, MMA, N, DIM, DTYPE), zeros)
            ds = p * (dp - delta[None, :])
            q_rows = as_right(q_words, MMA, N, DIM, DTYPE)
            do_rows = as_right(do_words, MMA, N, DIM, DTYPE)
            q_words, do_words, lse, delta, own_key = _load_step(
                q_ptr, do_ptr, lse_ptr, delta_ptr, query_key_ptr, entry, column_entry, used,
                LISTS, ROWS, SLOT, N, HEAD_DIM, DIM, LAYOUT, COLUMNS,
            )  # fmt: skip
            entry, _ = entries(choices_ptr, step + 2, length, TOP_K, ROWS, SLOT, N, gl.SliceLayout(1, LAYOUT))
            column_entry, used = entries(choices_ptr, step + 2, length, TOP_K, ROWS, SLOT, N, COLUMNS)
            dv = mma_v2(weights_as_left(p, MMA, DTYPE), do_rows, dv)
            dk = mma_v2(weights_as_left(ds, MMA, DTYPE), q_rows, dk)
        sums_ptr += segment * (2 * BLOCK_SIZE * DIM)
        store_rows(sums_ptr, dk, BLOCK_SIZE, BLOCK_SIZE, DIM, DIM)
        store_rows(sums_ptr + BLOCK_SIZE * DIM, dv, BLOCK_SIZE, BLOCK_SIZE, DIM, DIM)
