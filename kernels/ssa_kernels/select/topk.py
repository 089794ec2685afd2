"""The own block and the best top_k - 1 of one importance row, exact, in Triton: a warp a row.

Values are compared as integers of the same order (float bits, with negative ones reversed). With k = top_k - 1:

1. The maximum of each of 128 bins (column modulo 128), by a pass over the row, or of 64 bins a slice, made with the row by the importance
   kernel. The k-th largest of the maxima cannot exceed the row's k-th largest value, and about k + k^2 / (2 x bins) values reach it: a
   bisection over the bins finds it or a number slightly below.
2. A second pass writes the columns of the values that reach it into a scratch row.
3. While more than k survive, the smallest goes, the older of equals: exact. What remains is ordered by column.

If the survivors outgrow the scratch row (many equal values; large values that share a bin), the exact k-th value is found by bisection over
the whole row, and among equals the column from which they count, so that exactly k remain: slow, and rare.

official_compat takes that slow way on two parts of the row first, to reproduce which blocks the official code loses (reference.py).

Rows of any length are streamed, so nothing depends on a row fitting into registers. Results do not depend on the rest of the batch.
"""

import triton
import triton.language as tl

NEVER = tl.constexpr(-(2**31))  # the key of what is no candidate
LOWEST = tl.constexpr(-(2**31) + 1)
LAST = tl.constexpr(2**31 - 1)  # above every column and at least every key
LANES = tl.constexpr(32)


@triton.jit
def _keys(ROW, column, end, SIGNED: tl.constexpr, MASKED: tl.constexpr):
    """Ordered integer keys of the row's columns; MASKED: NEVER from `end` on (rows are allocated up to a whole pass)."""
    bits = tl.load(ROW + column).to(tl.int32, bitcast=True)
    if SIGNED:
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    if MASKED:
        bits = tl.where(column < end, bits, NEVER)
    return bits


@triton.jit
def _ones(x):
    """Number of set bits."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _middle(lo, hi):
    """Floor of the mean of two int32, without overflow."""
    return (lo & hi) + ((lo ^ hi) >> 1)


@triton.jit
def _bin_maxima(bins, ROW, start, end, W: tl.constexpr, SIGNED: tl.constexpr, MASKED: tl.constexpr):
    """`bins` with the columns [start, start + W) taken in."""
    keys = _keys(ROW, start + tl.arange(0, W), end, SIGNED, MASKED)
    return tl.maximum(bins, tl.max(tl.reshape(keys, [W // (4 * LANES), 4 * LANES]), 0))


@triton.jit
def _bin_threshold(ROW, end, k, slack, W: tl.constexpr, SIGNED: tl.constexpr):
    """`_threshold` of bins made by a pass over the row."""
    bins = tl.full([4 * LANES], NEVER, tl.int32)
    whole = end // W * W
    for start in range(0, whole, W):
        bins = _bin_maxima(bins, ROW, start, end, W, SIGNED, False)
    if whole < end:
        bins = _bin_maxima(bins, ROW, whole, end, W, SIGNED, True)
    return _threshold(bins, k, slack, 4 * LANES)


@triton.jit
def _threshold(bins, k, slack, N: tl.constexpr):
    """A key that at least k of the row's values reach, and no more than k + slack of the N bins' maxima if they differ."""
    hi = tl.max(bins, 0)
    lo = tl.maximum(tl.min(bins, 0), tl.maximum(hi, LOWEST + (1 << 24)) - (1 << 24))
    reach = tl.sum((bins >= lo).to(tl.int32), 0)
    if reach < k:
        hi = lo
        lo = LOWEST
        reach = tl.full([], N, tl.int32)
    while (reach > k + slack) & (hi - 1 > lo):
        mid = _middle(lo, hi)
        count = tl.sum((bins >= mid).to(tl.int32), 0)
        enough = count >= k
        lo = tl.where(enough, mid, lo)
        reach = tl.where(enough, count, reach)
        hi = tl.where(enough, hi, mid)
    return lo


@triton.jit
def _count(ROW, begin, end, key, cut, W: tl.constexpr, SIGNED: tl.constexpr):
    """How many of the columns [begin, end) have more than `key`, or just `key` from column `cut` on."""
    total = 0
    for start in range(begin // W * W, end, W):
        column = start + tl.arange(0, W)
        keys = _keys(ROW, column, end, SIGNED, True)
        taken = ((keys > key) | ((keys == key) & (column >= cut))) & (column >= begin) & (column < end)
        total += tl.sum(taken.to(tl.int32), 0)
    return total


@triton.jit
def _exact_threshold(ROW, begin, end, k, W: tl.constexpr, SIGNED: tl.constexpr):
    """(key, cut) such that exactly min(k, end - begin) columns have more than `key`, or just `key` from `cut` on."""
    key = tl.full([], NEVER, tl.int32)
    cut = end
    if end - begin > k:
        # Fewer than k values exceed hi, at least k exceed lo: hi ends as the k-th largest value ...
        lo = tl.full([], NEVER, tl.int32)
        hi = tl.full([], LAST, tl.int32)
        while _middle(lo, hi) > lo:
            mid = _middle(lo, hi)
            enough = _count(ROW, begin, end, mid, end, W, SIGNED) >= k
            lo = tl.where(enough, mid, lo)
            hi = tl.where(enough, hi, mid)
        key = hi
        # ... and cut as the smallest column from which its equals still fit.
        over = begin - 1
        while cut - over > 1:
            mid = (cut + over) // 2
            enough = _count(ROW, begin, end, key, mid, W, SIGNED) > k
            over = tl.where(enough, mid, over)
            cut = tl.where(enough, cut, mid)
    return key, cut


@triton.jit
def _compact_pass(
    ROW,
    SURVIVORS,
    start,
    begin,
    end,
    key,
    cut,
    found,
    C: tl.constexpr,
    W: tl.constexpr,
    SIGNED: tl.constexpr,
    TIES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Appends what survives of the columns [start, start + W); returns how many there are then.

    Each lane gathers its W / 32 answers into the bits of one word, so that the rare survivors cost a loop over set bits and the many
    others a comparison each.
    """
    J: tl.constexpr = W // (4 * LANES)
    j, i = tl.arange(0, J)[None, :, None], tl.arange(0, 4)[None, None, :]
    lane = tl.arange(0, LANES)
    column = start + j * (4 * LANES) + lane[:, None, None] * 4 + i
    keys = _keys(ROW, column, end, SIGNED, MASKED)
    taken = keys > key
    if TIES:
        taken = (taken | ((keys == key) & (column >= cut))) & (column >= begin) & (column < end)
    word = tl.sum(tl.sum(tl.where(taken, 1 << (j * 4 + i), 0), 2), 1)
    held = _ones(word)
    place = found + tl.cumsum(held, 0) - held
    while tl.max((word != 0).to(tl.int32), 0) > 0:
        lowest = _ones((word & -word) - 1)
        at = start + lowest // 4 * (4 * LANES) + lane * 4 + lowest % 4
        tl.store(SURVIVORS + place, at, mask=(word != 0) & (place < C))
        word = word & (word - 1)
        place += 1
    return found + tl.sum(held, 0)


@triton.jit
def _compact(
    ROW,
    SURVIVORS,
    begin,
    end,
    key,
    cut,
    found,
    C: tl.constexpr,
    W: tl.constexpr,
    SIGNED: tl.constexpr,
    TIES: tl.constexpr,
):
    """Appends the columns in [begin, end) above `key` (TIES: or just `key` from `cut` on) to the `found` ones, in no order.

    Returns how many there are then; no more than C are written.
    """
    whole = end // W * W
    for start in range(begin // W * W, whole, W):
        found = _compact_pass(ROW, SURVIVORS, start, begin, end, key, cut, found, C, W, SIGNED, TIES, False)
    if whole < end:
        found = _compact_pass(ROW, SURVIVORS, whole, begin, end, key, cut, found, C, W, SIGNED, TIES, True)
    return found


@triton.jit
def _finish(
    ROW, SURVIVORS, OUT, found, own, k, S: tl.constexpr, SP: tl.constexpr, C: tl.constexpr, SIGNED: tl.constexpr
):
    """Writes the best k of the `found` survivors in ascending columns, the own block and -1."""
    i = tl.arange(0, C)
    alive = i < found
    column = tl.load(SURVIVORS + i, mask=alive, other=0)
    keys = _keys(ROW, column, own, SIGNED, False)
    for _ in range(k, found):
        # The smallest goes, the oldest of equals.
        worst = tl.min(tl.where(alive, keys, LAST), 0)
        oldest = tl.min(tl.where(alive & (keys == worst), column, LAST), 0)
        alive = alive & (column != oldest)
    kept = tl.minimum(found, k)
    column = tl.where(alive, column, LAST)
    if C == LANES:
        place = tl.sum((column[:, None] < column[None, :]).to(tl.int32), 0)
        tl.store(OUT + place, column, mask=alive)
    else:
        tl.store(OUT + i, tl.sort(column), mask=i < kept)
    s = tl.arange(0, SP)
    tl.store(OUT + s, tl.where(s == kept, own, -1), mask=(s >= kept) & (s < S))


@triton.jit(do_not_specialize=["chunk_start"])
def top_k_kernel(
    IMPORTANCE,
    POSITION,
    BINS,
    SURVIVORS,
    INDICES,
    chunk_start,
    stride_list,
    LISTS: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    SP: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    SIGNED: tl.constexpr,
    OFFICIAL: tl.constexpr,
    BINS_A_ROW: tl.constexpr,
):
    """INDICES[t, list, :] of the chunk's rows; grid (tokens x lists), last tokens first. BINS_A_ROW: maxima made with the row, 0 for none."""
    row = tl.num_programs(0) - 1 - tl.program_id(0)
    token = chunk_start + row // LISTS
    own = tl.load(POSITION + token) // K
    out = INDICES + (token.to(tl.int64) * LISTS + row % LISTS) * S
    k: tl.constexpr = S - 1
    if own <= k and not OFFICIAL:
        s = tl.arange(0, SP)
        tl.store(out + s, tl.where(s <= own, s, -1), mask=s < S)
    else:
        source = IMPORTANCE + row.to(tl.int64) * stride_list
        survivors = SURVIVORS + row.to(tl.int64) * C
        end = tl.minimum(own, stride_list)  # a document may be longer than max_length says
        none = tl.full([], 0, tl.int32)
        if OFFICIAL:
            middle = tl.minimum(own // K * K, end)
            half = tl.where(middle > 0, K // 2, K)
            key, cut = _exact_threshold(source, none, middle, half, W, SIGNED)
            found = _compact(source, survivors, none, middle, key, cut, none, C, W, SIGNED, True)
            key, cut = _exact_threshold(source, middle, end, half - 1, W, SIGNED)
            found = _compact(source, survivors, middle, end, key, cut, found, C, W, SIGNED, True)
        else:
            if BINS_A_ROW > 0:
                N: tl.constexpr = triton.next_power_of_2(BINS_A_ROW)
                i = tl.arange(0, N)
                maxima = tl.load(BINS + row.to(tl.int64) * BINS_A_ROW + i, mask=i < BINS_A_ROW, other=-1.0)
                key = _threshold(maxima.to(tl.int32, bitcast=True), k, S // 4, N) - 1
            else:
                key = _bin_threshold(source, end, k, S // 4, W, SIGNED) - 1
            found = _compact(source, survivors, none, end, key, end, none, C, W, SIGNED, False)
            if found > C:
                key, cut = _exact_threshold(source, none, end, k, W, SIGNED)
                found = _compact(source, survivors, none, end, key, cut, none, C, W, SIGNED, True)
        tl.debug_barrier()  # the survivors were written by other threads of the warp
        _finish(source, survivors, out, found, own, k, S, SP, C, SIGNED)
