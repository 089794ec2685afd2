"""Decoding in plain PyTorch: the definition of the operators, by the prefill's own references.

The cached keys and values of all sequences are gathered into packed documents, with the new tokens as the queries of a layout. What follows
is `select/reference.py` on the cached block means and `masked_attention.py` on the keys, so a decoding step returns what the prefill of the
same tokens returns for its last queries: the same blocks, and o and lse up to the order of sums. Lengths are read on the host, so on a GPU
this waits; it is for tests there.
"""

from dataclasses import dataclass

import torch

from ..documents import DocumentLayout, build_layout
from ..masked_attention import masked_attention
from ..queries import query_slice
from ..select.reference import choose_blocks
from ..sparse_attention.reference import sparse_attention_reference
from .cache import KeyValueCache


@dataclass(frozen=True, slots=True)
class PackedCache:
    """The cached tokens as packed documents, and the step's queries."""

    layout: DocumentLayout  # of the queries over all keys
    rows: torch.Tensor  # int64 [queries], each one's place in [B * T]
    pages: torch.Tensor  # int64 [block rows in use], the page of each block row
    keys: torch.Tensor  # int64 [keys], each one's place in k's first two dims


def append_reference(cache: KeyValueCache, k: torch.Tensor, v: torch.Tensor, num_new: torch.Tensor | None) -> None:
    """Writes keys, values and means; arguments as in `append_to_cache`."""
    k_pages, v_pages, _ = cache.pages()
    table, size = cache.block_pages().long(), cache.block_size
    for b, (length, new) in enumerate(_lengths(cache, k.shape[1], num_new)):
        first = max(new - length, 0)
        position = torch.arange(length - new + first, length, device=k.device)
        at = (table[b, position // size], position % size)
        k_pages[at], v_pages[at] = k[b, first:new], v[b, first:new]
    update_means_reference(cache, k.shape[1], num_new)


def update_means_reference(cache: KeyValueCache, tokens: int, num_new: torch.Tensor | None) -> None:
    """Writes means; arguments as in `update_block_means`."""
    table, size, means = cache.block_pages().long(), cache.block_size, cache.pages()[2]
    for b, (length, new) in enumerate(_lengths(cache, tokens, num_new)):
        for block in range(max(length - new, 0) // size, length // size):
            if cache.key_table is None:
                keys = cache.pages()[0][table[b, block]]
            else:
                keys = cache.k[b, cache.key_table[b, block * size : (block + 1) * size].long()]
            means[table[b, block]] = (keys.to(torch.promote_types(keys.dtype, torch.float32)).sum(0) / size).to(
                means.dtype
            )


def select_cached_reference(
    q: torch.Tensor, cache: KeyValueCache, num_new: torch.Tensor | None, *, top_k: int, scale: float, score: str
) -> torch.Tensor:
    """Returns indices; arguments as in `select_cached_blocks`."""
    lists = q.shape[2] if score == "per_head" else cache.k.shape[2]
    indices = torch.full((q.shape[0] * q.shape[1], lists, top_k), -1, dtype=torch.int32, device=q.device)
    packed = _pack(cache, q.shape[1], num_new)
    if packed is not None:
        indices[packed.rows] = _choose(q.flatten(0, 1)[packed.rows], cache, packed, top_k, scale, score)
    return indices.view(*q.shape[:2], lists, top_k)


def decode_attention_reference(
    q: torch.Tensor,
    cache: KeyValueCache,
    num_new: torch.Tensor | None,
    *,
    top_k: int | None,
    scale: float,
    score: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (o, lse); arguments as in `decode_attention`, with top_k None for full attention."""
    wide = torch.promote_types(q.dtype, torch.float32)
    o = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=wide, device=q.device)
    packed = _pack(cache, q.shape[1], num_new)
    if packed is not None:
        queries = q.flatten(0, 1)[packed.rows]
        k, v = (x.flatten(0, 1)[packed.keys] for x in cache.pages()[:2])
        if top_k is None:
            found = masked_attention(queries, k, v, packed.layout, scale)
        else:
            indices = _choose(queries, cache, packed, top_k, scale, score)
            found = sparse_attention_reference(queries, k, v, indices, layout=packed.layout, scale=scale)
        o.flatten(0, 1)[packed.rows], lse.flatten(0, 1)[packed.rows] = found
    return o, lse


def _choose(
    q: torch.Tensor, cache: KeyValueCache, packed: PackedCache, top_k: int, scale: float, score: str
) -> torch.Tensor:
    """Returns the packed queries' blocks. The means of incomplete blocks, which were never written, count as 0: no query scores them."""
    layout = packed.layout
    complete = layout.block_length[: len(packed.pages)] == layout.block_size
    means = cache.means.new_zeros(layout.num_block_rows, *cache.means.shape[-2:])
    means[: len(packed.pages)] = torch.where(complete[:, None, None], cache.pages()[2][packed.pages], 0.0)
    return choose_blocks(q, means, layout=layout, top_k=top_k, scale=scale, score=score)


def _pack(cache: KeyValueCache, tokens: int, num_new: torch.Tensor | None) -> PackedCache | None:
    """Returns the cached sequences as packed documents, or None without queries."""
    table, size, device = cache.block_pages().cpu().long(), cache.block_size, cache.k.device
    keys, pages, rows, queries, ends = [], [], [], [], [0]
    for b, (length, new) in enumerate(_lengths(cache, tokens, num_new)):
        first = max(new - length, 0)
        position = torch.arange(length)
        if cache.key_table is None:
            keys.append(table[b, position // size] * size + position % size)
        else:
            keys.append(b * cache.k.shape[1] + cache.key_table[b, :length].cpu().long())
        pages.append(table[b, : -(-length // size)])
        rows += range(b * tokens + first, b * tokens + new)
        queries += range(ends[-1] + length - new + first, ends[-1] + length)
        ends.append(ends[-1] + length)
    if not rows:
        return None
    whole = build_layout(
        torch.tensor(ends, dtype=torch.int32, device=device), num_tokens=ends[-1], block_size=size, max_length=ends[-1]
    )
    layout = query_slice(whole, torch.tensor(queries, device=device))
    return PackedCache(
        layout, torch.tensor(rows, device=device), torch.cat(pages).to(device), torch.cat(keys).to(device)
    )


def _lengths(cache: KeyValueCache, tokens: int, num_new: torch.Tensor | None) -> list[tuple[int, int]]:
    """Returns each sequence's (length, number of new tokens)."""
    lengths = cache.seq_lens.tolist()
    return list(zip(lengths, [tokens] * len(lengths) if num_new is None else num_new.tolist(), strict=True))
