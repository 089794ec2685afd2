"""The gradients of the scorer's loss (Triton).

With z[j, s] the index scores of a query, p[j, s] their softmax for index head j of J, P[c] the block mass (the mean over j), t the target and
r[c] = t[c] / P[c] (0 for a query that has nothing to choose):

    d loss / d z[j, s] = p[j, s] (a[j] - r[c(s)]) / J,    a[j] = sum over s of p[j, s] r[c(s)]

r is passed as its logarithm, because p r is bounded by J t while r alone is not. Three kernels, each with a fixed order of sums:

* `ratio_sums_kernel`, one program per (tile of queries, kv head): a. (In one kernel with the next, Triton 3.7 fails to compile two loops.)
* `query_gradient_kernel`, by the same programs: d iq = scale sum_s dz[s] ik[s].
* `key_gradient_kernel`, one program per (step of block rows, kv head): d ik[s] = scale sum over the later queries of dz[s] iq. It adds to what
  earlier chunks of queries have left, in fp32.

The results are the gradients of the sum over queries and kv heads. Products are in iq's dtype with fp32 sums, as in attention's backward.
"""

import triton
import triton.language as tl

from .mass_triton import NOTHING, block_rows_of_tile, logits_of_step, step_of_keys, tile_of_queries


@triton.jit
def _ratio_of_step(
    ratio_ptr, token, first, own_key, start, valid, row, first_query, stride_list, kv_head, KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PADDED_BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Returns log2 of r of each key's block, [ROWS, KEYS], or [ROWS, 1] if all keys are of one block; NOTHING where there is none.

    Every key loads its block's number, from the first-level cache.
    """
    if BLOCK_ROWS == 1:
        column = row - first[:, None]
    else:
        column = row + (tl.arange(0, BLOCK_ROWS * PADDED_BLOCK) // PADDED_BLOCK)[None, :] - first[:, None]
    last = (own_key - start) // BLOCK_SIZE
    inside = valid[:, None] & (column >= 0) & (column <= last[:, None]) & (column < stride_list)
    at = ((token - first_query).to(tl.int64) * KV_HEADS + kv_head) * stride_list
    return tl.load(ratio_ptr + at[:, None] + column, mask=inside, other=NOTHING)


@triton.jit(do_not_specialize=["first_query", "num_queries", "stride_list"])
def ratio_sums_kernel(
    q_ptr,
    k_ptr,
    first_block_row_ptr,
    position_ptr,
    start_ptr,
    block_start_ptr,
    block_length_ptr,
    lse_ptr,
    ratio_ptr,
    sums_ptr,
    first_query,
    num_queries,
    stride_list,
    scale_log2,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PADDED_BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TOP_K: tl.constexpr,
):
    """sums[t, g, j] = a of the queries [first_query, num_queries). Grid: (tiles, kv heads), last tiles first."""
    kv_head = tl.program_id(1).to(tl.int64)
    base = first_query + (tl.num_programs(0) - 1 - tl.program_id(0)) * TILE_TOKENS
    lo, hi, most = block_rows_of_tile(first_block_row_ptr, position_ptr, base, num_queries, BLOCK_SIZE, TILE_TOKENS)
    if most >= TOP_K:
        q, token, head, first, start, own_key, valid = tile_of_queries(
            q_ptr, first_block_row_ptr, position_ptr, start_ptr, base, num_queries, kv_head,
            KV_HEADS, GROUP_SIZE, PADDED_GROUP, HEAD_DIM, DIM, TILE_TOKENS,
        )  # fmt: skip
        at = (token.to(tl.int64) * KV_HEADS + kv_head) * GROUP_SIZE + head
        lse = tl.load(lse_ptr + at, mask=valid, other=0.0)
        total = tl.zeros([TILE_TOKENS * PADDED_GROUP], tl.float32)
        for row in range(lo, hi, BLOCK_ROWS):
            k, key, exists = step_of_keys(
                k_ptr, block_start_ptr, block_length_ptr, row, hi, kv_head, KV_HEADS, PADDED_BLOCK, BLOCK_ROWS, HEAD_DIM, DIM
            )  # fmt: skip
            x = logits_of_step(q, k, key, exists, start, own_key, valid, scale_log2) - lse[:, None]
            ratio = _ratio_of_step(
                ratio_ptr, token, first, own_key, start, valid, row, first_query, stride_list, kv_head, KV_HEADS, BLOCK_SIZE,
                PADDED_BLOCK, BLOCK_ROWS,
            )  # fmt: skip
            total += tl.sum(tl.exp2(x + ratio), 1)
        tl.store(sums_ptr + at, total, mask=valid)


@triton.jit(do_not_specialize=["first_query", "num_queries", "stride_list"])
def query_gradient_kernel(
    q_ptr,
    k_ptr,
    first_block_row_ptr,
    position_ptr,
    start_ptr,
    block_start_ptr,
    block_length_ptr,
    lse_ptr,
    ratio_ptr,
    sums_ptr,
    grad_ptr,
    first_query,
    num_queries,
    stride_list,
    scale_log2,
    scale,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PADDED_BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TOP_K: tl.constexpr,
):
    """grad[t, g, j, :] of the queries [first_query, num_queries). Grid: (tiles, kv heads), last tiles first."""
    kv_head = tl.program_id(1).to(tl.int64)
    base = first_query + (tl.num_programs(0) - 1 - tl.program_id(0)) * TILE_TOKENS
    lo, hi, most = block_rows_of_tile(first_block_row_ptr, position_ptr, base, num_queries, BLOCK_SIZE, TILE_TOKENS)
    if most >= TOP_K:
        q, token, head, first, start, own_key, valid = tile_of_queries(
            q_ptr, first_block_row_ptr, position_ptr, start_ptr, base, num_queries, kv_head,
            KV_HEADS, GROUP_SIZE, PADDED_GROUP, HEAD_DIM, DIM, TILE_TOKENS,
        )  # fmt: skip
        at = (token.to(tl.int64) * KV_HEADS + kv_head) * GROUP_SIZE + head
        lse = tl.load(lse_ptr + at, mask=valid, other=0.0)
        total = tl.load(sums_ptr + at, mask=valid, other=0.0)
        grad = tl.zeros([TILE_TOKENS * PADDED_GROUP, DIM], tl.float32)
        for row in range(lo, hi, BLOCK_ROWS):
            k, key, exists = step_of_keys(
                k_ptr, block_start_ptr, block_length_ptr, row, hi, kv_head, KV_HEADS, PADDED_BLOCK, BLOCK_ROWS, HEAD_DIM, DIM
            )  # fmt: skip
            x = logits_of_step(q, k, key, exists, start, own_key, valid, scale_log2) - lse[:, None]
            ratio = _ratio_of_step(
                ratio_ptr, token, first, own_key, start, valid, row, first_query, stride_list, kv_head, KV_HEADS, BLOCK_SIZE,
                PADDED_BLOCK, BLOCK_ROWS,
            )  # fmt: skip
            dz = tl.exp2(x) * total[:, None] - tl.exp2(x + ratio)
            grad = tl.dot(dz.to(k.dtype), k, grad, input_precision="ieee")
        d = tl.arange(0, DIM)
        inside = valid[:, None] & (d < HEAD_DIM)[None, :]
        tl.store(grad_ptr + at[:, None] * HEAD_DIM + d[None, :], grad * (scale / GROUP_SIZE), mask=inside)


@triton.jit(do_not_specialize=["first_query", "num_queries", "stride_list", "num_block_rows"])
def key_gradient_kernel(
    q_ptr,
    k_ptr,
    first_block_row_ptr,
    position_ptr,
    start_ptr,
    block_start_ptr,
    block_length_ptr,
    lse_ptr,
    ratio_ptr,
    sums_ptr,
    grad_ptr,
    begin_ptr,
    end_ptr,
    first_query,
    num_queries,
    stride_list,
    num_block_rows,
    scale_log2,
    scale,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PADDED_BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TOP_K: tl.constexpr,
):
    """grad[s, g, :] += what the queries [first_query, num_queries) give. Grid: (steps of BLOCK_ROWS block rows, kv heads).

    begin and end [R]: the queries of the block row's document from its first key on, which are the only ones that see it.
    """
    kv_head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_ROWS
    rows = row + tl.arange(0, BLOCK_ROWS)
    used = rows < num_block_rows
    begin = tl.maximum(tl.min(tl.load(begin_ptr + rows, mask=used, other=2147483647), 0), first_query)
    end = tl.minimum(tl.max(tl.load(end_ptr + rows, mask=used, other=0), 0), num_queries)
    if begin < end:
        k, key, exists = step_of_keys(
            k_ptr, block_start_ptr, block_length_ptr, row, num_block_rows, kv_head, KV_HEADS, PADDED_BLOCK, BLOCK_ROWS, HEAD_DIM, DIM
        )  # fmt: skip
        d = tl.arange(0, DIM)
        out = grad_ptr + ((key.to(tl.int64) * KV_HEADS + kv_head) * HEAD_DIM)[:, None] + d[None, :]
        inside = exists[:, None] & (d < HEAD_DIM)[None, :]
        grad = tl.zeros([BLOCK_ROWS * PADDED_BLOCK, DIM], tl.float32)
        for base in range(begin, end, TILE_TOKENS):
            _, _, most = block_rows_of_tile(
                first_block_row_ptr, position_ptr, base, num_queries, BLOCK_SIZE, TILE_TOKENS
            )
            if most >= TOP_K:
                q, token, head, first, start, own_key, valid = tile_of_queries(
                    q_ptr, first_block_row_ptr, position_ptr, start_ptr, base, num_queries, kv_head,
                    KV_HEADS, GROUP_SIZE, PADDED_GROUP, HEAD_DIM, DIM, TILE_TOKENS,
                )  # fmt: skip
                valid = valid & ((own_key - start) // BLOCK_SIZE >= TOP_K)  # the others' tiles may be unwritten
                at = (token.to(tl.int64) * KV_HEADS + kv_head) * GROUP_SIZE + head
                lse = tl.load(lse_ptr + at, mask=valid, other=0.0)
                total = tl.load(sums_ptr + at, mask=valid, other=0.0)
                x = logits_of_step(q, k, key, exists, start, own_key, valid, scale_log2) - lse[:, None]
                ratio = _ratio_of_step(
                    ratio_ptr, token, first, own_key, start, valid, row, first_query, stride_list, kv_head, KV_HEADS, BLOCK_SIZE,
                PADDED_BLOCK, BLOCK_ROWS,
                )  # fmt: skip
                dz = tl.exp2(x) * total[:, None] - tl.exp2(x + ratio)
                grad = tl.dot(tl.trans(dz).to(q.dtype), q, grad, input_precision="ieee")
        grad = grad * (scale / GROUP_SIZE) + tl.load(out, mask=inside, other=0.0)
        tl.store(out, grad, mask=inside)
