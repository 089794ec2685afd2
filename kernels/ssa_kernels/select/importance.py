"""How much each earlier block matters to a query: block means, softmax sums and importance, in Triton.

For query t, kv head g and an earlier block c of t's document, with means k' and logits x[h, c] = scale log2(e) q[t, h] . k'[c, g]:

    importance[t, g, c] = sum over the group's heads h of 2^(x[h, c] - lse[t, h]),   lse[t, h] = log2 sum_c 2^x[h, c]

in three kernels. Nothing of size T x T / K exists: the sums are one number a head, and importance is written for one chunk of
tokens at a time, which `topk.py` consumes before the next.

* `block_means_kernel`, a program a (block row, kv head): means in float32, rounded to the keys' dtype. Rows are padded with zeros to a power
  of two, and as many zero rows follow the last as a tile may run over.
* `softmax_sums_kernel`, a program a (tile of 128 / G tokens, kv head): queries are the rows of the product, so a row's sum stays within its thread. No
  maximum is taken: logits are small, so 2^x is summed as it stands, and a tile whose sums leave [1e-20, 1e37] is done again with a running one.
* `importance_kernel`, a program a (tile, kv head, slice of the blocks): blocks are the rows. The heads of a group are summed without leaving
  a thread: the columns of the product are ordered so that the tensor core hands every thread whole groups.

What binds is the exponential unit: 2 x T^2 / (2 K) exponentials a head. A tile of tokens may span documents; each token masks by its own
first row, and tiles within one document (nearly all) skip the mask up to the last tile of blocks. Tiles whose tokens see fewer than top_k
blocks skip the work: all their candidates are chosen. Where a tile begins depends on the documents before, and with it the order of a sum's
terms: a document's sums agree to a few 1e-7 whatever else is in the batch, not to the bit, so blocks that tie within that may be chosen otherwise.

Not done here: no gradient (selection has none), no choice (topk.py).
"""

import triton
import triton.language as tl


@triton.jit
def block_means_kernel(
    K, START, LENGTH, MEANS, stride_token, stride_head, D: tl.constexpr, DP: tl.constexpr, BP: tl.constexpr
):
    """MEANS[row, g, :] = mean of K[start : start + length, g, :]; zeros for empty rows and padding."""
    row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start = tl.load(START + row).to(tl.int64)
    length = tl.load(LENGTH + row)
    token, d = tl.arange(0, BP), tl.arange(0, DP)
    inside = (token < length)[:, None] & (d < D)[None, :]
    keys = tl.load(
        K + (start + token)[:, None] * stride_token + head * stride_head + d[None, :], mask=inside, other=0.0
    )
    mean = tl.sum(keys.to(tl.float32), 0) / tl.maximum(length, 1)
    out = (row.to(tl.int64) * tl.num_programs(1) + head) * DP + d
    tl.store(MEANS + out, mean.to(MEANS.dtype.element_ty))


@triton.jit
def _token_range(FIRST, POSITION, token, valid, num_queries, K: tl.constexpr):
    """First and last (exclusive) candidate row of each token; none for padding."""
    token = tl.minimum(token, num_queries - 1)
    first = tl.load(FIRST + token)
    own = tl.load(POSITION + token) // K
    return first, tl.where(valid, first + own, first)


@triton.jit
def _tile_range(FIRST, POSITION, base, num_queries, K: tl.constexpr, TT: tl.constexpr):
    """(lo, hi, common): candidate rows [lo, hi) of a tile of ascending queries; the first `common` are candidates of all."""
    end = tl.minimum(base + TT, num_queries) - 1
    lo, hi = tl.load(FIRST + base), tl.load(FIRST + end)
    common = tl.where(lo == hi, tl.load(POSITION + base) // K, 0)
    return lo, hi + tl.load(POSITION + end) // K, common


@triton.jit
def _exp2_on_fma(x):
    """2^x for x clamped to [-126, 126], relative error 2.3e-7, by a polynomial: it spares the exponential unit."""
    x = tl.minimum(tl.maximum(x, -126.0), 126.0)
    shifted = x + 12582912.0  # 1.5 x 2^23 leaves the nearest integer in the low bits
    f = x - (shifted - 12582912.0)
    p = 0.0013276470 * f + 0.0096755419
    p = (p * f + 0.0555071346) * f + 0.2402212024
    p = (p * f + 0.6931469440) * f + 1.0
    return (p.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def _halves(x, A: tl.constexpr, B: tl.constexpr, N: tl.constexpr):
    """[A, B, N, 4] -> two of [A, B, N / 2, 4]."""
    return tl.split(tl.permute(tl.reshape(x, [A, B, N // 2, 2, 4]), [0, 1, 2, 4, 3]))


@triton.jit
def _sum_of_exp2(x, A: tl.constexpr, B: tl.constexpr, N: tl.constexpr, FMA_SHARE: tl.constexpr):
    """Sums 2^x over the N x 2 of [A, B, N, 4, 2] -> [A, B, 4]; FMA_SHARE (0, 1, 2 or 4) of 8 terms go by the polynomial.

    In a tensor core's result, a thread holds the columns with equal (n % 8) // 2: the 4. So these sums stay within threads, and so
    does the choice of terms, which depends on the column alone (equal keys stay tied).
    """
    x = tl.reshape(x, [A, B, N, 4, 2])
    if N * FMA_SHARE < 4:  # none, or too few terms to deal out
        total = tl.sum(tl.sum(tl.exp2(x), 4), 2)
    else:
        even, odd = tl.split(x)
        total = tl.sum(tl.exp2(even), 2)
        if FMA_SHARE == 4:
            total += tl.sum(_exp2_on_fma(odd), 2)
        else:
            left, right = _halves(odd, A, B, N)
            total += tl.sum(tl.exp2(left), 2)
            if FMA_SHARE == 2:
                total += tl.sum(_exp2_on_fma(right), 2)
            else:
                left, right = _halves(right, A, B, N // 2)
                total += tl.sum(tl.exp2(left), 2) + tl.sum(_exp2_on_fma(right), 2)
    return total


@triton.jit
def _logits(q, MEANS, row, column, scale_log2):
    """Scaled logits [R, BC] of the block rows from `row` on."""
    return tl.dot(q, tl.trans(MEANS.load([row, column])), input_precision="ieee") * scale_log2


@triton.jit
def _masked_logits(q, MEANS, row, column, scale_log2, first, last, BC: tl.constexpr):
    """The same, -inf where a block row is no candidate of a query's."""
    rows = row + tl.arange(0, BC)[None, :]
    wanted = (rows >= first[:, None]) & (rows < last[:, None])
    return tl.where(wanted, _logits(q, MEANS, row, column, scale_log2), float("-inf"))


@triton.jit(do_not_specialize=["num_queries"])
def softmax_sums_kernel(
    Q,
    MEANS,
    FIRST,
    POSITION,
    LSE,
    num_queries,
    stride_token,
    scale_log2,
    K: tl.constexpr,
    S: tl.constexpr,
    GROUP: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    TT: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
    FMA_SHARE: tl.constexpr,
):
    """LSE[t, g, h] = log2 of the softmax sum; grid (tiles, kv heads), last tiles first."""
    kv_heads = tl.num_programs(1)
    group = tl.program_id(1)
    base = (tl.num_programs(0) - 1 - tl.program_id(0)) * TT
    lo, hi, common = _tile_range(FIRST, POSITION, base, num_queries, K, TT)
    R: tl.constexpr = TT * GP
    r = tl.arange(0, R)
    token, head = base + r // GP, r % GP
    valid = (token < num_queries) & (head < GROUP)
    d = tl.arange(0, DP)
    at = token.to(tl.int64) * stride_token + (group * GROUP + head) * D
    q = tl.load(Q + at[:, None] + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0)
    if hi - lo >= S:
        column = group * DP
        whole = lo + common // BC * BC
        first, last = _token_range(FIRST, POSITION, token, valid, num_queries, K)
        parts = tl.zeros([R, 1, 4], tl.float32)
        for row in tl.range(lo, whole, BC, num_stages=STAGES):
            x = _logits(q, MEANS, row, column, scale_log2)
            parts += _sum_of_exp2(x, R, 1, BC // 8, FMA_SHARE)
        for row in tl.range(whole, hi, BC, num_stages=1):
            x = _masked_logits(q, MEANS, row, column, scale_log2, first, last, BC)
            parts += _sum_of_exp2(x, R, 1, BC // 8, 0)
        total = tl.sum(tl.sum(parts, 2), 1)
        lse = tl.log2(total)
        fine = (total > 1e-20) & (total < 1e37)
        if tl.max(tl.where(fine | (first == last), 0, 1), 0) > 0:
            top = tl.full([R], -1e38, tl.float32)
            total = tl.zeros([R], tl.float32)
            for row in tl.range(lo, hi, BC, num_stages=1):
                x = _masked_logits(q, MEANS, row, column, scale_log2, first, last, BC)
                new_top = tl.maximum(top, tl.max(x, 1))
                total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(x - new_top[:, None]), 1)
                top = new_top
            lse = top + tl.log2(total)
        out = (token.to(tl.int64) * kv_heads + group) * GROUP + head
        tl.store(LSE + out, lse, mask=valid)


@triton.jit(do_not_specialize=["chunk_start", "num_queries"])
def importance_kernel(
    Q,
    MEANS,
    FIRST,
    POSITION,
    LSE,
    IMPORTANCE,
    BINS,
    chunk_start,
    num_queries,
    stride_token,
    stride_list,
    scale_log2,
    K: tl.constexpr,
    S: tl.constexpr,
    GROUP: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    TT: tl.constexpr,
    BC: tl.constexpr,
    SLICE: tl.constexpr,
    STAGES: tl.constexpr,
    FMA_SHARE: tl.constexpr,
    PER_HEAD: tl.constexpr,
    WITH_BINS: tl.constexpr,
):
    """IMPORTANCE[t - chunk_start, list, c] for the chunk's tokens; grid (tiles, kv heads, slices of SLICE block rows).

    WITH_BINS: also the largest importance of every BC-th row of the slice, BINS[t - chunk_start, list, slice, BC], for top-k's threshold; -1
    where there is no candidate.
    """
    kv_heads = tl.num_programs(1)
    group = tl.program_id(1)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    base = chunk_start + tile * TT
    lo, hi, _ = _tile_range(FIRST, POSITION, base, num_queries, K, TT)
    needed = hi - lo >= S
    lo += tl.program_id(2) * SLICE
    hi = tl.minimum(hi, lo + SLICE)
    if needed & (WITH_BINS | (lo < hi)):
        # Columns are ordered so that a thread of the tensor core's result, which holds those with equal (n % 8) // 2, gets whole groups.
        R: tl.constexpr = TT * GP
        n = tl.arange(0, R)
        if PER_HEAD or GP == 1:
            token, head = n // GP, n % GP
        else:
            token = n % 8 // 2 * (TT // 4) + n // (4 * GP)
            head = n // 8 % (GP // 2) * 2 + n % 2
        valid = (base + token < num_queries) & (head < GROUP)
        d = tl.arange(0, DP)
        at = (base + token).to(tl.int64) * stride_token + (group * GROUP + head) * D
        q = tl.load(Q + at[:, None] + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0)
        q = tl.trans(q)
        column = group * DP
        # out_*: the order in which values leave the loop below, one a column of the tile or one a token.
        if PER_HEAD:
            out_token = token
            out_valid = valid
            out_list = (tile * TT + token) * (kv_heads * GROUP) + group * GROUP + head
        else:
            lse_at = ((base + token).to(tl.int64) * kv_heads + group) * GROUP + head
            lse = tl.load(LSE + lse_at, mask=valid, other=float("inf"))
            out_token = tl.arange(0, TT)
            if GP > 1:
                out_token = out_token % 4 * (TT // 4) + out_token // 4
            out_valid = base + out_token < num_queries
            out_list = (tile * TT + out_token) * kv_heads + group
        out_first, out_last = _token_range(FIRST, POSITION, base + out_token, out_valid, num_queries, K)
        out_last = tl.minimum(out_last, out_first + stride_list)  # a document may be longer than max_length says
        out_at = IMPORTANCE + out_list.to(tl.int64) * stride_list - out_first
        bins = tl.full([BC, TT], -1.0, tl.float32)
        for row in tl.range(lo, hi, BC, num_stages=STAGES):
            x = tl.dot(MEANS.load([row, column]), q, input_precision="ieee") * scale_log2
            if not PER_HEAD:
                x = x - lse[None, :]
                if GP > 1:
                    x = tl.reshape(_sum_of_exp2(x, BC, TT // 4, GP // 2, FMA_SHARE), [BC, TT])
                else:
                    x = tl.exp2(x)
            rows = row + tl.arange(0, BC)
            wanted = (rows[:, None] >= out_first[None, :]) & (rows[:, None] < out_last[None, :])
            tl.store(out_at[None, :] + rows[:, None], x, mask=wanted)
            if WITH_BINS:
                bins = tl.maximum(bins, tl.where(wanted, x, -1.0))
        if WITH_BINS:
            at = (out_list.to(tl.int64) * tl.num_programs(2) + tl.program_id(2)) * BC
            tl.store(BINS + at[None, :] + tl.arange(0, BC)[:, None], bins, mask=out_valid[None, :])
