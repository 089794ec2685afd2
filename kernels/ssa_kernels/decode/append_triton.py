"""Appends to a decoding cache (Triton): keys, values, and the means of the blocks that became complete, in one launch; or the means alone.

A large block is written in parts and read again for its mean, because registers would not hold its new and its earlier keys together.

Grid: (blocks that the new tokens may touch, sequences, kv heads). A program writes its block's new keys and values. If the block is then
complete, it reads the block's earlier keys and writes the mean of all, summed in float32 over the same tile as the prefill's
`block_means_kernel`. No other program touches the block, so nothing races, and the result is the same every time.
"""

import torch
import triton
import triton.language as tl

from ..devices import gpu_of, means_warps
from ..launch import cdiv, launch, next_power_of_2
from .cache import KeyValueCache
from .pages_triton import page_of_block, sequence_state


@triton.jit(do_not_specialize=["most", "blocks_per_sequence", "num_pages"])
def append_kernel(
    k_new_ptr, v_new_ptr, k_ptr, v_ptr, means_ptr, seq_lens_ptr, num_new_ptr, page_table_ptr, most, blocks_per_sequence, num_pages,
    NUM_NEW: tl.constexpr, RAGGED: tl.constexpr, PAGED: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Writes one block of one sequence and kv head."""
    sequence, kv_head = tl.program_id(1), tl.program_id(2)
    length, new = sequence_state(seq_lens_ptr, num_new_ptr, sequence, most, NUM_NEW, RAGGED)
    old = length - new
    block = tl.maximum(old, 0) // BLOCK_SIZE + tl.program_id(0)
    if (block * BLOCK_SIZE < length) & (new > 0):
        page = page_of_block(page_table_ptr, sequence, block, True, blocks_per_sequence, num_pages, PAGED)
        PART: tl.constexpr = KEYS if KEYS * DIM <= 4096 else 4096 // DIM
        dim = tl.arange(0, DIM)
        features = (dim < HEAD_DIM)[None, :]
        for first in tl.static_range(0, KEYS, PART):
            key = first + tl.arange(0, PART)
            position = block * BLOCK_SIZE + key
            inside = (key < BLOCK_SIZE) & (position < length)
            fresh = inside & (position >= old)
            source = (sequence.to(tl.int64) * NUM_NEW + tl.where(fresh, position - old, 0)) * KV_HEADS + kv_head
            target = (page * BLOCK_SIZE + tl.where(inside, key, 0)) * KV_HEADS + kv_head
            source = source[:, None] * HEAD_DIM + dim[None, :]
            target = target[:, None] * HEAD_DIM + dim[None, :]
            write = fresh[:, None] & features
            keys = tl.load(k_new_ptr + source, mask=write, other=0.0)
            tl.store(k_ptr + target, keys, mask=write)
            tl.store(v_ptr + target, tl.load(v_new_ptr + source, mask=write, other=0.0), mask=write)
        if (block + 1) * BLOCK_SIZE <= length:
            if PART == KEYS:
                before = (inside & (position < old))[:, None] & features
                keys = tl.where(before, tl.load(k_ptr + target, mask=before, other=0.0), keys)
            else:
                tl.debug_barrier()  # other threads wrote the new keys
                all_keys = tl.arange(0, KEYS)
                place = (page * BLOCK_SIZE + tl.where(all_keys < BLOCK_SIZE, all_keys, 0)) * KV_HEADS + kv_head
                whole = (all_keys < BLOCK_SIZE)[:, None] & features
                block_keys = tl.load(k_ptr + place[:, None] * HEAD_DIM + dim[None, :], mask=whole, other=0.0)
            mean = tl.sum((keys if PART == KEYS else block_keys).to(tl.float32), 0) / BLOCK_SIZE
            out = (page * KV_HEADS + kv_head) * HEAD_DIM + dim
            tl.store(means_ptr + out, mean.to(means_ptr.dtype.element_ty), mask=dim < HEAD_DIM)


@triton.jit(do_not_specialize=["most", "blocks_per_sequence", "num_pages", "row_keys"])
def means_kernel(
    k_ptr, means_ptr, seq_lens_ptr, num_new_ptr, page_table_ptr, key_table_ptr, most, blocks_per_sequence, num_pages, row_keys,
    NUM_NEW: tl.constexpr, RAGGED: tl.constexpr, PAGED: tl.constexpr, INDEXED: tl.constexpr, KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Writes the mean of one block of one sequence and kv head, if the last tokens complete it."""
    sequence, kv_head = tl.program_id(1), tl.program_id(2)
    length, new = sequence_state(seq_lens_ptr, num_new_ptr, sequence, most, NUM_NEW, RAGGED)
    block = tl.maximum(length - new, 0) // BLOCK_SIZE + tl.program_id(0)
    if ((block + 1) * BLOCK_SIZE <= length) & (new > 0):
        page = page_of_block(page_table_ptr, sequence, block, True, blocks_per_sequence, num_pages, PAGED)
        key, dim = tl.arange(0, KEYS), tl.arange(0, DIM)
        at = page * BLOCK_SIZE + tl.where(key < BLOCK_SIZE, key, 0)
        if INDEXED:
            place = tl.load(key_table_ptr + at)
            at = sequence.to(tl.int64) * row_keys + tl.minimum(tl.maximum(place, 0), row_keys - 1)
        inside = (key < BLOCK_SIZE)[:, None] & (dim < HEAD_DIM)[None, :]
        keys = tl.load(k_ptr + ((at * KV_HEADS + kv_head) * HEAD_DIM)[:, None] + dim[None, :], mask=inside, other=0.0)
        mean = tl.sum(keys.to(tl.float32), 0) / BLOCK_SIZE
        out = (page * KV_HEADS + kv_head) * HEAD_DIM + dim
        tl.store(means_ptr + out, mean.to(means_ptr.dtype.element_ty), mask=dim < HEAD_DIM)


def update_means_triton(cache: KeyValueCache, tokens: int, num_new: torch.Tensor | None) -> None:
    """Writes means; arguments as in `update_block_means`."""
    (batch, kv_heads, head_dim), size = (len(cache.seq_lens), *cache.k.shape[2:]), cache.block_size
    keys, dim = next_power_of_2(size), next_power_of_2(head_dim)
    k_pages, _, means = cache.pages()
    lens = cache.seq_lens
    launch(
        means_kernel, (cdiv(tokens - 1, size) + 1, batch, kv_heads),
        k_pages, means, lens, lens if num_new is None else num_new, lens if cache.page_table is None else cache.page_table,
        lens if cache.key_table is None else cache.key_table, cache.longest, cache.blocks_per_sequence, cache.num_pages, cache.k.shape[1],
        NUM_NEW=tokens, RAGGED=num_new is not None, PAGED=cache.page_table is not None, INDEXED=cache.key_table is not None,
        KV_HEADS=kv_heads, HEAD_DIM=head_dim, DIM=dim, BLOCK_SIZE=size, KEYS=keys,
        num_warps=means_warps(gpu_of(cache.k.device), keys, dim),
    )  # fmt: skip


def append_triton(cache: KeyValueCache, k: torch.Tensor, v: torch.Tensor, num_new: torch.Tensor | None) -> None:
    """Writes keys, values and means; arguments as in `append_to_cache`."""
    k, v = k.contiguous(), v.contiguous()
    batch, tokens, kv_heads, head_dim = k.shape
    size = cache.block_size
    keys, dim = next_power_of_2(size), next_power_of_2(head_dim)
    k_pages, v_pages, means = cache.pages()
    launch(
        append_kernel, (cdiv(tokens - 1, size) + 1, batch, kv_heads),
        k, v, k_pages, v_pages, means, cache.seq_lens, cache.seq_lens if num_new is None else num_new,
        cache.seq_lens if cache.page_table is None else cache.page_table, cache.longest, cache.blocks_per_sequence, cache.num_pages,
        NUM_NEW=tokens, RAGGED=num_new is not None, PAGED=cache.page_table is not None, KV_HEADS=kv_heads, HEAD_DIM=head_dim,
        DIM=dim, BLOCK_SIZE=size, KEYS=keys, num_warps=means_warps(gpu_of(cache.k.device), keys, dim),
    )  # fmt: skip
