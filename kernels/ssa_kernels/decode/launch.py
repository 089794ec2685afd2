"""Launches the decoding kernels: sizes of tiles, slices and splits, and workspaces.

Sparse attention takes three launches (logits, candidates, choice with attention), or one if the longest sequence has no more blocks than
top_k; full attention takes two (splits, combination). Everything is planned from shapes and the cache's longest
length, never from the lengths themselves: programs beyond a sequence's end return at once, and splits share what is there. So nothing
waits, and a CUDA graph may replay while sequences grow.

One sequence keeps few multiprocessors busy, so the latency of launches counts. On Hopper and later the second and third kernel of a call start
early: their programs are placed, and read what older kernels wrote, while the kernel before still runs, then wait for its end.

Workspace of the selection: 4 bytes per new token, query head and block (8.4 MB for 32 sequences of 32k at H 32), so it stays in the L2.
Full attention writes (D + 2) floats per split, new token and head.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..devices import gpu_of, multiprocessors
from ..launch import cdiv, launch, next_power_of_2
from .attend_triton import chosen_kernel, combine_kernel, split_kernel
from .cache import KeyValueCache
from .select_triton import block_logits_kernel, candidates_kernel, indices_kernel

LOG2E = 1.4426950408889634
TILE = 128  # blocks per program of the logits
SLICE_BLOCKS = 128  # the fewest blocks of a slice, and a power of two
CANDIDATE_CHUNK = 128  # blocks that are ranked at once
MERGE_CHUNK = 256  # candidates that are ranked at once
CANDIDATE_WARPS = 4
CHOSEN_WARPS = 8
MAX_SLICES = 16  # programs per (list, new token) that look for candidates
MAX_ROWS = 64  # rows of a tile of queries: (new tokens x heads)
CHOSEN_KEYS, CHOSEN_ELEMENTS = 256, 2**15  # keys at a time over the chosen blocks, and elements of their tile
SPLIT_KEYS, SPLIT_ELEMENTS = 128, 2**14  # the same over all blocks
MIN_KEYS_PER_SPLIT = 256
MAX_SPLITS = 128
PROGRAMS_PER_MULTIPROCESSOR = 3
OVERLAP = True  # on Hopper and later, whether a kernel's programs start while the one before ends


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments that all kernels of a call share."""

    q: torch.Tensor  # [B, T, H, D], contiguous
    cache: KeyValueCache
    num_new: torch.Tensor | None
    scale: float
    lists: int  # lists of chosen blocks: G, or H for per_head

    @property
    def heads(self) -> int:
        """Query heads per list."""
        return self.q.shape[2] // self.lists

    @property
    def blocks(self) -> int:
        """The most blocks that a sequence has."""
        return cdiv(self.cache.longest, self.cache.block_size)

    @property
    def lengths(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The lengths and the numbers of new tokens."""
        return self.cache.seq_lens, self.cache.seq_lens if self.num_new is None else self.num_new

    @property
    def table(self) -> torch.Tensor:
        """The page table, or some tensor in its place."""
        return self.cache.seq_lens if self.cache.page_table is None else self.cache.page_table

    @property
    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The page table and the key table, or some tensor in their places."""
        return self.table, self.cache.seq_lens if self.cache.key_table is None else self.cache.key_table

    @property
    def bounds(self) -> tuple[int, int, int]:
        """The longest length, blocks per sequence and number of pages."""
        return self.cache.longest, self.cache.blocks_per_sequence, self.cache.num_pages

    def tokens(self) -> dict[str, int]:
        """Returns the sizes of the step."""
        return {"NUM_NEW": self.q.shape[1], "RAGGED": self.num_new is not None}

    def vectors(self) -> dict[str, int]:
        """Returns the sizes of a head and of a block."""
        dim = self.q.shape[3]
        return {"HEAD_DIM": dim, "DIM": next_power_of_2(dim), "BLOCK_SIZE": self.cache.block_size}

    def paged_lists(self) -> dict[str, int]:
        """Returns where lists and pages lie."""
        per_kv_head = self.lists // self.cache.k.shape[2]
        return {
            "PAGED": self.cache.page_table is not None, "INDEXED": self.cache.key_table is not None, "LISTS": self.lists, "LISTS_PER_KV_HEAD": per_kv_head, "HEADS": self.heads,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Candidates:
    """The best blocks of each slice, int64 [B, lists, T, slices, SLOTS], and how they were found."""

    best: torch.Tensor
    top_k: int
    slice_blocks: int
    overlap: bool = False  # whether what reads them starts early, and so has to wait for them

    def sizes(self) -> dict[str, int]:
        """Returns the compile-time sizes of what reads them."""
        return {"TOP_K": self.top_k, "SLOTS": self.slots, "SLICE": self.slice_blocks, "OVERLAP": self.overlap}

    @property
    def slots(self) -> int:
        """The entries of a slice: top_k, padded to a power of two."""
        return self.best.shape[-1]


def decode_attention_triton(
    q: torch.Tensor, cache: KeyValueCache, num_new: torch.Tensor | None, *, top_k: int | None, scale: float, score: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (o, lse); arguments as in `decode_attention`, with top_k None for full attention and q contiguous."""
    o = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if top_k is None:
        _attend_all(_Call(q, cache, num_new, scale, cache.k.shape[2]), o, lse)
        return o, lse
    call = _Call(q, cache, num_new, scale, q.shape[2] if score == "per_head" else cache.k.shape[2])
    found = _candidates(call, top_k, score)
    keys = next_power_of_2(cache.block_size)
    step = min(found.slots, max(1, min(CHOSEN_KEYS, CHOSEN_ELEMENTS // next_power_of_2(q.shape[3])) // keys))
    launch(
        chosen_kernel, (call.lists, q.shape[0] * q.shape[1]),
        q, *cache.pages()[:2], *call.lengths, *call.tables, found.best, o, lse, scale * LOG2E, *call.bounds, cache.k.shape[1],
        found.best.shape[3],
        **_ordered(chosen_kernel, {**call.tokens(), **call.paged_lists(), **call.vectors(), **found.sizes()},
                   ROWS=max(16, next_power_of_2(call.heads)), KEYS=keys, STEP=max(step, 16 // keys), CHUNK=_merge_chunk(found)),
        num_warps=CHOSEN_WARPS if gpu_of(q.device).backend != "hip" else 4, num_stages=1, **_starts_early(found.overlap),
    )  # fmt: skip
    return o, lse


def select_cached_triton(
    q: torch.Tensor, cache: KeyValueCache, num_new: torch.Tensor | None, *, top_k: int, scale: float, score: str
) -> torch.Tensor:
    """Returns indices; arguments as in `select_cached_blocks`, with q contiguous."""
    call = _Call(q, cache, num_new, scale, q.shape[2] if score == "per_head" else cache.k.shape[2])
    found = _candidates(call, top_k, score)
    indices = torch.empty(*q.shape[:2], call.lists, top_k, dtype=torch.int32, device=q.device)
    launch(
        indices_kernel, (call.lists, q.shape[0] * q.shape[1]),
        *call.lengths, found.best, indices, cache.longest, found.best.shape[3],
        **_ordered(indices_kernel, {**call.tokens(), **found.sizes()}, LISTS=call.lists, BLOCK_SIZE=cache.block_size,
                   CHUNK=_merge_chunk(found)),
        num_warps=8, **_starts_early(found.overlap),
    )  # fmt: skip
    return indices


def _candidates(call: _Call, top_k: int, score: str) -> _Candidates:
    """Returns each slice's best blocks. Nothing is launched if no query has more than top_k blocks, and so all are chosen."""
    batch, tokens, heads, _ = call.q.shape
    slots = max(16, next_power_of_2(top_k))
    unit = max(SLICE_BLOCKS, slots)
    slice_blocks = cdiv(call.blocks, MAX_SLICES * unit) * unit
    slices = cdiv(call.blocks, slice_blocks)
    device = call.q.device
    best = torch.empty(batch, call.lists, tokens, slices, slots, dtype=torch.int64, device=device)
    if call.blocks <= top_k:
        return _Candidates(best, top_k, slice_blocks)
    overlap = _overlaps(device)
    found = _Candidates(best, top_k, slice_blocks, overlap)
    tiles = cdiv(call.blocks, TILE)
    logits = torch.empty(batch, heads * tokens, tiles * TILE, dtype=torch.float32, device=device)
    tile_max, tile_sum = torch.empty(2, batch * heads * tokens * tiles, dtype=torch.float32, device=device).unbind()
    rows = min(MAX_ROWS, max(16, next_power_of_2(tokens * call.heads)))
    launch(
        block_logits_kernel, (tiles, call.lists * cdiv(tokens * call.heads, rows), batch),
        call.q, call.cache.pages()[2], *call.lengths, call.table, logits, tile_max, tile_sum,
        call.scale * LOG2E, *call.bounds, tiles * TILE,
        **_ordered(block_logits_kernel, {**call.tokens(), **call.paged_lists(), **call.vectors()},
                   TOP_K=top_k, ROWS=rows, TILE=TILE, PER_HEAD=score == "per_head", OVERLAP=overlap),
        num_warps=4, num_stages=1,
    )  # fmt: skip
    launch(
        candidates_kernel, (slices, call.lists, batch * tokens),
        *call.lengths, logits, tile_max, tile_sum, best, call.cache.longest, tiles * TILE, tiles,
        **_ordered(candidates_kernel, {**call.tokens(), **found.sizes()},
                   LISTS=call.lists, HEADS=call.heads, PADDED_HEADS=next_power_of_2(call.heads), BLOCK_SIZE=call.cache.block_size,
                   TILE=TILE, TILES=next_power_of_2(tiles), PER_HEAD=score == "per_head",
                   CHUNK=max(min(CANDIDATE_CHUNK, unit), slots)),
        num_warps=CANDIDATE_WARPS, num_stages=1, **_starts_early(overlap),
    )  # fmt: skip
    return found


def _merge_chunk(found: _Candidates) -> int:
    """Returns how many of the slices' best are ranked at once."""
    return min(max(MERGE_CHUNK, found.slots), next_power_of_2(found.best.shape[3] * found.slots))


def _attend_all(call: _Call, o: torch.Tensor, lse: torch.Tensor) -> None:
    """Fills o and lse of full attention."""
    batch, tokens, heads, dim = call.q.shape
    keys = next_power_of_2(call.cache.block_size)
    rows = min(MAX_ROWS, max(16, next_power_of_2(tokens * call.heads)))
    row_tiles = cdiv(tokens * call.heads, rows)
    splits = _splits(call, batch * call.lists * row_tiles)
    padded = next_power_of_2(dim)
    part = torch.empty(splits, batch * tokens * heads, padded, dtype=torch.float32, device=o.device)
    top, total = torch.empty(2, splits, batch * tokens * heads, dtype=torch.float32, device=o.device).unbind()
    lists, overlap = call.paged_lists(), _overlaps(o.device)
    step = max(1, min(SPLIT_KEYS, SPLIT_ELEMENTS // padded) // keys)
    gpu, tile = gpu_of(o.device), step * keys * padded
    stages = max(1, min(3 if padded * rows <= 4096 else 2, gpu.shared_bytes // (2 * tile * call.q.element_size())))
    crowded = gpu.backend == "cuda" and (tile > SPLIT_ELEMENTS or (gpu.capability < 90 and rows == MAX_ROWS))
    launch(
        split_kernel, (splits, call.lists * row_tiles, batch),
        call.q, *call.cache.pages()[:2], *call.lengths, *call.tables, part, top, total, call.scale * LOG2E, *call.bounds,
        call.cache.k.shape[1],
        **_ordered(split_kernel, {**call.tokens(), **call.vectors(), **lists}, KV_HEADS=call.lists,
                   KEYS=keys, ROWS=rows, STEP=step, STAGES=stages,
                   OVERLAP=overlap),
        num_warps=8 if crowded else 4,
    )  # fmt: skip
    launch(
        combine_kernel, (batch * tokens * heads,),
        part, top, total, o, lse, splits, HEAD_DIM=dim, DIM=padded, SPLITS=next_power_of_2(splits), OVERLAP=overlap,
        num_warps=4, **_starts_early(overlap),
    )  # fmt: skip


def _splits(call: _Call, programs: int) -> int:
    """Returns how many programs share a sequence's keys, for `programs` of them without a split."""
    wanted = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(call.q.device) // programs
    return max(1, min(wanted, cdiv(call.cache.longest, MIN_KEYS_PER_SPLIT), MAX_SPLITS))


def _overlaps(device: torch.device) -> bool:
    """Returns whether the kernels of a call overlap (programmatic dependent launch)."""
    return OVERLAP and gpu_of(device).starts_early


def _starts_early(overlap: bool) -> dict[str, Any]:
    """Returns the launch option of a kernel whose programs start before the kernel before has ended, and then wait for it."""
    return {"launch_pdl": True} if overlap else {}


def _ordered(kernel: Any, sizes: dict[str, int], **more: int) -> dict[str, Any]:
    """Returns the compile-time arguments that the kernel takes, in its order."""
    given = {**sizes, **more}
    return {name: given[name] for name in kernel.arg_names if name in given}
