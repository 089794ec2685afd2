"""The own block and the best top_k - 1 blocks of one row of importance, exactly (Triton): one warp per row.

A *row* here is the importance of one (token, list), a *column* a block of the token's document. Values are compared as integers of the same
order (the bits of the floats, with negative ones reversed). With k = top_k - 1:

1. The maximum of each of 128 bins (column modulo 128), by a pass over the row; or of 64 bins per slice, which the importance kernel computed
   with the row. The k-th largest maximum cannot exceed the row's k-th largest value, and about k + k^2 / (2 x bins) values reach it. A
   bisection over the bins finds it or a number slightly below.
2. A second pass writes the columns of the values that reach it into a scratch row.
3. While more than k survive, the smallest is dropped, the older of equals: this is exact. What remains is sorted by column.

If the survivors do not fit into the scratch row (many equal values; large values that share a bin), a bisection over the whole row finds
the exact k-th value, and another, among its equals, the column from which they count, so that exactly k remain. This is slow, and rare.

official_compat takes that slow path on two parts of the row first, to reproduce which blocks the official code loses (reference.py).

Rows of any length are streamed; none has to fit into registers. Results do not depend on the rest of the batch.
"""

import triton
import triton.language as tl

NEVER = tl.constexpr(-(2**31))  # the key of a column that is not a candidate
LOWEST = tl.constexpr(-(2**31) + 1)
LAST = tl.constexpr(2**31 - 1)  # above every column, and not below any key
LANES = tl.constexpr(32)


@triton.jit
def _keys(row_ptr, column, end, SIGNED: tl.constexpr, MASKED: tl.constexpr):
    """Returns ordered integer keys of the row's columns. MASKED: NEVER from `end` on (rows are allocated in whole passes)."""
    bits = tl.load(row_ptr + column).to(tl.int32, bitcast=True)
    if SIGNED:
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    if MASKED:
        bits = tl.where(column < end, bits, NEVER)
    return bits


@triton.jit
def _ones(x):
    """Returns the number of set bits."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _middle(lo, hi):
    """Returns the floor of the mean of two int32, without overflow."""
    return (lo & hi) + ((lo ^ hi) >> 1)


@triton.jit
def _bin_maxima(bins, row_ptr, start, end, WIDTH: tl.constexpr, SIGNED: tl.constexpr, MASKED: tl.constexpr):
    """Returns `bins` with the columns [start, start + WIDTH) included."""
    keys = _keys(row_ptr, start + tl.arange(0, WIDTH), end, SIGNED, MASKED)
    return tl.maximum(bins, tl.max(tl.reshape(keys, [WIDTH // (4 * LANES), 4 * LANES]), 0))


@triton.jit
def _bin_threshold(row_ptr, end, k, slack, WIDTH: tl.constexpr, SIGNED: tl.constexpr):
    """Returns `_threshold` of bins that a pass over the row computes."""
    bins = tl.full([4 * LANES], NEVER, tl.int32)
    whole = end // WIDTH * WIDTH
    for start in range(0, whole, WIDTH):
        bins = _bin_maxima(bins, row_ptr, start, end, WIDTH, SIGNED, False)
    if whole < end:
        bins = _bin_maxima(bins, row_ptr, whole, end, WIDTH, SIGNED, True)
    return _threshold(bins, k, slack, 4 * LANES)


@triton.jit
def _threshold(bins, k, slack, NUM_BINS: tl.constexpr):
    """Returns a key that at least k of the row's values reach, and at most k + slack of the bins' maxima if they differ."""
    hi = tl.max(bins, 0)
    lo = tl.maximum(tl.min(bins, 0), tl.maximum(hi, LOWEST + (1 << 24)) - (1 << 24))
    reach = tl.sum((bins >= lo).to(tl.int32), 0)
    if reach < k:
        hi = lo
        lo = LOWEST
        reach = tl.full([], NUM_BINS, tl.int32)
    while (reach > k + slack) & (hi - 1 > lo):
        mid = _middle(lo, hi)
        count = tl.sum((bins >= mid).to(tl.int32), 0)
        enough = count >= k
        lo = tl.where(enough, mid, lo)
        reach = tl.where(enough, count, reach)
        hi = tl.where(enough, hi, mid)
    return lo


@triton.jit
def _count(row_ptr, begin, end, key, cut, WIDTH: tl.constexpr, SIGNED: tl.constexpr):
    """Returns how many of the columns [begin, end) are above `key`, or equal to it from column `cut` on."""
    total = 0
    for start in range(begin // WIDTH * WIDTH, end, WIDTH):
        column = start + tl.arange(0, WIDTH)
        keys = _keys(row_ptr, column, end, SIGNED, True)
        taken = ((keys > key) | ((keys == key) & (column >= cut))) & (column >= begin) & (column < end)
        total += tl.sum(taken.to(tl.int32), 0)
    return total


@triton.jit
def _exact_threshold(row_ptr, begin, end, k, WIDTH: tl.constexpr, SIGNED: tl.constexpr):
    """Returns (key, cut) such that exactly min(k, end - begin) columns are above `key`, or equal to it from column `cut` on."""
    key = tl.full([], NEVER, tl.int32)
    cut = end
    if end - begin > k:
        # Fewer than k values exceed hi and at least k exceed lo, so hi ends as the k-th largest value ...
        lo = tl.full([], NEVER, tl.int32)
        hi = tl.full([], LAST, tl.int32)
        while _middle(lo, hi) > lo:
            mid = _middle(lo, hi)
            enough = _count(row_ptr, begin, end, mid, end, WIDTH, SIGNED) >= k
            lo = tl.where(enough, mid, lo)
            hi = tl.where(enough, hi, mid)
        key = hi
        # ... and cut ends as the smallest column from which the values equal to it still fit.
        over = begin - 1
        while cut - over > 1:
            mid = (cut + over) // 2
            enough = _count(row_ptr, begin, end, key, mid, WIDTH, SIGNED) > k
            over = tl.where(enough, mid, over)
            cut = tl.where(enough, cut, mid)
    return key, cut


@triton.jit
def _compact_pass(
    row_ptr,
    survivors_ptr,
    start,
    begin,
    end,
    key,
    cut,
    found,
    SCRATCH: tl.constexpr,
    WIDTH: tl.constexpr,
    SIGNED: tl.constexpr,
    TIES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Appends the survivors of the columns [start, start + WIDTH) and returns their new number.

    Each lane collects its WIDTH / 32 comparisons in the bits of one word. The few survivors then cost a loop over set bits, and the many
    other columns one comparison each.
    """
    J: tl.constexpr = WIDTH // (4 * LANES)
    j, i = tl.arange(0, J)[None, :, None], tl.arange(0, 4)[None, None, :]
    lane = tl.arange(0, LANES)
    column = start + j * (4 * LANES) + lane[:, None, None] * 4 + i
    keys = _keys(row_ptr, column, end, SIGNED, MASKED)
    taken = keys > key
    if TIES:
        taken = (taken | ((keys == key) & (column >= cut))) & (column >= begin) & (column < end)
    word = tl.sum(tl.sum(tl.where(taken, 1 << (j * 4 + i), 0), 2), 1)
    held = _ones(word)
    place = found + tl.cumsum(held, 0) - held
    while tl.max((word != 0).to(tl.int32), 0) > 0:
        lowest = _ones((word & -word) - 1)
        at = start + lowest // 4 * (4 * LANES) + lane * 4 + lowest % 4
        tl.store(survivors_ptr + place, at, mask=(word != 0) & (place < SCRATCH))
        word = word & (word - 1)
        place += 1
    return found + tl.sum(held, 0)


@triton.jit
def _compact(
    row_ptr,
    survivors_ptr,
    begin,
    end,
    key,
    cut,
    found,
    SCRATCH: tl.constexpr,
    WIDTH: tl.constexpr,
    SIGNED: tl.constexpr,
    TIES: tl.constexpr,
):
    """Appends the columns in [begin, end) above `key` (TIES: or equal to it from `cut` on) to the `found` ones, in no order.

    Returns their new number. At most SCRATCH are written.
    """
    whole = end // WIDTH * WIDTH
    for start in range(begin // WIDTH * WIDTH, whole, WIDTH):
        found = _compact_pass(
            row_ptr, survivors_ptr, start, begin, end, key, cut, found, SCRATCH, WIDTH, SIGNED, TIES, False
        )
    if whole < end:
        found = _compact_pass(
            row_ptr, survivors_ptr, whole, begin, end, key, cut, found, SCRATCH, WIDTH, SIGNED, TIES, True
        )
    return found


@triton.jit
def _finish(
    row_ptr,
    survivors_ptr,
    out_ptr,
    found,
    own,
    k,
    TOP_K: tl.constexpr,
    PADDED_TOP_K: tl.constexpr,
    SCRATCH: tl.constexpr,
    SIGNED: tl.constexpr,
):
    """Writes the best k of the `found` survivors in ascending order of columns, then the own block, then -1."""
    i = tl.arange(0, SCRATCH)
    alive = i < found
    column = tl.load(survivors_ptr + i, mask=alive, other=0)
    keys = _keys(row_ptr, column, own, SIGNED, False)
    for _ in range(k, found):
        # Drop the smallest, the oldest of equals.
        worst = tl.min(tl.where(alive, keys, LAST), 0)
        oldest = tl.min(tl.where(alive & (keys == worst), column, LAST), 0)
        alive = alive & (column != oldest)
    kept = tl.minimum(found, k)
    column = tl.where(alive, column, LAST)
    if SCRATCH == LANES:
        place = tl.sum((column[:, None] < column[None, :]).to(tl.int32), 0)
        tl.store(out_ptr + place, column, mask=alive)
    else:
        tl.store(out_ptr + i, tl.sort(column), mask=i < kept)
    s = tl.arange(0, PADDED_TOP_K)
    tl.store(out_ptr + s, tl.where(s == kept, own, -1), mask=(s >= kept) & (s < TOP_K))


@triton.jit
def choose_of_row(
    source,
    bins_ptr,
    survivors,
    out,
    own,
    width,
    BLOCK_SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    PADDED_TOP_K: tl.constexpr,
    SCRATCH: tl.constexpr,
    WIDTH: tl.constexpr,
    SIGNED: tl.constexpr,
    OFFICIAL: tl.constexpr,
    BINS_PER_ROW: tl.constexpr,
):
    """Writes the choice `out` of one row of importance, `source`, which holds `width` columns."""
    k: tl.constexpr = TOP_K - 1
    if own <= k and not OFFICIAL:
        s = tl.arange(0, PADDED_TOP_K)
        tl.store(out + s, tl.where(s <= own, s, -1), mask=s < TOP_K)
    else:
        end = tl.minimum(own, width)  # a document may exceed max_length
        none = tl.full([], 0, tl.int32)
        if OFFICIAL:
            middle = tl.minimum(own // BLOCK_SIZE * BLOCK_SIZE, end)
            half = tl.where(middle > 0, BLOCK_SIZE // 2, BLOCK_SIZE)
            key, cut = _exact_threshold(source, none, middle, half, WIDTH, SIGNED)
            found = _compact(source, survivors, none, middle, key, cut, none, SCRATCH, WIDTH, SIGNED, True)
            key, cut = _exact_threshold(source, middle, end, half - 1, WIDTH, SIGNED)
            found = _compact(source, survivors, middle, end, key, cut, found, SCRATCH, WIDTH, SIGNED, True)
        else:
            if BINS_PER_ROW > 0:
                NUM_BINS: tl.constexpr = triton.next_power_of_2(BINS_PER_ROW)
                i = tl.arange(0, NUM_BINS)
                maxima = tl.load(bins_ptr + i, mask=i < BINS_PER_ROW, other=-1.0)
                key = _threshold(maxima.to(tl.int32, bitcast=True), k, TOP_K // 4, NUM_BINS) - 1
            else:
                key = _bin_threshold(source, end, k, TOP_K // 4, WIDTH, SIGNED) - 1
            found = _compact(source, survivors, none, end, key, end, none, SCRATCH, WIDTH, SIGNED, False)
            if found > SCRATCH:
                key, cut = _exact_threshold(source, none, end, k, WIDTH, SIGNED)
                found = _compact(source, survivors, none, end, key, cut, none, SCRATCH, WIDTH, SIGNED, True)
        tl.debug_barrier()  # other threads of the warp wrote the survivors
        _finish(source, survivors, out, found, own, k, TOP_K, PADDED_TOP_K, SCRATCH, SIGNED)


@triton.jit(do_not_specialize=["chunk_start"])
def top_k_kernel(
    importance_ptr,
    position_ptr,
    bins_ptr,
    survivors_ptr,
    indices_ptr,
    chunk_start,
    stride_list,
    LISTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    PADDED_TOP_K: tl.constexpr,
    SCRATCH: tl.constexpr,
    WIDTH: tl.constexpr,
    SIGNED: tl.constexpr,
    OFFICIAL: tl.constexpr,
    BINS_PER_ROW: tl.constexpr,
):
    """indices[t, list, :] of the chunk's rows. Grid: (tokens x lists), last tokens first.

    BINS_PER_ROW: the number of maxima that the importance kernel computed per row, 0 for none.
    """
    row = tl.num_programs(0) - 1 - tl.program_id(0)
    token = chunk_start + row // LISTS
    own = tl.load(position_ptr + token) // BLOCK_SIZE
    out = indices_ptr + (token.to(tl.int64) * LISTS + row % LISTS) * TOP_K
    choose_of_row(
        importance_ptr + row.to(tl.int64) * stride_list, bins_ptr + row.to(tl.int64) * BINS_PER_ROW,
        survivors_ptr + row.to(tl.int64) * SCRATCH, out, own, stride_list,
        BLOCK_SIZE, TOP_K, PADDED_TOP_K, SCRATCH, WIDTH, SIGNED, OFFICIAL, BINS_PER_ROW,
    )  # fmt: skip
