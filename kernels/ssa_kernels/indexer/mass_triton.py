"""The logarithm of the share of attention on each block, for a chunk of queries, and of the sums that make it up (Triton).

For query t, kv head g and a block c of t's document up to its own, over the group's heads h, with x[h, s] = scale log2(e) q[t, h] . k[s, g]:

    mass[t, g, c] = ln of the mean over h of  sum over the keys s <= t of block c of 2^(x[h, s] - lse[t, h]),   lse[t, h] = log2 sum over s <= t of 2^x[h, s]

One program per (tile of 64 or 128 / padded group_size tokens, kv head) walks its keys twice: a running maximum and sum for lse, then the sums by block.
Rows of the product are (token, head) pairs, columns the keys of one or several whole block rows, so a block's sum is a reshape away. Two products
of T^2 / 2 x D per head, about what full attention's forward costs; nothing of size T x T exists. Order of sums is fixed: deterministic.

Most steps of a tile are *inner*: all its queries are of one document and see every key of the step. These steps mask nothing and read keys that lie side
by side; only the others look keys up by block rows.

With one head per kv head, ln of the sum over a block of 2^x differs from its mass by lse only, the same for all of a query's blocks. It ranks them
alike, needs one walk, and no step of keys needs another: the walk is split over programs. The loss subtracts lse later (terms_triton.py).

Not done here: taking lse from full attention, which would save one product (its operators keep it to themselves), and a gradient.
"""

import triton
import triton.language as tl

NOTHING = tl.constexpr(-1e30)  # the logit of a key that a query does not see, and the log of no mass
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tile_of_queries(
    q_ptr, first_block_row_ptr, position_ptr, start_ptr, base, num_queries, kv_head, KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr, PADDED_GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TILE_TOKENS: tl.constexpr,
):  # fmt: skip
    """Returns (q [ROWS, DIM], token, head, first block row, start and own key of the document, valid), each of the last ones [ROWS]."""
    r = tl.arange(0, TILE_TOKENS * PADDED_GROUP)
    token, head = base + r // PADDED_GROUP, r % PADDED_GROUP
    valid = (token < num_queries) & (head < GROUP_SIZE)
    held = tl.minimum(token, num_queries - 1)
    d = tl.arange(0, DIM)
    at = (held.to(tl.int64) * KV_HEADS + kv_head) * GROUP_SIZE + tl.minimum(head, GROUP_SIZE - 1)
    q = tl.load(q_ptr + at[:, None] * HEAD_DIM + d[None, :], mask=valid[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    start = tl.load(start_ptr + held)
    return q, held, head, tl.load(first_block_row_ptr + held), start, start + tl.load(position_ptr + held), valid


@triton.jit
def step_of_keys(
    k_ptr, block_start_ptr, block_length_ptr, row, end_row, kv_head, KV_HEADS: tl.constexpr, PADDED_BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Returns (k [KEYS, DIM], number of each key, whether it exists) of the BLOCK_ROWS block rows from `row` on."""
    j = tl.arange(0, BLOCK_ROWS * PADDED_BLOCK)
    rows, place = row + j // PADDED_BLOCK, j % PADDED_BLOCK
    exists = rows < end_row
    key = tl.load(block_start_ptr + rows, mask=exists, other=0) + place
    exists = exists & (place < tl.load(block_length_ptr + rows, mask=exists, other=0))
    d = tl.arange(0, DIM)
    at = (key.to(tl.int64) * KV_HEADS + kv_head) * HEAD_DIM
    k = tl.load(k_ptr + at[:, None] + d[None, :], mask=exists[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    return k, key, exists


@triton.jit
def logits_of_step(q, k, key, exists, start, own_key, valid, scale_log2):
    """Returns the scaled logits [ROWS, KEYS], NOTHING where the query does not see the key."""
    seen = exists[None, :] & valid[:, None] & (key[None, :] >= start[:, None]) & (key[None, :] <= own_key[:, None])
    return tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2, NOTHING)


@triton.jit
def block_rows_of_tile(
    first_block_row_ptr, position_ptr, base, num_queries, BLOCK_SIZE: tl.constexpr, TILE_TOKENS: tl.constexpr
):
    """Returns the block rows [lo, hi) that a tile of ascending queries sees, and the largest number of a query's own block."""
    token = tl.minimum(base + tl.arange(0, TILE_TOKENS), num_queries - 1)
    first, own = tl.load(first_block_row_ptr + token), tl.load(position_ptr + token) // BLOCK_SIZE
    return tl.min(first, 0), tl.max(first + own, 0) + 1, tl.max(own, 0)


@triton.jit
def inner_rows_of_tile(
    first_block_row_ptr, position_ptr, start_ptr, base, num_queries, BLOCK_SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
):  # fmt: skip
    """Returns the number of block rows in inner steps, counted from the tile's first block row, and the first key of that row."""
    token = tl.minimum(base + tl.arange(0, TILE_TOKENS), num_queries - 1)
    first, own = tl.load(first_block_row_ptr + token), tl.load(position_ptr + token) // BLOCK_SIZE
    rows = tl.where(tl.min(first, 0) == tl.max(first, 0), tl.min(own, 0), 0)
    return rows // BLOCK_ROWS * BLOCK_ROWS, tl.min(tl.load(start_ptr + token), 0)


@triton.jit
def logits_of_inner_step(
    q, k_ptr, first_key, kv_head, scale_log2, KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, PADDED_BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Returns the scaled logits [ROWS, KEYS] of BLOCK_ROWS whole blocks from `first_key` on, which every query sees."""
    j, d = tl.arange(0, BLOCK_ROWS * PADDED_BLOCK), tl.arange(0, DIM)
    key = first_key + j // PADDED_BLOCK * BLOCK_SIZE + j % PADDED_BLOCK
    at = k_ptr + ((key.to(tl.int64) * KV_HEADS + kv_head) * HEAD_DIM)[:, None] + d[None, :]
    exists = j % PADDED_BLOCK < BLOCK_SIZE
    if HEAD_DIM == DIM and BLOCK_SIZE == PADDED_BLOCK:
        k = tl.load(at)
    else:
        k = tl.load(at, mask=exists[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    x = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    return x if BLOCK_SIZE == PADDED_BLOCK else tl.where(exists[None, :], x, NOTHING)


@triton.jit
def _added(x, top, total):
    """Returns the running maximum and sum of 2^x of each row with a step's logits included."""
    new_top = tl.maximum(top, tl.max(x, 1))
    return new_top, total * tl.exp2(top - new_top) + tl.sum(tl.exp2(x - new_top[:, None]), 1)


@triton.jit
def _log2_block_sums(x, ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, PADDED_BLOCK: tl.constexpr):
    """Returns log2 of the sums of 2^x over each block, [ROWS, BLOCK_ROWS]."""
    x = tl.reshape(x, [ROWS, BLOCK_ROWS, PADDED_BLOCK])
    top = tl.max(x, 2)
    return top + tl.log2(tl.sum(tl.exp2(x - top[:, :, None]), 2))


@triton.jit
def _mass_of_step(
    x, lse, valid, TILE_TOKENS: tl.constexpr, PADDED_GROUP: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    PADDED_BLOCK: tl.constexpr,
):  # fmt: skip
    """Returns ln of the block mass of a step's logits, [TILE_TOKENS, BLOCK_ROWS]."""
    of_block = _log2_block_sums(x, TILE_TOKENS * PADDED_GROUP, BLOCK_ROWS, PADDED_BLOCK) - lse[:, None]
    of_block = tl.where(valid[:, None], of_block, 2 * NOTHING)
    of_block = tl.reshape(of_block, [TILE_TOKENS, PADDED_GROUP, BLOCK_ROWS])
    largest = tl.max(of_block, 1)
    mean = tl.sum(tl.exp2(of_block - largest[:, None, :]), 1) / GROUP_SIZE
    return (largest + tl.log2(mean)) * LN2


@triton.jit(do_not_specialize=["first_query", "num_queries", "stride_list"])
def log_block_mass_kernel(
    q_ptr,
    k_ptr,
    first_block_row_ptr,
    position_ptr,
    start_ptr,
    block_start_ptr,
    block_length_ptr,
    lse_ptr,
    mass_ptr,
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
    """mass[t - first_query, g, c] for the queries [first_query, num_queries) and lse[t, g, h]. Grid: (tiles, kv heads), last tiles first.

    Tiles whose queries all have at most TOP_K blocks up to their own stay unwritten: nothing is chosen there. TOP_K = 0 writes all.
    """
    kv_head = tl.program_id(1).to(tl.int64)
    base = first_query + (tl.num_programs(0) - 1 - tl.program_id(0)) * TILE_TOKENS
    lo, hi, most = block_rows_of_tile(first_block_row_ptr, position_ptr, base, num_queries, BLOCK_SIZE, TILE_TOKENS)
    if most >= TOP_K:
        ROWS: tl.constexpr = TILE_TOKENS * PADDED_GROUP
        q, token, head, _, start, own_key, valid = tile_of_queries(
            q_ptr, first_block_row_ptr, position_ptr, start_ptr, base, num_queries, kv_head,
            KV_HEADS, GROUP_SIZE, PADDED_GROUP, HEAD_DIM, DIM, TILE_TOKENS,
        )  # fmt: skip
        inner, first_key = inner_rows_of_tile(
            first_block_row_ptr, position_ptr, start_ptr, base, num_queries, BLOCK_SIZE, BLOCK_ROWS, TILE_TOKENS
        )  # fmt: skip
        top = tl.full([ROWS], NOTHING / 10, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for row in range(0, inner, BLOCK_ROWS):
            x = logits_of_inner_step(
                q, k_ptr, first_key + row * BLOCK_SIZE, kv_head, scale_log2, KV_HEADS, BLOCK_SIZE, PADDED_BLOCK, BLOCK_ROWS, HEAD_DIM, DIM
            )  # fmt: skip
            top, total = _added(x, top, total)
        for row in range(lo + inner, hi, BLOCK_ROWS):
            k, key, exists = step_of_keys(
                k_ptr, block_start_ptr, block_length_ptr, row, hi, kv_head, KV_HEADS, PADDED_BLOCK, BLOCK_ROWS, HEAD_DIM, DIM
            )  # fmt: skip
            x = logits_of_step(q, k, key, exists, start, own_key, valid, scale_log2)
            top, total = _added(x, top, total)
        lse = top + tl.log2(tl.maximum(total, 1e-37))
        tl.store(lse_ptr + (token.to(tl.int64) * KV_HEADS + kv_head) * GROUP_SIZE + head, lse, mask=valid)
        tokens = base + tl.arange(0, TILE_TOKENS)
        held = tl.minimum(tokens, num_queries - 1)
        first_row = tl.load(first_block_row_ptr + held)
        last_row = first_row + tl.load(position_ptr + held) // BLOCK_SIZE
        out = mass_ptr + ((tokens - first_query).to(tl.int64) * KV_HEADS + kv_head) * stride_list - first_row
        for row in range(0, inner, BLOCK_ROWS):
            x = logits_of_inner_step(
                q, k_ptr, first_key + row * BLOCK_SIZE, kv_head, scale_log2, KV_HEADS, BLOCK_SIZE, PADDED_BLOCK, BLOCK_ROWS, HEAD_DIM, DIM
            )  # fmt: skip
            mass = _mass_of_step(x, lse, valid, TILE_TOKENS, PADDED_GROUP, GROUP_SIZE, BLOCK_ROWS, PADDED_BLOCK)
            rows = lo + row + tl.arange(0, BLOCK_ROWS)
            wanted = (tokens < num_queries)[:, None] & (rows[None, :] < first_row[:, None] + stride_list)
            tl.store(out[:, None] + rows[None, :], mass, mask=wanted)
        for row in range(lo + inner, hi, BLOCK_ROWS):
            k, key, exists = step_of_keys(
                k_ptr, block_start_ptr, block_length_ptr, row, hi, kv_head, KV_HEADS, PADDED_BLOCK, BLOCK_ROWS, HEAD_DIM, DIM
            )  # fmt: skip
            x = logits_of_step(q, k, key, exists, start, own_key, valid, scale_log2)
            mass = _mass_of_step(x, lse, valid, TILE_TOKENS, PADDED_GROUP, GROUP_SIZE, BLOCK_ROWS, PADDED_BLOCK)
            rows = row + tl.arange(0, BLOCK_ROWS)
            wanted = (tokens < num_queries)[:, None] & (rows[None, :] >= first_row[:, None])
            wanted &= (rows[None, :] <= last_row[:, None]) & (rows[None, :] < first_row[:, None] + stride_list)
            tl.store(out[:, None] + rows[None, :], mass, mask=wanted)


@triton.jit(do_not_specialize=["first_query", "num_queries", "stride_list"])
def log_block_sums_kernel(
    q_ptr,
    k_ptr,
    first_block_row_ptr,
    position_ptr,
    start_ptr,
    block_start_ptr,
    block_length_ptr,
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
    """sums[t - first_query, g, c] = ln of the sum over the keys s <= t of block c of 2^x[t, s]. Grid: (tiles, kv heads, parts), last tiles first.

    One head per kv head. Each part takes neighbouring steps of keys; the results do not depend on the number of parts. Unwritten as in the kernel above.
    """
    tl.static_assert(GROUP_SIZE == 1)
    kv_head = tl.program_id(1).to(tl.int64)
    base = first_query + (tl.num_programs(0) - 1 - tl.program_id(0)) * TILE_TOKENS
    lo, hi, most = block_rows_of_tile(first_block_row_ptr, position_ptr, base, num_queries, BLOCK_SIZE, TILE_TOKENS)
    part_rows = tl.cdiv(hi - lo, tl.num_programs(2) * BLOCK_ROWS) * BLOCK_ROWS
    begin = tl.program_id(2) * part_rows
    end = tl.minimum(hi - lo, begin + part_rows)
    if (most >= TOP_K) & (begin < end):
        q, token, _, first_row, start, own_key, valid = tile_of_queries(
            q_ptr, first_block_row_ptr, position_ptr, start_ptr, base, num_queries, kv_head,
            KV_HEADS, GROUP_SIZE, PADDED_GROUP, HEAD_DIM, DIM, TILE_TOKENS,
        )  # fmt: skip
        inner, first_key = inner_rows_of_tile(
            first_block_row_ptr, position_ptr, start_ptr, base, num_queries, BLOCK_SIZE, BLOCK_ROWS, TILE_TOKENS
        )  # fmt: skip
        out = sums_ptr + ((token - first_query).to(tl.int64) * KV_HEADS + kv_head) * stride_list - first_row
        for row in range(begin, tl.minimum(end, inner), BLOCK_ROWS):
            x = logits_of_inner_step(
                q, k_ptr, first_key + row * BLOCK_SIZE, kv_head, scale_log2, KV_HEADS, BLOCK_SIZE, PADDED_BLOCK, BLOCK_ROWS, HEAD_DIM, DIM
            )  # fmt: skip
            sums = _log2_block_sums(x, TILE_TOKENS, BLOCK_ROWS, PADDED_BLOCK) * LN2
            rows = lo + row + tl.arange(0, BLOCK_ROWS)
            wanted = valid[:, None] & (rows[None, :] < first_row[:, None] + stride_list)
            tl.store(out[:, None] + rows[None, :], sums, mask=wanted)
        last_row = first_row + (own_key - start) // BLOCK_SIZE
        for row in range(lo + tl.maximum(begin, inner), lo + end, BLOCK_ROWS):
            k, key, exists = step_of_keys(
                k_ptr, block_start_ptr, block_length_ptr, row, hi, kv_head, KV_HEADS, PADDED_BLOCK, BLOCK_ROWS, HEAD_DIM, DIM
            )  # fmt: skip
            x = logits_of_step(q, k, key, exists, start, own_key, valid, scale_log2)
            sums = _log2_block_sums(x, TILE_TOKENS, BLOCK_ROWS, PADDED_BLOCK) * LN2
            rows = row + tl.arange(0, BLOCK_ROWS)
            wanted = valid[:, None] & (rows[None, :] >= first_row[:, None])
            wanted &= (rows[None, :] <= last_row[:, None]) & (rows[None, :] < first_row[:, None] + stride_list)
            tl.store(out[:, None] + rows[None, :], sums, mask=wanted)
