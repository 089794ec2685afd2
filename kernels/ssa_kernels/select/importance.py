"""The importance of each earlier block to each query: block means, softmax sums and importance (Triton).

For query t, kv head g and an earlier block c of t's document, with block means k' and logits x[h, c] = scale log2(e) q[t, h] . k'[c, g]:

    importance[t, g, c] = sum over the group's heads h of 2^(x[h, c] - lse[t, h]),   lse[t, h] = log2 sum_c 2^x[h, c]

It takes three kernels. Nothing of size T x T / K exists: there is one sum per head, and importance is written for one chunk of tokens at a
time, which `topk.py` consumes before the next.

* `block_means_kernel`, one program per (block row, kv head): means in float32, rounded to the keys' dtype, padded with zeros to a power of two
  of features.
* `softmax_sums_kernel`, one program per (tile of 128 / group_size tokens, kv head): queries are the rows of the product, so a row's sum stays
  within its thread. It takes no maximum: logits are small, so 2^x is summed as it is. A tile with a sum outside [1e-20, 1e37] is computed
  again with a running maximum.
* `importance_kernel`, one program per (tile, kv head, slice of the block rows): block rows are the rows of the product. The heads of a group
  are summed within a thread, because the product's columns are ordered such that the tensor core gives every thread whole groups.

The exponential unit is the bound: 2 x T^2 / (2 K) exponentials per head. A tile of tokens may span documents; each token masks by its own
first block row, and tiles within one document (nearly all) need no mask up to the last tile of blocks. Tiles whose tokens see fewer than
top_k blocks are skipped: all their candidates are chosen. The tile boundaries, and with them the order of a sum's terms, depend on the
documents before. So a document's sums agree to a few 1e-7 whatever else is in the batch, but not to the bit, and blocks whose importance
ties within that may be chosen differently.

Not done here: a gradient (selection has none), the choice (topk.py).
"""

import triton
import triton.language as tl


@triton.jit
def block_means_kernel(
    k_ptr,
    start_ptr,
    length_ptr,
    means_ptr,
    stride_token,
    stride_head,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_BLOCK_SIZE: tl.constexpr,
):
    """means[block_row, g, :] = mean of k[start : start + length, g, :]; zeros for empty block rows and padding."""
    block_row, kv_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start = tl.load(start_ptr + block_row).to(tl.int64)
    length = tl.load(length_ptr + block_row)
    token, d = tl.arange(0, PADDED_BLOCK_SIZE), tl.arange(0, DIM)
    inside = (token < length)[:, None] & (d < HEAD_DIM)[None, :]
    keys = tl.load(
        k_ptr + (start + token)[:, None] * stride_token + kv_head * stride_head + d[None, :], mask=inside, other=0.0
    )
    mean = tl.sum(keys.to(tl.float32), 0) / tl.maximum(length, 1)
    out = (block_row.to(tl.int64) * tl.num_programs(1) + kv_head) * DIM + d
    tl.store(means_ptr + out, mean.to(means_ptr.dtype.element_ty))


@triton.jit
def _token_range(
    first_block_row_ptr, position_ptr, token, valid, num_queries, BLOCK_SIZE: tl.constexpr, AHEAD: tl.constexpr = 0
):
    """Returns the first and last (exclusive) candidate block row of each token; no candidate for padding.

    AHEAD = 1: as seen from the next position, where a complete own block is an earlier one.
    """
    token = tl.minimum(token, num_queries - 1)
    first = tl.load(first_block_row_ptr + token)
    own = (tl.load(position_ptr + token) + AHEAD) // BLOCK_SIZE
    return first, tl.where(valid, first + own, first)


@triton.jit
def tile_range(
    first_block_row_ptr,
    position_ptr,
    base,
    num_queries,
    BLOCK_SIZE: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    AHEAD: tl.constexpr = 0,
):
    """Returns (lo, hi, common): candidate block rows [lo, hi) of a tile of ascending queries; the first `common` are candidates of all.

    AHEAD: as in `_token_range`.
    """
    end = tl.minimum(base + TILE_TOKENS, num_queries) - 1
    lo, hi = tl.load(first_block_row_ptr + base), tl.load(first_block_row_ptr + end)
    common = tl.where(lo == hi, tl.load(position_ptr + base) // BLOCK_SIZE, 0)
    return lo, hi + (tl.load(position_ptr + end) + AHEAD) // BLOCK_SIZE, common


@triton.jit
def _exp2_on_fma(x):
    """Returns 2^x for x clamped to [-126, 126], by a polynomial with relative error 2.3e-7, without the exponential unit."""
    x = tl.minimum(tl.maximum(x, -126.0), 126.0)
    shifted = x + 12582912.0  # 1.5 x 2^23 leaves the nearest integer in the low bits
    f = x - (shifted - 12582912.0)
    p = 0.0013276470 * f + 0.0096755419
    p = (p * f + 0.0555071346) * f + 0.2402212024
    p = (p * f + 0.6931469440) * f + 1.0
    return (p.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def _halves(x, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """[A, B, C, 4] -> two of [A, B, C / 2, 4]."""
    return tl.split(tl.permute(tl.reshape(x, [A, B, C // 2, 2, 4]), [0, 1, 2, 4, 3]))


@triton.jit
def _sum_of_exp2(x, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, FMA_SHARE: tl.constexpr):
    """Returns the sums of 2^x over C x 2 of [A, B, C, 4, 2]: [A, B, 4]. FMA_SHARE (0, 1, 2 or 4) of 8 terms use the polynomial.

    In a tensor core's result a thread holds the columns n with equal (n % 8) // 2: the dim of 4. So these sums stay within threads. The
    choice of terms depends only on the column, so equal keys stay tied.
    """
    x = tl.reshape(x, [A, B, C, 4, 2])
    if C * FMA_SHARE < 4:  # none, or too few terms to split
        total = tl.sum(tl.sum(tl.exp2(x), 4), 2)
    else:
        even, odd = tl.split(x)
        total = tl.sum(tl.exp2(even), 2)
        if FMA_SHARE == 4:
            total += tl.sum(_exp2_on_fma(odd), 2)
        else:
            left, right = _halves(odd, A, B, C)
            total += tl.sum(tl.exp2(left), 2)
            if FMA_SHARE == 2:
                total += tl.sum(_exp2_on_fma(right), 2)
            else:
                left, right = _halves(right, A, B, C // 2)
                total += tl.sum(tl.exp2(left), 2) + tl.sum(_exp2_on_fma(right), 2)
    return total


@triton.jit
def _logits(q, means, block_row, column, scale_log2):
    """Returns the scaled logits [TILE_ROWS, TILE_BLOCKS] of the block rows from `block_row` on."""
    return tl.dot(q, tl.trans(means.load([block_row, column])), input_precision="ieee") * scale_log2


@triton.jit
def _masked_logits(q, means, block_row, column, scale_log2, first, last, TILE_BLOCKS: tl.constexpr):
    """Returns the same with -inf where a block row is not a candidate of the query."""
    block_rows = block_row + tl.arange(0, TILE_BLOCKS)[None, :]
    wanted = (block_rows >= first[:, None]) & (block_rows < last[:, None])
    return tl.where(wanted, _logits(q, means, block_row, column, scale_log2), float("-inf"))


@triton.jit(do_not_specialize=["num_queries"])
def softmax_sums_kernel(
    q_ptr,
    means,
    first_block_row_ptr,
    position_ptr,
    lse_ptr,
    num_queries,
    stride_token,
    scale_log2,
    BLOCK_SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
    FMA_SHARE: tl.constexpr,
    OFFICIAL: tl.constexpr,
):
    """lse[t, g, h] = log2 of the softmax sum. Grid: (tiles, kv heads), last tiles first.

    OFFICIAL: the sum also counts the own block, at its last token.
    """
    kv_heads = tl.num_programs(1)
    kv_head = tl.program_id(1)
    base = (tl.num_programs(0) - 1 - tl.program_id(0)) * TILE_TOKENS
    AHEAD: tl.constexpr = 1 if OFFICIAL else 0
    lo, hi, common = tile_range(first_block_row_ptr, position_ptr, base, num_queries, BLOCK_SIZE, TILE_TOKENS, AHEAD)
    TILE_ROWS: tl.constexpr = TILE_TOKENS * PADDED_GROUP
    r = tl.arange(0, TILE_ROWS)
    token, head = base + r // PADDED_GROUP, r % PADDED_GROUP
    valid = (token < num_queries) & (head < GROUP_SIZE)
    d = tl.arange(0, DIM)
    at = token.to(tl.int64) * stride_token + (kv_head * GROUP_SIZE + head) * HEAD_DIM
    q = tl.load(q_ptr + at[:, None] + d[None, :], mask=valid[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    if hi - lo >= TOP_K:
        column = kv_head * DIM
        whole = lo + common // TILE_BLOCKS * TILE_BLOCKS
        first, last = _token_range(first_block_row_ptr, position_ptr, token, valid, num_queries, BLOCK_SIZE, AHEAD)
        parts = tl.zeros([TILE_ROWS, 1, 4], tl.float32)
        for block_row in tl.range(lo, whole, TILE_BLOCKS, num_stages=STAGES):
            x = _logits(q, means, block_row, column, scale_log2)
            parts += _sum_of_exp2(x, TILE_ROWS, 1, TILE_BLOCKS // 8, FMA_SHARE)
        for block_row in tl.range(whole, hi, TILE_BLOCKS, num_stages=1):
            x = _masked_logits(q, means, block_row, column, scale_log2, first, last, TILE_BLOCKS)
            parts += _sum_of_exp2(x, TILE_ROWS, 1, TILE_BLOCKS // 8, 0)
        total = tl.sum(tl.sum(parts, 2), 1)
        lse = tl.log2(total)
        fine = (total > 1e-20) & (total < 1e37)
        if tl.max(tl.where(fine | (first == last), 0, 1), 0) > 0:
            top = tl.full([TILE_ROWS], -1e38, tl.float32)
            total = tl.zeros([TILE_ROWS], tl.float32)
            for block_row in tl.range(lo, hi, TILE_BLOCKS, num_stages=1):
                x = _masked_logits(q, means, block_row, column, scale_log2, first, last, TILE_BLOCKS)
                new_top = tl.maximum(top, tl.max(x, 1))
                total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(x - new_top[:, None]), 1)
                top = new_top
            lse = top + tl.log2(total)
        out = (token.to(tl.int64) * kv_heads + kv_head) * GROUP_SIZE + head
        tl.store(lse_ptr + out, lse, mask=valid)


@triton.jit
def importance_of_tile(
    q_ptr,
    means,
    first_block_row_ptr,
    position_ptr,
    lse_ptr,
    importance_ptr,
    bins_ptr,
    base,
    lo,
    hi,
    kv_head,
    kv_heads,
    row,
    row_step,
    num_queries,
    stride_token,
    stride_list,
    scale_log2,
    BLOCK_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
    FMA_SHARE: tl.constexpr,
    PER_HEAD: tl.constexpr,
    WITH_BINS: tl.constexpr,
):
    """Writes the importance of the block rows [lo, hi) to the tile of tokens from `base` on, and their bins.

    The tile's first row of the workspace is `row`, the next token's `row + row_step`; with PER_HEAD each counts GROUP_SIZE rows.
    """
    # A thread of the tensor core's result holds the columns n with equal (n % 8) // 2. This order gives it whole groups.
    TILE_ROWS: tl.constexpr = TILE_TOKENS * PADDED_GROUP
    n = tl.arange(0, TILE_ROWS)
    if PER_HEAD or PADDED_GROUP == 1:
        token, head = n // PADDED_GROUP, n % PADDED_GROUP
    else:
        token = n % 8 // 2 * (TILE_TOKENS // 4) + n // (4 * PADDED_GROUP)
        head = n // 8 % (PADDED_GROUP // 2) * 2 + n % 2
    valid = (base + token < num_queries) & (head < GROUP_SIZE)
    d = tl.arange(0, DIM)
    at = (base + token).to(tl.int64) * stride_token + (kv_head * GROUP_SIZE + head) * HEAD_DIM
    q = tl.load(q_ptr + at[:, None] + d[None, :], mask=valid[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    q = tl.trans(q)
    column = kv_head * DIM
    # out_*: the order of the values in the loop below, one per column of the tile or one per token.
    if PER_HEAD:
        out_token = token
        out_valid = valid
        out_list = (row + token * row_step) * GROUP_SIZE + head
    else:
        lse_at = ((base + token).to(tl.int64) * kv_heads + kv_head) * GROUP_SIZE + head
        lse = tl.load(lse_ptr + lse_at, mask=valid, other=float("inf"))
        out_token = tl.arange(0, TILE_TOKENS)
        if PADDED_GROUP > 1:
            out_token = out_token % 4 * (TILE_TOKENS // 4) + out_token // 4
        out_valid = base + out_token < num_queries
        out_list = row + out_token * row_step
    out_first, out_last = _token_range(
        first_block_row_ptr, position_ptr, base + out_token, out_valid, num_queries, BLOCK_SIZE
    )
    out_last = tl.minimum(out_last, out_first + stride_list)  # a document may exceed max_length
    out_at = importance_ptr + out_list.to(tl.int64) * stride_list - out_first
    bins = tl.full([TILE_BLOCKS, TILE_TOKENS], -1.0, tl.float32)
    for block_row in tl.range(lo, hi, TILE_BLOCKS, num_stages=STAGES):
        x = tl.dot(means.load([block_row, column]), q, input_precision="ieee") * scale_log2
        if not PER_HEAD:
            x = x - lse[None, :]
            if PADDED_GROUP > 1:
                x = tl.reshape(
                    _sum_of_exp2(x, TILE_BLOCKS, TILE_TOKENS // 4, PADDED_GROUP // 2, FMA_SHARE),
                    [TILE_BLOCKS, TILE_TOKENS],
                )
            else:
                x = tl.exp2(x)
        block_rows = block_row + tl.arange(0, TILE_BLOCKS)
        wanted = (block_rows[:, None] >= out_first[None, :]) & (block_rows[:, None] < out_last[None, :])
        tl.store(out_at[None, :] + block_rows[:, None], x, mask=wanted)
        if WITH_BINS:
            bins = tl.maximum(bins, tl.where(wanted, x, -1.0))
    if WITH_BINS:
        at = (out_list.to(tl.int64) * tl.num_programs(2) + tl.program_id(2)) * TILE_BLOCKS
        tl.store(bins_ptr + at[None, :] + tl.arange(0, TILE_BLOCKS)[:, None], bins, mask=out_valid[None, :])


@triton.jit(do_not_specialize=["chunk_start", "num_queries"])
def importance_kernel(
    q_ptr,
    means,
    first_block_row_ptr,
    position_ptr,
    lse_ptr,
    importance_ptr,
    bins_ptr,
    chunk_start,
    num_queries,
    stride_token,
    stride_list,
    scale_log2,
    BLOCK_SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    SLICE: tl.constexpr,
    STAGES: tl.constexpr,
    FMA_SHARE: tl.constexpr,
    PER_HEAD: tl.constexpr,
    WITH_BINS: tl.constexpr,
):
    """importance[t - chunk_start, list, c] for the chunk's tokens. Grid: (tiles, kv heads, slices of SLICE block rows).

    WITH_BINS: also the largest importance of every TILE_BLOCKS-th block row of the slice, for top-k's threshold, in
    bins[t - chunk_start, list, slice, TILE_BLOCKS]; -1 where there is no candidate.
    """
    kv_heads = tl.num_programs(1)
    kv_head = tl.program_id(1)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    base = chunk_start + tile * TILE_TOKENS
    lo, hi, _ = tile_range(first_block_row_ptr, position_ptr, base, num_queries, BLOCK_SIZE, TILE_TOKENS)
    needed = hi - lo >= TOP_K
    lo += tl.program_id(2) * SLICE
    hi = tl.minimum(hi, lo + SLICE)
    if needed & (WITH_BINS | (lo < hi)):
        importance_of_tile(
            q_ptr, means, first_block_row_ptr, position_ptr, lse_ptr, importance_ptr, bins_ptr,
            base, lo, hi, kv_head, kv_heads, tile * TILE_TOKENS * kv_heads + kv_head, kv_heads,
            num_queries, stride_token, stride_list, scale_log2,
            BLOCK_SIZE, GROUP_SIZE, PADDED_GROUP, HEAD_DIM, DIM, TILE_TOKENS, TILE_BLOCKS, STAGES, FMA_SHARE, PER_HEAD, WITH_BINS,
        )  # fmt: skip
