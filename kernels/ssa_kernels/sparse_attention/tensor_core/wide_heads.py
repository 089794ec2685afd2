"""dK and dV on tensor cores for heads wider than 64, and for up to 16 heads per list: rows of q and dO go through shared memory (Gluon).

The mathematics, the grid and the sums are those of backward.py's dkdv_kernel, where a step's rows wait in registers. At D 128 the sums of dk
and dv alone take 128 registers per thread and K and V take 64, so the compiler would spill. Here the rows are copied into a ring of STAGES
buffers (cp.async, which needs no registers), STAGES - 1 steps ahead of their use, and read from there in both orientations (ldmatrix, plain
and transposed). d keeps its natural order.

From D 256 on even that is too much for one warp per 16 keys. COLUMN_WARPS warps then share 16 keys: in s^T and dp^T each has a part of a
step's rows, in dk and dv a part of the columns. The weights move between them through shared memory. A program takes KEYS of the block's keys.

One turn of the ring: wait until this step's copy has landed (the compiler adds a barrier, after which every warp has also read the previous
step), copy into the buffer that the previous step has freed, compute.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from .fragments import LOG2E, mma_layout, weights_as_left
from .segment import entries, head_of_row, segment_of_program

# Triton 3.8 renamed it, and 3.9 has no other name. The kernel calls it with what both take.
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.constexpr_function
def copy_layout(dim, warps):
    """Returns the layout of rows [n, dim] in pieces of 16 bytes, with neighbouring lanes along a row."""
    return gl.BlockedLayout([1, 8], [256 // dim, dim // 8], [warps, 1], [1, 0])


@gluon.jit
def _rows_of(
    ptr,
    entry,
    WIDTH: gl.constexpr,
    HEADS: gl.constexpr,
    ENTRY_ROWS: gl.constexpr,
    STEP_ROWS: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Returns pointers to the rows [STEP_ROWS] of entries in an array with WIDTH elements per head."""
    head = head_of_row(HEADS, ENTRY_ROWS, STEP_ROWS, LAYOUT)
    if STEP_ROWS == ENTRY_ROWS:  # one entry, a scalar, so what differs between rows is loop-invariant
        return ptr + entry.to(gl.int64) * (HEADS * WIDTH) + head * WIDTH
    else:
        return ptr + (entry.to(gl.int64) * HEADS + head) * WIDTH


@gluon.jit
def _copy_rows(
    q_ptr, do_ptr, q_buffer, do_buffer, entry,
    HEADS: gl.constexpr, ENTRY_ROWS: gl.constexpr, STEP_ROWS: gl.constexpr, HEAD_DIM: gl.constexpr, DIM: gl.constexpr, COPY: gl.constexpr,
):  # fmt: skip
    """Starts the copy of a step's rows into its buffers."""
    dim = gl.arange(0, DIM, gl.SliceLayout(0, COPY))[None, :]
    q = _rows_of(q_ptr, entry, HEAD_DIM, HEADS, ENTRY_ROWS, STEP_ROWS, gl.SliceLayout(1, COPY))[:, None] + dim
    do = _rows_of(do_ptr, entry, HEAD_DIM, HEADS, ENTRY_ROWS, STEP_ROWS, gl.SliceLayout(1, COPY))[:, None] + dim
    if HEAD_DIM == DIM:
        async_load(q_buffer, q)
        async_load(do_buffer, do)
    else:
        inside = (gl.zeros([STEP_ROWS, DIM], gl.int32, COPY) + dim) < HEAD_DIM
        async_load(q_buffer, q, mask=inside)
        async_load(do_buffer, do, mask=inside)
    async_copy.commit_group()


@gluon.jit
def _load_columns(
    lse_ptr, delta_ptr, query_key_ptr, entry, used,
    LISTS: gl.constexpr, HEADS: gl.constexpr, ENTRY_ROWS: gl.constexpr, STEP_ROWS: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """Returns lse, delta and own key (-1 for unused rows) of each column of s^T."""
    own_key = gl.where(used, gl.load(query_key_ptr + entry // LISTS), -1)
    lse = gl.load(_rows_of(lse_ptr, entry, 1, HEADS, ENTRY_ROWS, STEP_ROWS, COLUMNS))
    return lse, gl.load(_rows_of(delta_ptr, entry, 1, HEADS, ENTRY_ROWS, STEP_ROWS, COLUMNS)), own_key


@gluon.jit
def _weights(p, MMA: gl.constexpr, DTYPE: gl.constexpr, COLUMN_WARPS: gl.constexpr):
    """An accumulator-shaped [KEYS, STEP_ROWS] -> left operand, rounded to DTYPE; of warps that share rows each gets all columns."""
    if COLUMN_WARPS == 1:
        return weights_as_left(p, MMA, DTYPE)
    else:
        return gl.convert_layout(p.to(DTYPE), gl.DotOperandLayout(0, MMA, 2))


@gluon.jit(do_not_specialize=["num_block_rows"])
def dkdv_kernel(
    q_ptr, do_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, query_key_ptr, choices_ptr, segments_ptr, schedule_ptr, num_segments_ptr,
    block_start_ptr, block_length_ptr, sums_ptr, scale_log2, num_block_rows,
    LISTS: gl.constexpr, KV_HEADS: gl.constexpr, HEADS: gl.constexpr, ENTRY_ROWS: gl.constexpr, STEP_ROWS: gl.constexpr,
    HEAD_DIM: gl.constexpr, DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, TOP_K: gl.constexpr, DTYPE: gl.constexpr,
    KEYS: gl.constexpr, COLUMN_WARPS: gl.constexpr, KEYS_IN_SHARED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Sums of dk (without its scale) and dv over one segment, of KEYS keys. q_ptr, do_ptr, k_ptr and v_ptr point to elements, not words.

    Grid: (segments of the bound, BLOCK_SIZE / KEYS).
    """
    MMA: gl.constexpr = mma_layout(KEYS // 16, COLUMN_WARPS)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, MMA)
    COPY: gl.constexpr = copy_layout(DIM, KEYS // 16 * COLUMN_WARPS)
    COPY_ROWS: gl.constexpr = gl.SliceLayout(1, COPY)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    if gl.program_id(0) < gl.load(num_segments_ptr):
        segment, bucket, begin, length = segment_of_program(segments_ptr, schedule_ptr)
        choices_ptr += begin
        block_row = bucket % num_block_rows
        start = gl.load(block_start_ptr + block_row)
        q_ring = gl.allocate_shared_memory(DTYPE, [STAGES, STEP_ROWS, DIM], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
        do_ring = gl.allocate_shared_memory(DTYPE, [STAGES, STEP_ROWS, DIM], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
        for i in gl.static_range(STAGES):
            if HEAD_DIM < DIM:  # no copy writes these columns
                q_ring.index(i).store(gl.zeros([STEP_ROWS, DIM], DTYPE, COPY))
                do_ring.index(i).store(gl.zeros([STEP_ROWS, DIM], DTYPE, COPY))
        for i in gl.static_range(STAGES - 1):
            entry, _ = entries(choices_ptr, i, length, TOP_K, HEADS, ENTRY_ROWS, STEP_ROWS, COPY_ROWS)
            _copy_rows(
                q_ptr,
                do_ptr,
                q_ring.index(i),
                do_ring.index(i),
                entry,
                HEADS,
                ENTRY_ROWS,
                STEP_ROWS,
                HEAD_DIM,
                DIM,
                COPY,
            )
        first = gl.program_id(1) * KEYS if KEYS < BLOCK_SIZE else 0
        key = first + gl.arange(0, KEYS, COPY_ROWS)
        dim = gl.arange(0, DIM, gl.SliceLayout(0, COPY))
        key_row = (start + key).to(gl.int64) * KV_HEADS + bucket // num_block_rows
        key_place = key_row[:, None] * HEAD_DIM + dim[None, :]
        key_inside = (key < gl.load(block_length_ptr + block_row))[:, None] & (dim < HEAD_DIM)[None, :]
        k_rows = gl.load(k_ptr + key_place, mask=key_inside, other=0.0)
        v_rows = gl.load(v_ptr + key_place, mask=key_inside, other=0.0)
        if KEYS_IN_SHARED:
            k_buffer = gl.allocate_shared_memory(DTYPE, [1, KEYS, DIM], gl.SwizzledSharedLayout(8, 1, 8, [1, 0])).index(
                0
            )
            v_buffer = gl.allocate_shared_memory(DTYPE, [1, KEYS, DIM], gl.SwizzledSharedLayout(8, 1, 8, [1, 0])).index(
                0
            )
            k_buffer.store(k_rows)
            v_buffer.store(v_rows)
        else:
            k = gl.convert_layout(k_rows, LEFT)
            v = gl.convert_layout(v_rows, LEFT)
        key_number = start + first + gl.arange(0, KEYS, gl.SliceLayout(1, MMA))

        column_entry, used = entries(choices_ptr, 0, length, TOP_K, HEADS, ENTRY_ROWS, STEP_ROWS, COLUMNS)
        lse, delta, own_key = _load_columns(
            lse_ptr, delta_ptr, query_key_ptr, column_entry, used, LISTS, HEADS, ENTRY_ROWS, STEP_ROWS, COLUMNS
        )
        column_entry, used = entries(choices_ptr, 1, length, TOP_K, HEADS, ENTRY_ROWS, STEP_ROWS, COLUMNS)
        entry, _ = entries(choices_ptr, STAGES - 1, length, TOP_K, HEADS, ENTRY_ROWS, STEP_ROWS, COPY_ROWS)
        dk = gl.zeros([KEYS, DIM], gl.float32, MMA)
        dv = gl.zeros([KEYS, DIM], gl.float32, MMA)
        zeros = gl.zeros([KEYS, STEP_ROWS], gl.float32, MMA)
        for step in range((length + STEP_ROWS // ENTRY_ROWS - 1) // (STEP_ROWS // ENTRY_ROWS)):
            async_copy.wait_group(STAGES - 2)
            free = (step + STAGES - 1) % STAGES
            _copy_rows(
                q_ptr,
                do_ptr,
                q_ring.index(free),
                do_ring.index(free),
                entry,
                HEADS,
                ENTRY_ROWS,
                STEP_ROWS,
                HEAD_DIM,
                DIM,
                COPY,
            )
            entry, _ = entries(choices_ptr, step + STAGES, length, TOP_K, HEADS, ENTRY_ROWS, STEP_ROWS, COPY_ROWS)
            q, do = q_ring.index(step % STAGES), do_ring.index(step % STAGES)
            if KEYS_IN_SHARED:
                k = k_buffer.load(LEFT)
            s = mma_v2(k, q.permute([1, 0]).load(RIGHT), zeros)
            if KEYS_IN_SHARED:
                v = v_buffer.load(LEFT)
            dp = mma_v2(v, do.permute([1, 0]).load(RIGHT), zeros)
            p = gl.exp2(s * scale_log2 - (lse * LOG2E)[None, :])
            p = gl.where(key_number[:, None] <= own_key[None, :], p, 0.0)
            ds = p * (dp - delta[None, :])
            lse, delta, own_key = _load_columns(
                lse_ptr, delta_ptr, query_key_ptr, column_entry, used, LISTS, HEADS, ENTRY_ROWS, STEP_ROWS, COLUMNS
            )
            column_entry, used = entries(choices_ptr, step + 2, length, TOP_K, HEADS, ENTRY_ROWS, STEP_ROWS, COLUMNS)
            dv = mma_v2(_weights(p, MMA, DTYPE, COLUMN_WARPS), do.load(RIGHT), dv)
            dk = mma_v2(_weights(ds, MMA, DTYPE, COLUMN_WARPS), q.load(RIGHT), dk)
        async_copy.wait_group(0)
        out_key = first + gl.arange(0, KEYS, gl.SliceLayout(1, MMA))
        out_dim = gl.arange(0, DIM, COLUMNS)
        place = sums_ptr + segment * (2 * BLOCK_SIZE * DIM) + out_key[:, None] * DIM + out_dim[None, :]
        gl.store(place, dk)
        gl.store(place + BLOCK_SIZE * DIM, dv)
