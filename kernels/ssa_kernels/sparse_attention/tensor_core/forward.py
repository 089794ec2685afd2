"""Forward on tensor cores, for 16-bit elements: one warp per (query, list), tiles of 16 keys loaded straight into registers (Gluon).

For query t, the heads h of a list (which share one kv head) and the chosen keys J:

    s[h, j] = scale q[h] . k[j]      m[h] = max of s over the tile that holds the query's own key
    p = exp(s - m)      l[h] = sum_j p[h, j]      o[h] = sum_j p'[h, j] v[j] / sum_j p'[h, j]      lse[h] = m[h] + log l[h]

p' is p rounded to 16 bits for the product with V. o is divided by the sum of p', not by l: the weights that multiply V then add up to 1.
Divided by l, a query with one dominant key would get o = (1 + e) v with the rounding error e of that key's weight. The backward's delta =
rowsum(dO O) would inherit it, and dq the error e delta times the mean key. The exact maximum as reference hides this, because it makes the
dominant weight exactly 1; the own tile's maximum does not. The sum of p' is one more product per tile, with a column of ones.

The own tile comes first. It is the only one that needs the causal mask, and its maximum is the reference m of all tiles, so the loop
rescales nothing. Any reference gives the same o and lse unless something overflows, which takes a later logit that exceeds m by more than
LIMIT allows. The sum shows it (l not below LIMIT, NaN included); the query then starts again with the exact maximum of all its logits.
Smaller logits may underflow, as they do under the exact maximum: the own tile alone makes l >= 1.

Grid: lists * queries programs of one warp, the list outermost: neighbouring programs share a kv head, whose tiles then fill L1 and L2. Each
tile is loaded during the work on the one before it, and its number one step earlier still. A query without any block (all -1) gets o = 0
and lse = -inf. A program reads nothing of other queries, so results do not depend on the batch.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .fragments import (
    LN2,
    as_left,
    as_right_transposed,
    mma_layout,
    ones_as_right,
    right,
    store_rows,
    tile_columns,
    tile_rows,
    to_contraction_order,
    weights_as_left,
)
from .query import load_packed, own_tile_mask, query_of_program, tile_number, vector_words


@gluon.jit
def _values(tile, MMA: gl.constexpr, DIM: gl.constexpr, DTYPE: gl.constexpr):
    """Returns V of a tile as right operand [16, DIM]."""
    return right(gl.permute(tile_columns(tile, DIM, DTYPE, False), [1, 0]), MMA)


@gluon.jit
def _lane_sums(p, PADDED_HEADS: gl.constexpr):
    """Returns the sums [PADDED_HEADS, 4] over the keys that a lane holds, of weights [PADDED_HEADS, 16]. Two registers per 16 heads."""
    return gl.sum(gl.sum(gl.reshape(p, [PADDED_HEADS, 2, 4, 2]), 3), 1)


@gluon.jit
def _of_own_tile(p, v, MMA: gl.constexpr, PADDED_HEADS: gl.constexpr, DIM: gl.constexpr, DTYPE: gl.constexpr):
    """Returns l, the sums of the rounded weights [PADDED_HEADS, 8] (equal columns) and acc of the own tile's weights p."""
    weights = weights_as_left(p, MMA, DTYPE)
    rounded = mma_v2(weights, ones_as_right(MMA, DTYPE), gl.zeros([PADDED_HEADS, 8], gl.float32, MMA))
    acc = mma_v2(weights, _values(v, MMA, DIM, DTYPE), gl.zeros([PADDED_HEADS, DIM], gl.float32, MMA))
    return _lane_sums(p, PADDED_HEADS), rounded, acc


@gluon.jit
def _add_full_tiles(
    q, m, l, rounded, acc, tiles_ptr, indices_ptr, last, full, scale_log2,
    MMA: gl.constexpr, PADDED_HEADS: gl.constexpr, DIM: gl.constexpr, TILES: gl.constexpr, STRIDE: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Returns l [PADDED_HEADS, 4] (not yet summed over lanes), the sums of the rounded weights and acc, with the full tiles added."""
    if full > 0:
        WORDS: gl.constexpr = 8 * DIM
        tile = tiles_ptr + tile_number(indices_ptr, 0, last, TILES).to(gl.int64) * STRIDE
        k = load_packed(tile, DIM)
        v = load_packed(tile + WORDS, DIM)
        number = tile_number(indices_ptr, gl.minimum(1, full - 1), last, TILES)
        for i in range(full):
            tile = tiles_ptr + number.to(gl.int64) * STRIDE
            number = tile_number(indices_ptr, gl.minimum(i + 2, full - 1), last, TILES)
            k_t = as_right_transposed(tile_rows(k, DIM, False), MMA, 16, DIM, DTYPE)
            s = mma_v2(q, k_t, gl.zeros([PADDED_HEADS, 16], gl.float32, MMA))
            k = load_packed(tile, DIM)
            p = gl.exp2(s * scale_log2 - m[:, None])
            l += _lane_sums(p, PADDED_HEADS)
            weights = weights_as_left(p, MMA, DTYPE)
            rounded = mma_v2(weights, ones_as_right(MMA, DTYPE), rounded)
            acc = mma_v2(weights, _values(v, MMA, DIM, DTYPE), acc)
            v = load_packed(tile + WORDS, DIM)
    return l, rounded, acc


@gluon.jit(do_not_specialize=["num_queries"])
def forward_kernel(
    q_ptr, tiles_ptr, indices_ptr, position_ptr, first_block_row_ptr, o_ptr, lse_ptr, scale_log2, num_queries,
    LISTS: gl.constexpr, KV_HEADS: gl.constexpr, HEADS: gl.constexpr, PADDED_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr, DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, TOP_K: gl.constexpr, PADDED_TOP_K: gl.constexpr,
    DTYPE: gl.constexpr, LIMIT: gl.constexpr,
):  # fmt: skip
    """o and lse of one query and list. q_ptr and tiles_ptr point to words."""
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

    own = tiles_ptr + (last * TILES + own_tile).to(gl.int64) * STRIDE
    k = load_packed(own, DIM)
    v = load_packed(own + WORDS, DIM)
    visible = own_tile_mask(last, own_tile, position, any_block, BLOCK_SIZE, gl.SliceLayout(0, MMA))
    k_t = as_right_transposed(tile_rows(k, DIM, False), MMA, 16, DIM, DTYPE)
    s_own = mma_v2(q, k_t, gl.zeros([PADDED_HEADS, 16], gl.float32, MMA))
    s_own = gl.where(visible[None, :], s_own * scale_log2, float("-inf"))
    m = gl.max(s_own, 1)
    m = gl.where(m == float("-inf"), 0.0, m)
    p = gl.exp2(s_own - m[:, None])
    l, rounded, acc = _of_own_tile(p, v, MMA, PADDED_HEADS, DIM, DTYPE)
    l, rounded, acc = _add_full_tiles(
        q,
        m,
        l,
        rounded,
        acc,
        tiles_ptr,
        indices_ptr,
        last,
        full,
        scale_log2,
        MMA,
        PADDED_HEADS,
        DIM,
        TILES,
        STRIDE,
        DTYPE,
    )
    total = gl.convert_layout(gl.sum(l, 1), gl.SliceLayout(1, MMA), assert_trivial=True)

    if gl.max(gl.where(total < LIMIT, 0, 1), 0) > 0:  # rare: again, with the exact maximum
        for i in range(full):
            tile = tiles_ptr + tile_number(indices_ptr, i, last, TILES).to(gl.int64) * STRIDE
            k_t = as_right_transposed(tile_rows(load_packed(tile, DIM), DIM, False), MMA, 16, DIM, DTYPE)
            s = mma_v2(q, k_t, gl.zeros([PADDED_HEADS, 16], gl.float32, MMA))
            m = gl.maximum(m, gl.max(s * scale_log2, 1))
        p = gl.exp2(s_own - m[:, None])
        v = load_packed(own + WORDS, DIM)
        l, rounded, acc = _of_own_tile(p, v, MMA, PADDED_HEADS, DIM, DTYPE)
        l, rounded, acc = _add_full_tiles(
            q,
            m,
            l,
            rounded,
            acc,
            tiles_ptr,
            indices_ptr,
            last,
            full,
            scale_log2,
            MMA,
            PADDED_HEADS,
            DIM,
            TILES,
            STRIDE,
            DTYPE,
        )
        total = gl.convert_layout(gl.sum(l, 1), gl.SliceLayout(1, MMA), assert_trivial=True)

    rounded = gl.max(rounded, 1)  # all columns are equal
    acc = acc * (1.0 / gl.where(total > 0, rounded, 1.0))[:, None]
    store_rows(o_ptr + entry * (HEADS * HEAD_DIM), acc, HEADS, PADDED_HEADS, HEAD_DIM, DIM)
    head = gl.arange(0, PADDED_HEADS, gl.SliceLayout(1, MMA))
    gl.store(lse_ptr + entry * HEADS + head, (m + gl.log2(total)) * LN2, mask=head < HEADS)
