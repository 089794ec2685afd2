"""Forward and dQ on tensor cores for at most 8 heads per list: keys are the rows of the products (Gluon).

The mathematics of forward.py and backward.py with every product transposed:

    s^T = K q^T      o^T = V^T p^T      dp^T = V do^T      dq^T = K^T ds^T

mma.m16n8k16 has 16 rows and 8 columns. With heads as rows, 4 heads would leave three quarters of each instruction, and of the registers of
q, dO and the accumulators, empty. With heads as columns they leave half. At D 128 that is the difference between 255 registers per thread,
with 8 warps per multiprocessor, and fewer than 180. The keys' fragments are the same registers: a right operand of K^T is a left operand of
K. Only p^T and ds^T are computed as accumulators and needed as right operands, which takes one movmatrix per 8 keys.

Grid, order of tiles, reference maximum, restart and the division by the sum of the rounded weights are those of forward.py.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .fragments import (
    LN2,
    LOG2E,
    as_left,
    as_right_transposed,
    dot_of_rows,
    left,
    mma_layout,
    ones_as_left,
    store_columns,
    tile_columns,
    tile_rows,
    to_contraction_order,
    turned,
    weights_as_right,
)
from .query import load_packed, own_tile_mask, query_of_program, tile_number, vector_words

COLUMNS = gl.constexpr(8)  # of the instruction: the heads of a list, padded


@gluon.jit
def _scores(tile, x, MMA: gl.constexpr, DIM: gl.constexpr, DTYPE: gl.constexpr):
    """Returns the products [16 keys, 8 heads] of a tile's rows with the heads' x, a right operand [DIM, 8]."""
    keys = as_left(tile_rows(tile, DIM, True), MMA, 16, DIM, DTYPE)
    return mma_v2(keys, x, gl.zeros([16, COLUMNS], gl.float32, MMA))


@gluon.jit
def _values(tile, MMA: gl.constexpr, DIM: gl.constexpr, DTYPE: gl.constexpr):
    """Returns V^T of a tile as left operand [DIM, 16]."""
    return left(tile_columns(tile, DIM, DTYPE, True), MMA)


@gluon.jit
def _lane_sums(p):
    """Returns the sums [8, 8] over the two keys that a lane holds, of weights [16, 8]."""
    return gl.sum(gl.reshape(p, [2, 8, COLUMNS]), 0)


@gluon.jit
def _of_own_tile(p, v, MMA: gl.constexpr, DIM: gl.constexpr, DTYPE: gl.constexpr):
    """Returns l, the sums of the rounded weights [16, 8] (equal rows) and acc [DIM, 8] of the own tile's weights p."""
    weights = weights_as_right(p, MMA, 16, COLUMNS, DTYPE)
    rounded = mma_v2(ones_as_left(MMA, DTYPE), weights, gl.zeros([16, COLUMNS], gl.float32, MMA))
    acc = mma_v2(_values(v, MMA, DIM, DTYPE), weights, gl.zeros([DIM, COLUMNS], gl.float32, MMA))
    return _lane_sums(p), rounded, acc


@gluon.jit
def _add_full_tiles(
    q, m, l, rounded, acc, tiles_ptr, indices_ptr, last, full, scale_log2,
    MMA: gl.constexpr, DIM: gl.constexpr, TILES: gl.constexpr, STRIDE: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Returns l [8, 8] (not yet summed over lanes), the rounded weights' sums [16, 8] and acc [DIM, 8], with the full tiles added."""
    if full > 0:
        WORDS: gl.constexpr = 8 * DIM
        tile = tiles_ptr + tile_number(indices_ptr, 0, last, TILES).to(gl.int64) * STRIDE
        k = load_packed(tile, DIM)
        v = load_packed(tile + WORDS, DIM)
        number = tile_number(indices_ptr, gl.minimum(1, full - 1), last, TILES)
        for i in range(full):
            tile = tiles_ptr + number.to(gl.int64) * STRIDE
            number = tile_number(indices_ptr, gl.minimum(i + 2, full - 1), last, TILES)
            s = _scores(k, q, MMA, DIM, DTYPE)
            k = load_packed(tile, DIM)
            p = gl.exp2(s * scale_log2 - m[None, :])
            l += _lane_sums(p)
            weights = weights_as_right(p, MMA, 16, COLUMNS, DTYPE)
            rounded = mma_v2(ones_as_left(MMA, DTYPE), weights, rounded)
            acc = mma_v2(_values(v, MMA, DIM, DTYPE), weights, acc)
            v = load_packed(tile + WORDS, DIM)
    return l, rounded, acc


@gluon.jit(do_not_specialize=["num_queries"])
def forward_kernel(
    q_ptr, tiles_ptr, indices_ptr, position_ptr, first_block_row_ptr, o_ptr, lse_ptr, scale_log2, num_queries,
    LISTS: gl.constexpr, KV_HEADS: gl.constexpr, HEADS: gl.constexpr, PADDED_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr, DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, TOP_K: gl.constexpr, PADDED_TOP_K: gl.constexpr,
    DTYPE: gl.constexpr, LIMIT: gl.constexpr,
):  # fmt: skip
    """o and lse of one query and list. q_ptr and tiles_ptr point to words. PADDED_HEADS is 8."""
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
    q = as_right_transposed(to_contraction_order(q_words, PADDED_HEADS, DIM), MMA, PADDED_HEADS, DIM, DTYPE)

    own = tiles_ptr + (last * TILES + own_tile).to(gl.int64) * STRIDE
    k = load_packed(own, DIM)
    v = load_packed(own + WORDS, DIM)
    visible = own_tile_mask(last, own_tile, position, any_block, BLOCK_SIZE, gl.SliceLayout(1, MMA))
    s_own = _scores(k, q, MMA, DIM, DTYPE)
    s_own = gl.where(visible[:, None], s_own * scale_log2, float("-inf"))
    m = gl.max(s_own, 0)
    m = gl.where(m == float("-inf"), 0.0, m)
    p = gl.exp2(s_own - m[None, :])
    l, rounded, acc = _of_own_tile(p, v, MMA, DIM, DTYPE)
    l, rounded, acc = _add_full_tiles(
        q, m, l, rounded, acc, tiles_ptr, indices_ptr, last, full, scale_log2, MMA, DIM, TILES, STRIDE, DTYPE
    )
    total = gl.convert_layout(gl.sum(l, 0), gl.SliceLayout(0, MMA), assert_trivial=True)

    if gl.max(gl.where(total < LIMIT, 0, 1), 0) > 0:  # rare: again, with the exact maximum
        for i in range(full):
            tile = tiles_ptr + tile_number(indices_ptr, i, last, TILES).to(gl.int64) * STRIDE
            m = gl.maximum(m, gl.max(_scores(load_packed(tile, DIM), q, MMA, DIM, DTYPE) * scale_log2, 0))
        p = gl.exp2(s_own - m[None, :])
        v = load_packed(own + WORDS, DIM)
        l, rounded, acc = _of_own_tile(p, v, MMA, DIM, DTYPE)
        l, rounded, acc = _add_full_tiles(
            q, m, l, rounded, acc, tiles_ptr, indices_ptr, last, full, scale_log2, MMA, DIM, TILES, STRIDE, DTYPE
        )
        total = gl.convert_layout(gl.sum(l, 0), gl.SliceLayout(0, MMA), assert_trivial=True)

    rounded = gl.max(rounded, 0)  # all rows are equal
    acc = acc * (1.0 / gl.where(total > 0, rounded, 1.0))[None, :]
    store_columns(o_ptr + entry * (HEADS * HEAD_DIM), acc, HEADS, PADDED_HEADS, HEAD_DIM, DIM)
    head = gl.arange(0, PADDED_HEADS, gl.SliceLayout(0, MMA))
    gl.store(lse_ptr + entry * HEADS + head, (m + gl.log2(total)) * LN2, mask=head < HEADS)


@gluon.jit
def _ds_and_keys(q, do, k, v, lse, delta, scale_log2, MMA: gl.constexpr, DIM: gl.constexpr, DTYPE: gl.constexpr):
    """Returns (unmasked ds^T, K^T as left operand [DIM, 16]) of one tile."""
    p = gl.exp2(_scores(k, q, MMA, DIM, DTYPE) * scale_log2 - lse[None, :])
    ds = p * (_scores(v, do, MMA, DIM, DTYPE) - delta[None, :])
    return ds, left(turned(tile_rows(k, DIM, True), 16, DIM, DTYPE), MMA)


@gluon.jit
def _ds_and_keys_of(tile, q, do, lse, delta, scale_log2, MMA: gl.constexpr, DIM: gl.constexpr, DTYPE: gl.constexpr):
    """Returns the same of the tile at an address. V is loaded and used before K: from D 256 on registers hold one of them."""
    dp = _scores(load_packed(tile + 8 * DIM, DIM), do, MMA, DIM, DTYPE)
    k = load_packed(tile, DIM)
    p = gl.exp2(_scores(k, q, MMA, DIM, DTYPE) * scale_log2 - lse[None, :])
    return p * (dp - delta[None, :]), left(turned(tile_rows(k, DIM, True), 16, DIM, DTYPE), MMA)


@gluon.jit(do_not_specialize=["num_queries"])
def dq_kernel(
    q_ptr, do_ptr, o_ptr, tiles_ptr, indices_ptr, position_ptr, first_block_row_ptr, lse_ptr, delta_ptr, dq_ptr,
    scale, scale_log2, num_queries,
    LISTS: gl.constexpr, KV_HEADS: gl.constexpr, HEADS: gl.constexpr, PADDED_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr, DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, TOP_K: gl.constexpr, PADDED_TOP_K: gl.constexpr,
    DTYPE: gl.constexpr, HAS_DELTA: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """dq of one query and list. ADD: added to the present values. Pointers to q, dO, O and tiles point to words. PADDED_HEADS is 8."""
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
    do_words = gl.load(do_ptr + place, mask=inside, other=0)
    q = as_right_transposed(to_contraction_order(q_words, PADDED_HEADS, DIM), MMA, PADDED_HEADS, DIM, DTYPE)
    do = as_right_transposed(to_contraction_order(do_words, PADDED_HEADS, DIM), MMA, PADDED_HEADS, DIM, DTYPE)
    head = gl.arange(0, PADDED_HEADS, gl.SliceLayout(0, MMA))
    lse = gl.load(lse_ptr + entry * HEADS + head, mask=head < HEADS, other=0.0) * LOG2E
    if HAS_DELTA:
        delta = gl.load(delta_ptr + entry * HEADS + head, mask=head < HEADS, other=0.0)
    else:
        o_words = gl.load(o_ptr + place, mask=inside, other=0)
        delta = dot_of_rows(do_words, o_words, PADDED_HEADS, DIM, DTYPE)
        delta = gl.convert_layout(delta, gl.SliceLayout(0, MMA))
        gl.store(delta_ptr + entry * HEADS + head, delta, mask=head < HEADS)

    own = tiles_ptr + (last * TILES + own_tile).to(gl.int64) * STRIDE
    zeros = gl.zeros([DIM, PADDED_HEADS], gl.float32, MMA)
    visible = own_tile_mask(last, own_tile, position, any_block, BLOCK_SIZE, gl.SliceLayout(1, MMA))
    if DIM <= 128:
        k = load_packed(own, DIM)
        v = load_packed(own + WORDS, DIM)
        tile = gl.where(full > 0, tiles_ptr + tile_number(indices_ptr, 0, last, TILES).to(gl.int64) * STRIDE, own)
        number = tile_number(indices_ptr, gl.minimum(1, full - 1), last, TILES)
        ds, keys = _ds_and_keys(q, do, k, v, lse, delta, scale_log2, MMA, DIM, DTYPE)
        k = load_packed(tile, DIM)
        v = load_packed(tile + WORDS, DIM)
        ds = gl.where(visible[:, None], ds, 0.0)
        acc = mma_v2(keys, weights_as_right(ds, MMA, 16, COLUMNS, DTYPE), zeros)
        for i in range(full):
            tile = tiles_ptr + number.to(gl.int64) * STRIDE
            number = tile_number(indices_ptr, gl.minimum(i + 2, full - 1), last, TILES)
            ds, keys = _ds_and_keys(q, do, k, v, lse, delta, scale_log2, MMA, DIM, DTYPE)
            k = load_packed(tile, DIM)
            v = load_packed(tile + WORDS, DIM)
            acc = mma_v2(keys, weights_as_right(ds, MMA, 16, COLUMNS, DTYPE), acc)
    else:
        ds, keys = _ds_and_keys_of(own, q, do, lse, delta, scale_log2, MMA, DIM, DTYPE)
        ds = gl.where(visible[:, None], ds, 0.0)
        acc = mma_v2(keys, weights_as_right(ds, MMA, 16, COLUMNS, DTYPE), zeros)
        number = tile_number(indices_ptr, 0, last, TILES)
        for i in range(full):
            tile = tiles_ptr + number.to(gl.int64) * STRIDE
            number = tile_number(indices_ptr, gl.minimum(i + 1, full - 1), last, TILES)
            ds, keys = _ds_and_keys_of(tile, q, do, lse, delta, scale_log2, MMA, DIM, DTYPE)
            acc = mma_v2(keys, weights_as_right(ds, MMA, 16, COLUMNS, DTYPE), acc)
    store_columns(dq_ptr + entry * (HEADS * HEAD_DIM), acc * scale, HEADS, PADDED_HEADS, HEAD_DIM, DIM, ADD)
