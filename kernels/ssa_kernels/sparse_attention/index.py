"""The inverted index: for each key block the queries that chose it, cut into segments of bounded length (Triton and torch).

The backward of keys and values sums over the queries of a block, so the choices [T, lists, N] have to be inverted. Terms:

    entry    e = t * lists + i: query t with its i-th list of chosen blocks. Entry e owns the heads e * HEADS .. e * HEADS + HEADS - 1 of the
             flattened [T * H] query heads, HEADS = H / lists: the group size, or 1 if every head chooses for itself
    choice   c = e * N + slot, a place of the flattened `indices`
    bucket   b = kv_head * num_block_rows + block_row: a block of one kv head; block rows are those of the DocumentLayout

1. Each choice's bucket. Padding and choices past the own block go to one extra bucket at the end.
2. A stable sort of the buckets: within a bucket the choices stay in the order of the tokens. The sort is stable and by integers, so its
   result is the same in every run, and a document's part of it does not depend on the other documents.
3. The place where each bucket begins in the sorted list (one binary search each), and its number of segments of at most SEGMENT choices,
   cumulated. Segments are counted from the bucket's own beginning, so the order of the sums depends only on the document. They bound the
   work of one program: a block that every query chose (an attention sink) is spread over many programs.
4. The table of segments, and a schedule that takes them in the order of their first query: programs that run side by side then read the
   same stretch of q and dO, which stays in the L2 cache. The schedule has no influence on any sum.

Nothing waits for the device: tables have the size of the worst case, choices // SEGMENT + buckets, and kernels read `num_segments` on the
device. Memory: 4-6 bytes per choice while the index is built, 8 bytes per choice and 20 bytes per segment afterwards.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl

from ..documents import DocumentLayout
from ..launch import cdiv, high_priority_stream, launch

CHOICES_PER_PROGRAM = 1024
BUCKETS_PER_PROGRAM = 128
BUCKETS_PER_SCAN = 4096
SEGMENTS_PER_PROGRAM = 128
# The schedule's keys have 16 bits, which halves the passes of a radix sort. Neighbouring queries may swap places.
LAST_KEY = 2**15 - 1


@dataclass(frozen=True, slots=True)
class InvertedIndex:
    """Choices by bucket. All arrays are on the device."""

    choices: torch.Tensor  # int64 [T * lists * N], choice numbers by bucket, then by query
    segments: torch.Tensor  # int32 [bound, 3]: bucket, first place in `choices`, length
    first_segment: torch.Tensor  # int32 [buckets + 1]: a bucket's segments are contiguous, in its choices' order
    schedule: torch.Tensor  # int64 [bound]: segments in the order in which they run, unused ones last
    # int32 [1]. A tensor of its own: a place within first_segment would be aligned only sometimes, and Triton would compile kernels twice.
    num_segments: torch.Tensor

    @property
    def max_segments(self) -> int:
        """The bound on the number of segments."""
        return self.segments.shape[0]


@triton.jit(do_not_specialize=["num_choices", "num_block_rows"])
def bucket_kernel(
    indices_ptr, position_ptr, first_block_row_ptr, buckets_ptr, num_choices, num_block_rows,
    LISTS: tl.constexpr, LISTS_PER_KV_HEAD: tl.constexpr, TOP_K: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The bucket of each choice. Grid: one program per TILE choices."""
    choice = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = choice < num_choices
    query = choice // (LISTS * TOP_K)
    kv_head = (choice // TOP_K % LISTS // LISTS_PER_KV_HEAD).to(tl.int32)
    block = tl.load(indices_ptr + choice, mask=inside, other=-1)
    own = tl.load(position_ptr + query, mask=inside, other=0) // BLOCK_SIZE
    block_row = tl.load(first_block_row_ptr + query, mask=inside, other=0) + block
    valid = (block >= 0) & (block <= own)
    bucket = tl.where(valid, kv_head * num_block_rows + block_row, KV_HEADS * num_block_rows)
    tl.store(buckets_ptr + choice, bucket.to(buckets_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_choices", "num_buckets", "search_steps"])
def bucket_start_kernel(sorted_ptr, start_ptr, num_choices, num_buckets, search_steps, TILE: tl.constexpr):
    """The first place of each bucket in the sorted list, by binary search. Grid: one program per TILE buckets."""
    bucket = tl.program_id(0) * TILE + tl.arange(0, TILE)
    low = tl.zeros([TILE], tl.int64)
    high = tl.zeros([TILE], tl.int64) + num_choices
    for _ in range(search_steps):
        middle = (low + high) // 2
        below = tl.load(sorted_ptr + middle, mask=middle < num_choices, other=0).to(tl.int32) < bucket
        below = below & (low < high)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    tl.store(start_ptr + bucket, low.to(tl.int32), mask=bucket <= num_buckets)


@triton.jit(do_not_specialize=["num_buckets"])
def count_segments_kernel(
    start_ptr, first_segment_ptr, num_segments_ptr, num_buckets, SEGMENT: tl.constexpr, TILE: tl.constexpr
):
    """The cumulated number of the buckets' segments. Grid: one program."""
    total = 0
    tl.store(first_segment_ptr, total)
    for first in range(0, num_buckets, TILE):
        bucket = first + tl.arange(0, TILE)
        inside = bucket < num_buckets
        begin = tl.load(start_ptr + bucket, mask=inside, other=0)
        end = tl.load(start_ptr + bucket + 1, mask=inside, other=0)
        running = total + tl.cumsum((end - begin + SEGMENT - 1) // SEGMENT, 0)
        tl.store(first_segment_ptr + 1 + bucket, running, mask=inside)
        total = tl.max(running, 0)
    tl.store(num_segments_ptr, total)


@triton.jit(
    do_not_specialize=["num_buckets", "num_block_rows", "num_queries", "max_segments", "search_steps", "key_shift"]
)
def segment_kernel(
    start_ptr, first_segment_ptr, choices_ptr, segments_ptr, key_ptr,
    num_buckets, num_block_rows, num_queries, max_segments, search_steps, key_shift,
    LISTS: tl.constexpr, TOP_K: tl.constexpr, SEGMENT: tl.constexpr, UNUSED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The table of segments and the schedule's keys: (kv head, first query), rounded. Grid: one program per TILE segments of the bound."""
    segment = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = segment < tl.load(first_segment_ptr + num_buckets)
    low = tl.zeros([TILE], tl.int32)
    high = tl.zeros([TILE], tl.int32) + num_buckets
    for _ in range(search_steps):  # the last bucket whose first segment is not past this one
        middle = (low + high + 1) // 2
        past = tl.load(first_segment_ptr + middle, mask=inside, other=0) > segment
        high = tl.where(past & (low < high), middle - 1, high)
        low = tl.where(past, low, middle)
    bucket = tl.minimum(low, num_buckets - 1)
    begin = tl.load(start_ptr + bucket, mask=inside, other=0)
    end = tl.load(start_ptr + bucket + 1, mask=inside, other=0)
    begin += (segment - tl.load(first_segment_ptr + bucket, mask=inside, other=0)) * SEGMENT
    length = tl.minimum(end - begin, SEGMENT)
    table = segments_ptr + segment.to(tl.int64) * 3
    in_table = segment < max_segments
    tl.store(table, bucket, mask=in_table)
    tl.store(table + 1, begin, mask=in_table)
    tl.store(table + 2, tl.where(inside, length, 0), mask=in_table)
    query = tl.load(choices_ptr + begin, mask=inside, other=0) // (LISTS * TOP_K)
    key = ((bucket // num_block_rows).to(tl.int64) * num_queries + query) >> key_shift
    tl.store(key_ptr + segment, tl.where(inside, key, UNUSED).to(tl.int16), mask=in_table)


def segment_length(heads_per_list: int) -> int:
    """Returns the maximum number of choices per segment, such that a segment reads about 1,024 heads of q."""
    return max(1024 // heads_per_list, 32)


def invert(indices: torch.Tensor, layout: DocumentLayout, *, kv_heads: int, segment: int) -> InvertedIndex:
    """Returns the inverted index of `indices`.

    Args:
        indices: int32 [T, lists, N], contiguous. lists is a multiple of kv_heads.
        layout: documents and blocks; its queries are those of `indices`.
        kv_heads: heads of k and v.
        segment: maximum number of choices per segment.
    """
    queries, lists, top_k = indices.shape
    device, num_choices = indices.device, indices.numel()
    num_block_rows = layout.num_block_rows
    num_buckets = kv_heads * num_block_rows
    max_segments = num_choices // segment + min(num_buckets, num_choices)
    if num_choices >= 2**31:
        raise ValueError(
            f"indices of shape {tuple(indices.shape)} must have fewer than 2^31 entries; try fewer tokens per call"
        )

    # If there are few buckets, they fit into 16 bits, which halves the passes of a radix sort.
    buckets = torch.empty(num_choices, dtype=torch.int16 if num_buckets < 2**15 else torch.int32, device=device)
    launch(
        bucket_kernel, (cdiv(num_choices, CHOICES_PER_PROGRAM),),
        indices, layout.query_position, layout.query_first_block_row, buckets, num_choices, num_block_rows,
        LISTS=lists, LISTS_PER_KV_HEAD=lists // kv_heads, TOP_K=top_k, BLOCK_SIZE=layout.block_size,
        KV_HEADS=kv_heads, TILE=CHOICES_PER_PROGRAM,
    )  # fmt: skip
    buckets, choices = torch.sort(buckets, stable=True)

    start = torch.empty(num_buckets + 1, dtype=torch.int32, device=device)
    launch(
        bucket_start_kernel,
        (cdiv(num_buckets + 1, BUCKETS_PER_PROGRAM),),
        buckets,
        start,
        num_choices,
        num_buckets,
        num_choices.bit_length() + 1,
        TILE=BUCKETS_PER_PROGRAM,
    )
    first_segment = torch.empty(num_buckets + 1, dtype=torch.int32, device=device)
    num_segments = torch.empty(1, dtype=torch.int32, device=device)
    launch(
        count_segments_kernel,
        (1,),
        start,
        first_segment,
        num_segments,
        num_buckets,
        SEGMENT=segment,
        TILE=BUCKETS_PER_SCAN,
        num_warps=8,
    )

    segments = torch.empty(max_segments, 3, dtype=torch.int32, device=device)
    key = torch.empty(max_segments, dtype=torch.int16, device=device)
    launch(
        segment_kernel, (cdiv(max_segments, SEGMENTS_PER_PROGRAM),),
        start, first_segment, choices, segments, key, num_buckets, num_block_rows, queries, max_segments,
        num_buckets.bit_length() + 1, max((kv_heads * queries).bit_length() - 15, 0),
        LISTS=lists, TOP_K=top_k, SEGMENT=segment, UNUSED=LAST_KEY, TILE=SEGMENTS_PER_PROGRAM,
    )  # fmt: skip
    schedule = torch.sort(key, stable=True).indices
    return InvertedIndex(choices, segments, first_segment, schedule, num_segments)


def invert_beside(
    indices: torch.Tensor, layout: DocumentLayout, *, kv_heads: int, segment: int
) -> Callable[[], InvertedIndex]:
    """Starts `invert` beside the current stream's next work. Returns a function that makes that stream wait and returns the index.

    The many small kernels hide behind one that fills the device. Arguments as in `invert`.
    """
    if not indices.is_cuda:
        inverted = invert(indices, layout, kv_heads=kv_heads, segment=segment)
        return lambda: inverted
    current = torch.cuda.current_stream(indices.device)
    beside = high_priority_stream(indices.device)
    beside.wait_stream(current)
    with torch.cuda.stream(beside):
        inverted = invert(indices, layout, kv_heads=kv_heads, segment=segment)

    def finish() -> InvertedIndex:
        current.wait_stream(beside)
        for field in fields(inverted):  # the allocator then keeps them until the kernels that read them have run
            getattr(inverted, field.name).record_stream(current)
        return inverted

    return finish
