"""What the decoding kernels share (Triton): a sequence's length, its queries' positions, and where a block's page lies."""

import triton
import triton.language as tl


@triton.jit
def sequence_state(seq_lens_ptr, num_new_ptr, sequence, most, NUM_NEW: tl.constexpr, RAGGED: tl.constexpr):
    """Returns a sequence's length, clamped to [0, most], and its number of new tokens, clamped to [0, NUM_NEW]. RAGGED: read from num_new."""
    length = tl.minimum(tl.maximum(tl.load(seq_lens_ptr + sequence), 0), most)
    new = tl.full([], NUM_NEW, tl.int32)
    if RAGGED:
        new = tl.minimum(tl.maximum(tl.load(num_new_ptr + sequence), 0), NUM_NEW)
    return length, new


@triton.jit
def query_position(length, new, t):
    """Returns the position of new token t, negative if the sequence does not have it."""
    return tl.where(t < new, length - new + t, -1)


@triton.jit
def page_of_block(page_table_ptr, sequence, block, inside, blocks_per_sequence, num_pages, PAGED: tl.constexpr):
    """Returns the int64 pages of a sequence's blocks where `inside`, else some page; always a page that exists."""
    at = sequence.to(tl.int64) * blocks_per_sequence + block
    if PAGED:
        page = tl.load(page_table_ptr + at, mask=inside, other=0).to(tl.int64)
        return tl.minimum(tl.maximum(page, 0), num_pages - 1)
    else:
        return tl.where(inside, at, 0)


@triton.jit
def rows_of_tile(length, new, first, NUM_NEW: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Returns (row, position, valid) of ROWS rows of one list from row `first` on. Row t * HEADS + h is head h of new token t."""
    row = first + tl.arange(0, ROWS)
    position = query_position(length, new, row // HEADS)
    return row, position, (row < NUM_NEW * HEADS) & (position >= 0)


@triton.jit
def query_offsets(
    row, sequence, chosen_list, NUM_NEW: tl.constexpr, LISTS: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Returns the int64 offset of each row's vector in q or o [B, NUM_NEW, LISTS, HEADS, HEAD_DIM]."""
    entry = (sequence.to(tl.int64) * NUM_NEW + row // HEADS) * LISTS + chosen_list
    return (entry * HEADS + row % HEADS) * HEAD_DIM
