"""Backward on tensor cores, for 16-bit elements: dQ by queries, dK and dV by segments of the inverted index (Gluon).

With p = exp(s - lse) recomputed, per query t, head h and chosen key j (Dao et al., FlashAttention, arXiv 2205.14135, appendix B):

    delta[h] = sum_d do[h, d] o[h, d]        dp[h, j] = do[h] . v[j]        ds = p (dp - delta)
    dq[h] = scale sum_j ds[h, j] k[j]        dk[j] = scale sum_{t, h} ds[h, j] q[t, h]        dv[j] = sum_{t, h} p[h, j] do[t, h]

dQ. Grid: lists * queries programs of one warp, as in the forward and over the same tiles, with V in the order of rows. K is loaded once and
used in both orientations, by movmatrix. The kernel writes delta if it was not given.

dK, dV. Grid: one program per segment of the bound, in the schedule's order, with a warp per 16 keys of the block. Keys are the rows of the
products: s^T = K Q^T and dp^T = V dO^T with K and V fixed in registers. p^T and ds^T feed dv += p^T dO and dk += ds^T Q from the registers
in which they were computed (D up to 64; wide_heads.py serves wider heads). A step takes 16 rows of q, or one entry's if those are more: one
entry of 16 heads, two of 8, 16 of one. Every program writes its sums in float32 to its own place, and segment_sums.py adds up a
bucket's places in order. There are no atomics.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .fragments import (
    LOG2E,
    as_left,
    as_right,
    as_right_transposed,
    dot_of_rows,
    mma_layout,
    store_rows,
    tile_rows,
    to_contraction_order,
    weights_as_left,
    words_layout,
)
from .query import load_packed, own_tile_mask, query_of_program, tile_number, vector_words
from .segment import entries, head_of_row, segment_of_program


@gluon.jit
def _ds_and_keys(
    q, do, k, v, lse, delta, scale_log2, MMA: gl.constexpr, PADDED_HEADS: gl.constexpr, DIM: gl.constexpr, DTYPE: gl.constexpr
):  # fmt: skip
    """Returns (unmasked ds, K as right operand [16, DIM]) of one tile."""
    zeros = gl.zeros([PADDED_HEADS, 16], gl.float32, MMA)
    k_words = tile_rows(k, DIM, False)
    s = mma_v2(q, as_right_transposed(k_words, MMA, 16, DIM, DTYPE), zeros)
    p = gl.exp2(s * scale_log2 - lse[:, None])
    dp = mma_v2(do, as_right_transposed(tile_rows(v, DIM, False), MMA, 16, DIM, DTYPE), zeros)
    return p * (dp - delta[:, None]), as_right(k_words, MMA, 16, DIM, DTYPE)


@gluon.jit(do_not_specialize=["num_queries"])
def dq_kernel(
    q_ptr, do_ptr, o_ptr, tiles_ptr, indices_ptr, position_ptr, first_block_row_ptr, lse_ptr, delta_ptr, dq_ptr,
    scale, scale_log2, num_queries,
    LISTS: gl.constexpr, KV_HEADS: gl.constexpr, HEADS: gl.constexpr, PADDED_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr, DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, TOP_K: gl.constexpr, PADDED_TOP_K: gl.constexpr,
    DTYPE: gl.constexpr, HAS_DELTA: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """dq of one query and list. ADD: added to the present values. q_ptr, do_ptr, o_ptr and tiles_ptr point to words."""
    MMA: gl.constexpr = mma_layout(1)
    TILES: gl.constexpr = BLOCK_SIZE // 16
    WORDS: gl.constexpr = 8 * DIM
    STRIDE: gl.constexpr = 2 * WORDS * KV_HEADS
    entry, position, tiles_ptr, indices_ptr, last, own_tile, full, any_block = query_of_program(
        tiles_ptr, indices_ptr, position_ptr, first_block_row_ptr, num_queries,
        LISTS, KV_HEADS, DIM, BLOCK_SIZE, TOP_K, PADDED_TOP_K,
    )  # fmt: skip
    place, inside = vector_words(entry, HEADS, PADDED_HEADS, HEAD_DIM, DIM)
    q_words = gl.load(q_ptr + place, mask=inside, other=0)
    q = as_left(to_contraction_order(q_words, PADDED_HEADS, DIM), MMA, PADDED_HEADS, DIM, DTYPE)
    do_words = gl.load(do_ptr + place, mask=inside, other=0)
    do = as_left(to_contraction_order(do_words, PADDED_HEADS, DIM), MMA, PADDED_HEADS, DIM, DTYPE)
    head = gl.arange(0, PADDED_HEADS, gl.SliceLayout(1, MMA))
    lse = gl.load(lse_ptr + entry * HEADS + head, mask=head < HEADS, other=0.0) * LOG2E
    if HAS_DELTA:
        delta = gl.load(delta_ptr + entry * HEADS + head, mask=head < HEADS, other=0.0)
    else:
        o_words = gl.load(o_ptr + place, mask=inside, other=0)
        delta = dot_of_rows(do_words, o_words, PADDED_HEADS, DIM, DTYPE)
        delta = gl.convert_layout(delta, gl.SliceLayout(1, MMA), assert_trivial=True)
        gl.store(delta_ptr + entry * HEADS + head, delta, mask=head < HEADS)

    own = tiles_ptr + (last * TILES + own_tile).to(gl.int64) * STRIDE
    k = load_packed(own, DIM)
    v = load_packed(own + WORDS, DIM)
    tile = gl.where(full > 0, tiles_ptr + tile_number(indices_ptr, 0, last, TILES).to(gl.int64) * STRIDE, own)
    number = tile_number(indices_ptr, gl.minimum(1, full - 1), last, TILES)
    ds, k_rows = _ds_and_keys(q, do, k, v, lse, delta, scale_log2, MMA, PADDED_HEADS, DIM, DTYPE)
    k = load_packed(tile, DIM)
    v = load_packed(tile + WORDS, DIM)
    visible = own_tile_mask(last, own_tile, position, any_block, BLOCK_SIZE, gl.SliceLayout(0, MMA))
    ds = gl.where(visible[None, :], ds, 0.0)
    acc = mma_v2(weights_as_left(ds, MMA, DTYPE), k_rows, gl.zeros([PADDED_HEADS, DIM], gl.float32, MMA))
    for i in range(full):
        tile = tiles_ptr + number.to(gl.int64) * STRIDE
        number = tile_number(indices_ptr, gl.minimum(i + 2, full - 1), last, TILES)
        ds, k_rows = _ds_and_keys(q, do, k, v, lse, delta, scale_log2, MMA, PADDED_HEADS, DIM, DTYPE)
        k = load_packed(tile, DIM)
        v = load_packed(tile + WORDS, DIM)
        acc = mma_v2(weights_as_left(ds, MMA, DTYPE), k_rows, acc)
    store_rows(dq_ptr + entry * (HEADS * HEAD_DIM), acc * scale, HEADS, PADDED_HEADS, HEAD_DIM, DIM, ADD)


@gluon.jit
def _load_step(
    q_ptr, do_ptr, lse_ptr, delta_ptr, query_key_ptr, entry, column_entry, used,
    LISTS: gl.constexpr, HEADS: gl.constexpr, ENTRY_ROWS: gl.constexpr, STEP_ROWS: gl.constexpr, HEAD_DIM: gl.constexpr, DIM: gl.constexpr,
    LAYOUT: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """Returns a step's rows of q and dO as words, and lse, delta and own key (-1 for unused rows) of each column of s^T."""
    word = gl.arange(0, DIM // 2, gl.SliceLayout(0, LAYOUT))
    vector = entry.to(gl.int64) * HEADS + head_of_row(HEADS, ENTRY_ROWS, STEP_ROWS, gl.SliceLayout(1, LAYOUT))
    place = (vector * (HEAD_DIM // 2))[:, None] + word[None, :]
    if HEAD_DIM == DIM:
        q_words, do_words = gl.load(q_ptr + place), gl.load(do_ptr + place)
    else:
        inside = (place >= 0) & (word < HEAD_DIM // 2)[None, :]
        q_words, do_words = gl.load(q_ptr + place, mask=inside, other=0), gl.load(do_ptr + place, mask=inside, other=0)
    column_vector = column_entry.to(gl.int64) * HEADS + head_of_row(HEADS, ENTRY_ROWS, STEP_ROWS, COLUMNS)
    own_key = gl.where(used, gl.load(query_key_ptr + column_entry // LISTS), -1)
    return q_words, do_words, gl.load(lse_ptr + column_vector), gl.load(delta_ptr + column_vector), own_key


@gluon.jit
def _keys(ptr, place, inside, MMA: gl.constexpr, BLOCK_SIZE: gl.constexpr, DIM: gl.constexpr, DTYPE: gl.constexpr):
    """Returns a block's rows of k or v as left operand."""
    words = gl.load(ptr + place, mask=inside, other=0)
    return as_left(to_contraction_order(words, BLOCK_SIZE, DIM), MMA, BLOCK_SIZE, DIM, DTYPE)


@gluon.jit(do_not_specialize=["num_block_rows"])
def dkdv_kernel(
    q_ptr, do_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, query_key_ptr, choices_ptr, segments_ptr, schedule_ptr, num_segments_ptr,
    block_start_ptr, block_length_ptr, sums_ptr, scale_log2, num_block_rows,
    LISTS: gl.constexpr, KV_HEADS: gl.constexpr, HEADS: gl.constexpr, ENTRY_ROWS: gl.constexpr, STEP_ROWS: gl.constexpr,
    HEAD_DIM: gl.constexpr, DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, TOP_K: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Sums of dk (without its scale) and dv over one segment. q_ptr, do_ptr, k_ptr and v_ptr point to words."""
    MMA: gl.constexpr = mma_layout(BLOCK_SIZE // 16)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, MMA)
    KEYS: gl.constexpr = words_layout(BLOCK_SIZE, DIM // 2, 16)
    LAYOUT: gl.constexpr = words_layout(STEP_ROWS, DIM // 2, STEP_ROWS, BLOCK_SIZE // 16)
    if gl.program_id(0) < gl.load(num_segments_ptr):
        segment, bucket, begin, length = segment_of_program(segments_ptr, schedule_ptr)
        choices_ptr += begin
        block_row = bucket % num_block_rows
        start = gl.load(block_start_ptr + block_row)
        key = gl.arange(0, BLOCK_SIZE, gl.SliceLayout(1, KEYS))
        key_word = gl.arange(0, DIM // 2, gl.SliceLayout(0, KEYS))
        key_row = (start + key).to(gl.int64) * KV_HEADS + bucket // num_block_rows
        key_place = key_row[:, None] * (HEAD_DIM // 2) + key_word[None, :]
        key_inside = (key < gl.load(block_length_ptr + block_row))[:, None] & (key_word < HEAD_DIM // 2)[None, :]
        k = _keys(k_ptr, key_place, key_inside, MMA, BLOCK_SIZE, DIM, DTYPE)
        v = _keys(v_ptr, key_place, key_inside, MMA, BLOCK_SIZE, DIM, DTYPE)
        key_number = start + gl.arange(0, BLOCK_SIZE, gl.SliceLayout(1, MMA))

        entry, _ = entries(choices_ptr, 0, length, TOP_K, HEADS, ENTRY_ROWS, STEP_ROWS, gl.SliceLayout(1, LAYOUT))
        column_entry, used = entries(choices_ptr, 0, length, TOP_K, HEADS, ENTRY_ROWS, STEP_ROWS, COLUMNS)
        q_words, do_words, lse, delta, own_key = _load_step(
            q_ptr, do_ptr, lse_ptr, delta_ptr, query_key_ptr, entry, column_entry, used,
            LISTS, HEADS, ENTRY_ROWS, STEP_ROWS, HEAD_DIM, DIM, LAYOUT, COLUMNS,
        )  # fmt: skip
        entry, _ = entries(choices_ptr, 1, length, TOP_K, HEADS, ENTRY_ROWS, STEP_ROWS, gl.SliceLayout(1, LAYOUT))
        column_entry, used = entries(choices_ptr, 1, length, TOP_K, HEADS, ENTRY_ROWS, STEP_ROWS, COLUMNS)
        dk = gl.zeros([BLOCK_SIZE, DIM], gl.float32, MMA)
        dv = gl.zeros([BLOCK_SIZE, DIM], gl.float32, MMA)
        zeros = gl.zeros([BLOCK_SIZE, STEP_ROWS], gl.float32, MMA)
        for step in range((length + STEP_ROWS // ENTRY_ROWS - 1) // (STEP_ROWS // ENTRY_ROWS)):
            q_words = to_contraction_order(q_words, STEP_ROWS, DIM)
            do_words = to_contraction_order(do_words, STEP_ROWS, DIM)
            s = mma_v2(k, as_right_transposed(q_words, MMA, STEP_ROWS, DIM, DTYPE), zeros)
            p = gl.exp2(s * scale_log2 - (lse * LOG2E)[None, :])
            p = gl.where(key_number[:, None] <= own_key[None, :], p, 0.0)
            dp = mma_v2(v, as_right_transposed(do_words, MMA, STEP_ROWS, DIM, DTYPE), zeros)
            ds = p * (dp - delta[None, :])
            q_rows = as_right(q_words, MMA, STEP_ROWS, DIM, DTYPE)
            do_rows = as_right(do_words, MMA, STEP_ROWS, DIM, DTYPE)
            q_words, do_words, lse, delta, own_key = _load_step(
                q_ptr, do_ptr, lse_ptr, delta_ptr, query_key_ptr, entry, column_entry, used,
                LISTS, HEADS, ENTRY_ROWS, STEP_ROWS, HEAD_DIM, DIM, LAYOUT, COLUMNS,
            )  # fmt: skip
            entry, _ = entries(
                choices_ptr, step + 2, length, TOP_K, HEADS, ENTRY_ROWS, STEP_ROWS, gl.SliceLayout(1, LAYOUT)
            )
            column_entry, used = entries(choices_ptr, step + 2, length, TOP_K, HEADS, ENTRY_ROWS, STEP_ROWS, COLUMNS)
            dv = mma_v2(weights_as_left(p, MMA, DTYPE), do_rows, dv)
            dk = mma_v2(weights_as_left(ds, MMA, DTYPE), q_rows, dk)
        sums_ptr += segment * (2 * BLOCK_SIZE * DIM)
        store_rows(sums_ptr, dk, BLOCK_SIZE, BLOCK_SIZE, DIM, DIM)
        store_rows(sums_ptr + BLOCK_SIZE * DIM, dv, BLOCK_SIZE, BLOCK_SIZE, DIM, DIM)
