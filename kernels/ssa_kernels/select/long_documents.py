"""Selection where the host does not know the longest document: an expected length, and the tiles that exceed it (Triton).

The workspace of `launch.py` has a row per token and list, as wide as the longest document's blocks. For boundaries without a `max_length`
that could be all tokens: at 65,536 tokens the rows are then eight times as wide as 8k documents need, and 35 chunks take 2.8 ms where 5 take
0.7. Reading the boundaries would mean waiting for the device. So the chunks are planned for the longest document that earlier calls have met,
which a kernel reports to the host without anybody waiting, and `long_tiles_kernel` then computes the tiles of tokens that the plan does not
cover: each program has a place of its own in the workspace, which is free by then, for one tile and kv head over all its blocks. It computes
importance as the chunks do, and top-k is exact, so the choice never depends on what was expected. Only the time does: without long documents
the kernel costs one pass over the positions (a few microseconds); a document that is longer than any before is slow once.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from .importance import importance_of_tile, tile_range
from .topk import choose_of_row

MAX_PROGRAMS = 256
LOOK = tl.constexpr(1024)  # positions that a program reads at a time


class LongestSeen:
    """The longest document that the calls so far have met. It only decides what calls expect.

    The kernel writes it to the device and to pinned memory of the host. Nobody waits for the second: until it lands, calls expect what they
    did before.
    """

    def __init__(self, device: torch.device) -> None:
        with torch.inference_mode(False):  # later calls write to these tensors in any mode
            self.on_device = torch.zeros(1, dtype=torch.int32, device=device)
            self.on_host = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")

    @property
    def tokens(self) -> int:
        """The length that has reached the host; 0 before any has."""
        return int(self.on_host)


@cache
def longest_seen(device: torch.device, tokens_bits: int, documents_bits: int) -> LongestSeen:
    """Returns the one object for batches of about this many tokens and documents, given by the lengths of these numbers in bits."""
    return LongestSeen(device)


@triton.jit(do_not_specialize=["num_queries", "tiles_per_program"])
def long_tiles_kernel(
    q_ptr,
    means,
    first_block_row_ptr,
    position_ptr,
    lse_ptr,
    importance_ptr,
    survivors_ptr,
    indices_ptr,
    longest_ptr,
    longest_on_host_ptr,
    num_queries,
    tiles_per_program,
    stride_token,
    columns,
    width,
    scale_log2,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    FMA_SHARE: tl.constexpr,
    PER_HEAD: tl.constexpr,
    TOP_K: tl.constexpr,
    PADDED_TOP_K: tl.constexpr,
    SCRATCH: tl.constexpr,
    WIDTH: tl.constexpr,
    OFFICIAL: tl.constexpr,
):
    """indices of the tiles with a token of more than `columns` candidates; the longest document met, on the device and on the host.

    A program takes neighbouring tiles, one after another. Its rows of importance have `width` columns.
    """
    program = tl.program_id(0)
    begin = program * tiles_per_program * TILE_TOKENS
    end = tl.minimum(begin + tiles_per_program * TILE_TOKENS, num_queries)
    last = tl.full([], 0, tl.int32)
    for start in range(begin, end, LOOK):
        token = start + tl.arange(0, LOOK)
        last = tl.maximum(last, tl.max(tl.load(position_ptr + token, mask=token < end, other=0), 0))
    longest = tl.load(longest_ptr)
    if last >= longest:
        longest = tl.maximum(tl.atomic_max(longest_ptr, last + 1), last + 1)
        tl.store(longest_on_host_ptr, longest)
    elif program == 0:
        tl.store(
            longest_on_host_ptr, longest
        )  # of two programs that found a longer one, the shorter may have been stored last
    if last // BLOCK_SIZE > columns:
        KV_LISTS: tl.constexpr = GROUP_SIZE if PER_HEAD else tl.constexpr(1)  # lists per kv head
        rows = importance_ptr + program.to(tl.int64) * (TILE_TOKENS * KV_LISTS) * width
        survivors = survivors_ptr + program.to(tl.int64) * SCRATCH
        for base in range(begin, end, TILE_TOKENS):
            token = base + tl.arange(0, TILE_TOKENS)
            last = tl.max(tl.load(position_ptr + token, mask=token < end, other=0), 0)
            if last // BLOCK_SIZE > columns:
                lo, hi, _ = tile_range(first_block_row_ptr, position_ptr, base, num_queries, BLOCK_SIZE, TILE_TOKENS)
                for kv_head in range(KV_HEADS):
                    importance_of_tile(
                        q_ptr, means, first_block_row_ptr, position_ptr, lse_ptr, rows, rows,
                        base, lo, hi, kv_head, KV_HEADS, 0, 1, num_queries, stride_token, width, scale_log2,
                        BLOCK_SIZE, GROUP_SIZE, PADDED_GROUP, HEAD_DIM, DIM, TILE_TOKENS, TILE_BLOCKS, 1, FMA_SHARE, PER_HEAD, False,
                    )  # fmt: skip
                    tl.debug_barrier()  # other warps wrote parts of the rows
                    for row in range(TILE_TOKENS * KV_LISTS):
                        at = tl.full([], 0, tl.int64) + row
                        query = base + at // KV_LISTS
                        if query < num_queries:
                            own = tl.load(position_ptr + query) // BLOCK_SIZE
                            chosen_list = kv_head * KV_LISTS + at % KV_LISTS
                            choose_of_row(
                                rows + at * width, rows, survivors,
                                indices_ptr + (query * (KV_HEADS * KV_LISTS) + chosen_list) * TOP_K, own, width,
                                BLOCK_SIZE, TOP_K, PADDED_TOP_K, SCRATCH, WIDTH, PER_HEAD, OFFICIAL, 0,
                            )  # fmt: skip
                        tl.debug_barrier()  # the next row overwrites the survivors, and the next tile the rows
