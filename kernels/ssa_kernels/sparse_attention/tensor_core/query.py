"""Helpers of all programs that work on one query and list (Gluon): the query, its chosen tiles, the offsets of its heads."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .fragments import packed_layout, words_layout


@gluon.jit
def query_of_program(
    tiles_ptr, indices_ptr, position_ptr, first_block_row_ptr, num_queries,
    LISTS: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    TOP_K: gl.constexpr, PADDED_TOP_K: gl.constexpr,
):  # fmt: skip
    """Returns (entry, position, tiles of the document, chosen blocks, and the four results of `chosen_tiles`)."""
    TILES: gl.constexpr = BLOCK_SIZE // 16
    program = gl.program_id(0)
    query, chosen_list = program % num_queries, program // num_queries
    entry = query.to(gl.int64) * LISTS + chosen_list
    indices_ptr += entry * TOP_K
    position = gl.load(position_ptr + query)
    last, own_tile, full, any_block = chosen_tiles(indices_ptr, position, TOP_K, PADDED_TOP_K, BLOCK_SIZE)
    first_tile = gl.load(first_block_row_ptr + query).to(gl.int64) * TILES
    tiles_ptr += (first_tile * KV_HEADS + chosen_list // (LISTS // KV_HEADS)) * (16 * DIM)
    return entry, position, tiles_ptr, indices_ptr, last, own_tile, full, any_block


@gluon.jit
def chosen_tiles(indices_ptr, position, TOP_K: gl.constexpr, PADDED_TOP_K: gl.constexpr, BLOCK_SIZE: gl.constexpr):
    """Returns (block with the own tile, the own tile's number in it, number of full tiles, whether there is any block).

    The full tiles, numbered from 0 in the order of the blocks, are all tiles of every block before the last, and the last block's tiles
    before the own tile. If the own block was not chosen, the last block's last tile takes the place of the own tile, under a mask that
    hides nothing.
    """
    TILES: gl.constexpr = BLOCK_SIZE // 16
    slot = gl.arange(0, PADDED_TOP_K, gl.BlockedLayout([1], [32], [1], [0]))
    block = gl.load(indices_ptr + slot, mask=slot < TOP_K, other=-1)
    valid = (block >= 0) & (block <= position // BLOCK_SIZE)
    count = gl.sum(valid.to(gl.int32), 0)
    last = gl.maximum(gl.max(gl.where(valid, block, -1), 0), 0)
    own_tile = gl.minimum(position - last * BLOCK_SIZE, BLOCK_SIZE - 1) // 16
    full = gl.where(count > 0, (count - 1) * TILES + own_tile, 0)
    return last, own_tile, full, count > 0


@gluon.jit
def tile_number(indices_ptr, i, last, TILES: gl.constexpr):
    """Returns the i-th full tile's number in the document. For i before or past the list it returns some tile of the document."""
    block = gl.load(indices_ptr + gl.maximum(i, 0) // TILES)
    return gl.minimum(gl.maximum(block, 0), last) * TILES + gl.maximum(i, 0) % TILES


@gluon.jit
def own_tile_mask(last, own_tile, position, any_block, BLOCK_SIZE: gl.constexpr, LAYOUT: gl.constexpr):
    """Returns which of the own tile's 16 keys the query sees."""
    key = last * BLOCK_SIZE + own_tile * 16 + gl.arange(0, 16, LAYOUT)
    return (key <= position) & any_block


@gluon.jit
def load_packed(ptr, DIM: gl.constexpr):
    """Returns the packed words of 16 keys or values: K's at a tile's beginning, V's 8 * DIM words after it."""
    WORDS: gl.constexpr = 8 * DIM
    return gl.load(ptr + gl.arange(0, WORDS, packed_layout(WORDS)))


@gluon.jit
def vector_words(entry, HEADS: gl.constexpr, PADDED_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, DIM: gl.constexpr):
    """Returns the offsets [PADDED_HEADS, DIM / 2] of an entry's words in q, dO and O, and their mask."""
    LAYOUT: gl.constexpr = words_layout(PADDED_HEADS, DIM // 2, PADDED_HEADS)
    head = gl.arange(0, PADDED_HEADS, gl.SliceLayout(1, LAYOUT))
    word = gl.arange(0, DIM // 2, gl.SliceLayout(0, LAYOUT))
    inside = (head < HEADS)[:, None] & (word < HEAD_DIM // 2)[None, :]
    return entry * (HEADS * HEAD_DIM // 2) + head[:, None] * (HEAD_DIM // 2) + word[None, :], inside
