"""Selection for decoding (Triton): logits of the block means, importance, and an exact top-k by slices of the blocks.

For a new token at position p of a sequence the candidates are the blocks c before its own, p // K. With the cached means k'[c, g]:

    x[h, c] = scale log2(e) q[h] . k'[c, g]     lse[h] = log2 sum_c 2^x[h, c]     importance[c] = sum over the group's heads h of 2^(x[h, c] - lse[h])

(per_head: importance is x itself). A prefill keeps many queries busy on one multiprocessor; here one query must be spread over many:

* `block_logits_kernel`, one program per (tile of blocks, list, sequence): x of all the sequence's new tokens by one product, and each tile's
  maximum and sum per row. The means are read once.
* `candidates_kernel`, one program per (slice of tiles, list, new token): lse from all tiles' maxima and sums, the importance of the slice's
  blocks, and the best of them.
* attend_triton.py folds the slices' best into the choice.

The best are kept as int64 (importance's bits in order, then the block's number), all different, and of equal importance the more recent block
is the larger. Each chunk is reduced by a bitonic top-k, which compares within registers and between the lanes of a warp: exact, and a fixed
number of steps. Nothing depends on how programs are scheduled.
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

TINY = tl.constexpr(1.1754943508222875e-38)  # float32's smallest normal number; importance below it counts as 0
NEVER = tl.constexpr(-(2**31) * 2**32)  # below every candidate


@triton.jit(do_not_specialize=["most", "blocks_per_sequence", "num_pages", "columns"])
def block_logits_kernel(
    q_ptr, means_ptr, seq_lens_ptr, num_new_ptr, page_table_ptr, logits_ptr, tile_max_ptr, tile_sum_ptr,
    scale_log2, most, blocks_per_sequence, num_pages, columns,
    NUM_NEW: tl.constexpr, RAGGED: tl.constexpr, PAGED: tl.constexpr, LISTS: tl.constexpr, LISTS_PER_KV_HEAD: tl.constexpr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TOP_K: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, PER_HEAD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """logits[b, list, row, c], and each tile's maximum and sum. Grid: (tiles, lists x tiles of rows, sequences).

    Rows whose candidates are all chosen are not needed: a tile that has only such rows writes nothing.
    """
    let_next_start(OVERLAP)
    tile, sequence = tl.program_id(0), tl.program_id(2)
    chosen_list = tl.program_id(1) % LISTS
    length, new = sequence_state(seq_lens_ptr, num_new_ptr, sequence, most, NUM_NEW, RAGGED)
    row, position, valid = rows_of_tile(length, new, tl.program_id(1) // LISTS * ROWS, NUM_NEW, HEADS, ROWS)
    own = tl.where(valid, position // BLOCK_SIZE, 0)
    last = tl.max(own, 0)
    if (tile * TILE < last) & (last >= TOP_K):
        block, dim = tile * TILE + tl.arange(0, TILE), tl.arange(0, DIM)
        features = (dim < HEAD_DIM)[None, :]
        page = page_of_block(page_table_ptr, sequence, block, block < last, blocks_per_sequence, num_pages, PAGED)
        at = (page * (LISTS // LISTS_PER_KV_HEAD) + chosen_list // LISTS_PER_KV_HEAD) * HEAD_DIM
        means = tl.load(means_ptr + at[:, None] + dim[None, :], mask=(block < last)[:, None] & features, other=0.0)
        at = query_offsets(row, sequence, chosen_list, NUM_NEW, LISTS, HEADS, HEAD_DIM)
        q = tl.load(q_ptr + at[:, None] + dim[None, :], mask=valid[:, None] & features, other=0.0)
        x = tl.dot(q, tl.trans(means), input_precision="ieee") * scale_log2
        x = tl.where(block[None, :] < own[:, None], x, float("-inf"))
        out = (sequence.to(tl.int64) * LISTS + chosen_list) * (NUM_NEW * HEADS) + row
        tl.store(logits_ptr + out[:, None] * columns + block[None, :], x, mask=block[None, :] < own[:, None])
        if not PER_HEAD:
            top = tl.maximum(tl.max(x, 1), -1e38)
            out = out * tl.num_programs(0) + tile
            tl.store(tile_max_ptr + out, top, mask=valid)
            tl.store(tile_sum_ptr + out, tl.sum(tl.exp2(x - top[:, None]), 1), mask=valid)


@triton.jit
def merge(best, more):
    """Returns the largest of both, as many as each of them has, in descending order."""
    return tl.topk(tl.ravel(tl.join(best, more)), best.shape[0])


@triton.jit
def _log_sums(
    tile_max_ptr, tile_sum_ptr, entry, own, tiles, HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr, TILES: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Returns lse [PADDED_HEADS] of one token and list; infinity for padding, so that its weights are 0."""
    head, tile = tl.arange(0, PADDED_HEADS), tl.arange(0, TILES)
    at = (entry + head)[:, None] * tiles + tile[None, :]
    inside = (head < HEADS)[:, None] & (tile * TILE < own)[None, :]
    tops = tl.load(tile_max_ptr + at, mask=inside, other=-1e38)
    sums = tl.load(tile_sum_ptr + at, mask=inside, other=0.0)
    top = tl.max(tops, 1)
    total = tl.sum(sums * tl.exp2(tops - top[:, None]), 1)
    return tl.where(head < HEADS, top + tl.log2(tl.where(head < HEADS, total, 1.0)), float("inf"))


@triton.jit
def _best_blocks(
    logits_ptr, row, columns, block, own, lse,
    HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr, SLOTS: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    """Returns the best SLOTS of `block`, by the rows of logits from `row` on, in descending order. No candidates come last."""
    head = tl.arange(0, PADDED_HEADS)
    inside = (head < HEADS)[:, None] & (block < own)[None, :]
    x = tl.load(logits_ptr + (row + head)[:, None] * columns + block[None, :], mask=inside, other=float("-inf"))
    if PER_HEAD:
        importance = tl.sum(tl.where(inside, x, 0.0), 0)  # of one head
        bits = importance.to(tl.int32, bitcast=True)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    else:
        importance = tl.sum(tl.exp2(x - lse[:, None]), 0)
        bits = tl.where(importance < TINY, 0.0, importance).to(tl.int32, bitcast=True)
    return tl.topk(tl.where(block < own, (bits.to(tl.int64) << 32) + block, NEVER), SLOTS)


@triton.jit(do_not_specialize=["most", "columns", "tiles"])
def candidates_kernel(
    seq_lens_ptr, num_new_ptr, logits_ptr, tile_max_ptr, tile_sum_ptr, best_ptr, most, columns, tiles,
    NUM_NEW: tl.constexpr, RAGGED: tl.constexpr, LISTS: tl.constexpr, HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
    CHUNK: tl.constexpr, SLICE: tl.constexpr, PER_HEAD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """best[b, list, t, slice, SLOTS]: a slice's best blocks, in descending order. Grid: (slices, lists, sequences x new tokens)."""
    let_next_start(OVERLAP)
    begin, chosen_list = tl.program_id(0) * SLICE, tl.program_id(1)
    sequence, t = tl.program_id(2) // NUM_NEW, tl.program_id(2) % NUM_NEW
    length, new = sequence_state(seq_lens_ptr, num_new_ptr, sequence, most, NUM_NEW, RAGGED)
    own = tl.maximum(query_position(length, new, t), 0) // BLOCK_SIZE
    wait_for_previous(OVERLAP)
    if (own >= TOP_K) & (begin < own):
        entry = ((sequence.to(tl.int64) * LISTS + chosen_list) * NUM_NEW + t) * HEADS
        if PER_HEAD:
            lse = tl.zeros([PADDED_HEADS], tl.float32)
        else:
            lse = _log_sums(tile_max_ptr, tile_sum_ptr, entry, own, tiles, HEADS, PADDED_HEADS, TILES, TILE)
        block = begin + tl.arange(0, CHUNK)
        best = _best_blocks(logits_ptr, entry, columns, block, own, lse, HEADS, PADDED_HEADS, SLOTS, PER_HEAD)
        for step in range(CHUNK, tl.minimum(SLICE, own - begin), CHUNK):
            more = _best_blocks(
                logits_ptr, entry, columns, block + step, own, lse, HEADS, PADDED_HEADS, SLOTS, PER_HEAD
            )
            best = merge(best, more)
        out = (entry // HEADS * tl.num_programs(0) + tl.program_id(0)) * SLOTS
        tl.store(best_ptr + out + tl.arange(0, SLOTS), best)


@triton.jit
def _found(best_ptr, i, found, SLOTS: tl.constexpr):
    """Returns the best SLOTS of the slices' entries number i, in descending order."""
    entries = tl.load(best_ptr + i, mask=i < found, other=0)
    return tl.topk(tl.where(i < found, entries, NEVER), SLOTS)


@triton.jit
def choose(
    best_ptr, entry, own, slices, TOP_K: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr, SLICE: tl.constexpr
):
    """Returns int32 [SLOTS]: the chosen blocks of one token and list in no order, the own block among them, -1 in other slots."""
    slot = tl.arange(0, SLOTS)
    if own < TOP_K:
        blocks = tl.where(slot <= own, slot, -1)
    else:
        found = (own + SLICE - 1) // SLICE * SLOTS
        best = _found(best_ptr + entry * slices * SLOTS, tl.arange(0, CHUNK), found, SLOTS)
        for first in range(CHUNK, found, CHUNK):
            best = merge(best, _found(best_ptr + entry * slices * SLOTS, first + tl.arange(0, CHUNK), found, SLOTS))
        blocks = (best & 0x7FFFFFFF).to(tl.int32)
        blocks = tl.where(slot < TOP_K - 1, blocks, tl.where(slot == TOP_K - 1, own, -1))
    return blocks


@triton.jit(do_not_specialize=["most", "slices"])
def indices_kernel(
    seq_lens_ptr, num_new_ptr, best_ptr, indices_ptr, most, slices,
    NUM_NEW: tl.constexpr, RAGGED: tl.constexpr, LISTS: tl.constexpr, BLOCK_SIZE: tl.constexpr, TOP_K: tl.constexpr,
    SLOTS: tl.constexpr, CHUNK: tl.constexpr, SLICE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """indices[b, t, list, TOP_K], ascending, -1 at the end. Grid: (lists, sequences x new tokens)."""
    chosen_list, sequence, t = tl.program_id(0), tl.program_id(1) // NUM_NEW, tl.program_id(1) % NUM_NEW
    length, new = sequence_state(seq_lens_ptr, num_new_ptr, sequence, most, NUM_NEW, RAGGED)
    position = query_position(length, new, t)
    slot = tl.arange(0, SLOTS)
    blocks = tl.full([SLOTS], -1, tl.int32)
    wait_for_previous(OVERLAP)
    if position >= 0:
        entry = (sequence.to(tl.int64) * LISTS + chosen_list) * NUM_NEW + t
        blocks = choose(best_ptr, entry, position // BLOCK_SIZE, slices, TOP_K, SLOTS, CHUNK, SLICE)
    # A chosen block's place is the number of chosen blocks before it; the -1 come after them.
    before = (blocks[None, :] >= 0) & ((blocks[None, :] < blocks[:, None]) | (blocks < 0)[:, None])
    before = before | ((blocks < 0)[:, None] & (blocks < 0)[None, :] & (slot[None, :] < slot[:, None]))
    place = tl.sum(before.to(tl.int32), 1)
    out = (tl.program_id(1).to(tl.int64) * LISTS + chosen_list) * TOP_K + place
    tl.store(indices_ptr + out, blocks, mask=place < TOP_K)
