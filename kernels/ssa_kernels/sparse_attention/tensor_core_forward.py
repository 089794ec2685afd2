"""Forward on tensor cores, for 16-bit elements: one warp a (query, list), tiles of 16 keys straight into registers (Gluon).

For query t, heads h of a list (R of them, one kv head), chosen keys J:

    s[h, j] = scale q[h] . k[j]      m[h] = max of s over the tile that holds the query's own key
    p = exp(s - m)      l[h] = sum_j p[h, j]      o[h] = sum_j p[h, j] v[j] / l[h]      lse[h] = m[h] + log l[h]

The own tile comes first: the only one that needs the causal mask, and its maximum is the reference m of all, so nothing is rescaled in
the loop. Any reference gives the same o and lse as long as nothing overflows; a later logit more than LIMIT above it would. The sum
shows it (l not below LIMIT, NaN included), and then the query starts again with the exact maximum of all its logits. Smaller logits
may underflow, as they do under the exact maximum: l >= 1 from the own tile.

Grid: lists * queries programs of one warp, the list outermost: neighbours share a kv head, whose tiles then fill L1 and L2. Each tile is
loaded while the one before it is being worked on; its number is loaded one step earlier still. A query without any block (all -1)
gives o = 0 and lse = -inf. Reads of each program do not depend on other queries: results do not depend on the batch.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .fragments import (
    LN2,
    as_left,
    as_right_transposed,
    mma_layout,
    packed_layout,
    right,
    store_rows,
    tile_columns,
    tile_rows,
    to_contraction_order,
    weights_as_left,
    words_layout,
)


@gluon.jit
def chosen_tiles(indices_ptr, position, TOP_K: gl.constexpr, SLOTS: gl.constexpr, BLOCK_SIZE: gl.constexpr):
    """Returns (block with the own tile, its place in the block, number of full tiles, whether there is any block).

    The full tiles are 0 .. n - 1 of the blocks in their order: all of every block before the last, and the last one's before the own
    tile. If the own block was not chosen, the last block's last tile takes the own tile's part, under a mask that hides nothing.
    """
    TILES: gl.constexpr = BLOCK_SIZE // 16
    slot = gl.arange(0, SLOTS, gl.BlockedLayout([1], [32], [1], [0]))
    block = gl.load(indices_ptr + slot, mask=slot < TOP_K, other=-1)
    valid = (block >= 0) & (block <= position // BLOCK_SIZE)
    count = gl.sum(valid.to(gl.int32), 0)
    last = gl.maximum(gl.max(gl.where(valid, block, -1), 0), 0)
    own_tile = gl.minimum(position - last * BLOCK_SIZE, BLOCK_SIZE - 1) // 16
    full = gl.where(count > 0, (count - 1) * TILES + own_tile, 0)
    return last, own_tile, full, count > 0


@gluon.jit
def tile_number(indices_ptr, i, last, TILES: gl.constexpr):
    """Returns the i-th full tile's number in the document; i may lie before or past the list, and gives some tile then."""
    block = gl.load(indices_ptr + gl.maximum(i, 0) // TILES)
    return gl.minimum(gl.maximum(block, 0), last) * TILES + gl.maximum(i, 0) % TILES


@gluon.jit
def _values(tile, MMA: gl.constexpr, DIM: gl.constexpr, DTYPE: gl.constexpr):
    """V of a tile as right operand [16, DIM]."""
    return right(gl.permute(tile_columns(tile, DIM, DTYPE, False), [1, 0]), MMA)


@gluon.jit
def _add_full_tiles(
    q, m, l, acc, tiles_ptr, indices_ptr, last, full, scale_log2,
    MMA: gl.constexpr, ROWS: gl.constexpr, DIM: gl.constexpr, TILES: gl.constexpr, STRIDE: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Adds the full tiles to l (not yet summed over keys) and acc."""
    if full > 0:
        WORDS: gl.constexpr = 8 * DIM
        offsets = gl.arange(0, WORDS, packed_layout(WORDS))
        tile = tiles_ptr + tile_number(indices_ptr, 0, last, TILES).to(gl.int64) * STRIDE
        k = gl.load(tile + offsets)
        v = gl.load(tile + WORDS + offsets)
        number = tile_number(indices_ptr, gl.minimum(1, full - 1), last, TILES)
        for i in range(full):
            tile = tiles_ptr + number.to(gl.int64) * STRIDE
            number = tile_number(indices_ptr, gl.minimum(i + 2, full - 1), last, TILES)
            k_t = as_right_transposed(tile_rows(k, DIM, False), MMA, 16, DIM, DTYPE)
            s = mma_v2(q, k_t, gl.zeros([ROWS, 16], gl.float32, MMA))
            k = gl.load(tile + offsets)
            p = gl.exp2(s * scale_log2 - m[:, None])
            l += p
            acc = mma_v2(weights_as_left(p, MMA, DTYPE), _values(v, MMA, DIM, DTYPE), acc)
            v = gl.load(tile + WORDS + offsets)
    return l, acc


@gluon.jit(do_not_specialize=["num_queries"])
def forward_kernel(
    q_ptr, tiles_ptr, indices_ptr, position_ptr, first_row_ptr, o_ptr, lse_ptr, scale_log2, num_queries,
    LISTS: gl.constexpr, KV_HEADS: gl.constexpr, ROWS: gl.constexpr, ROWS_PADDED: gl.constexpr,
    HEAD_DIM: gl.constexpr, DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, TOP_K: gl.constexpr, SLOTS: gl.constexpr,
    DTYPE: gl.constexpr, LIMIT: gl.constexpr,
):  # fmt: skip
    """o and lse of one query and list. q_ptr, tiles_ptr: words."""
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

    own = tiles_ptr + (last * TILES + own_tile).to(gl.int64) * STRIDE
    offsets = gl.arange(0, WORDS, packed_layout(WORDS))
    k = gl.load(own + offsets)
    v = gl.load(own + WORDS + offsets)
    key = last * BLOCK_SIZE + own_tile * 16 + gl.arange(0, 16, gl.SliceLayout(0, MMA))
    k_t = as_right_transposed(tile_rows(k, DIM, False), MMA, 16, DIM, DTYPE)
    s_own = mma_v2(q, k_t, gl.zeros([ROWS_PADDED, 16], gl.float32, MMA))
    s_own = gl.where(((key <= position) & any_block)[None, :], s_own * scale_log2, float("-inf"))
    m = gl.max(s_own, 1)
    m = gl.where(m == float("-inf"), 0.0, m)
    l = gl.exp2(s_own - m[:, None])
    zeros = gl.zeros([ROWS_PADDED, DIM], gl.float32, MMA)
    acc = mma_v2(weights_as_left(l, MMA, DTYPE), _values(v, MMA, DIM, DTYPE), zeros)
    l, acc = _add_full_tiles(
        q, m, l, acc, tiles_ptr, indices_ptr, last, full, scale_log2, MMA, ROWS_PADDED, DIM, TILES, STRIDE, DTYPE
    )
    total = gl.sum(l, 1)

    if gl.max(gl.where(total < LIMIT, 0, 1), 0) > 0:  # rare: again, with the exact maximum
        for i in range(full):
            tile = tiles_ptr + tile_number(indices_ptr, i, last, TILES).to(gl.int64) * STRIDE
            k_t = as_right_transposed(tile_rows(gl.load(tile + offsets), DIM, False), MMA, 16, DIM, DTYPE)
            s = mma_v2(q, k_t, gl.zeros([ROWS_PADDED, 16], gl.float32, MMA))
            m = gl.maximum(m, gl.max(s * scale_log2, 1))
        l = gl.exp2(s_own - m[:, None])
        v = gl.load(own + WORDS + offsets)
        acc = mma_v2(weights_as_left(l, MMA, DTYPE), _values(v, MMA, DIM, DTYPE), zeros)
        l, acc = _add_full_tiles(
            q, m, l, acc, tiles_ptr, indices_ptr, last, full, scale_log2, MMA, ROWS_PADDED, DIM, TILES, STRIDE, DTYPE
        )
        total = gl.sum(l, 1)

    acc = acc * (1.0 / gl.where(total > 0, total, 1.0))[:, None]
    store_rows(o_ptr + entry * (ROWS * HEAD_DIM), acc, ROWS, ROWS_PADDED, HEAD_DIM, DIM)
    head = gl.arange(0, ROWS_PADDED, gl.SliceLayout(1, MMA))
    gl.store(lse_ptr + entry * ROWS + head, (m + gl.log2(total)) * LN2, mask=head < ROWS)
