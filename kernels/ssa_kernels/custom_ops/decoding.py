"""Custom ops of decoding with a cache. They have no gradient; appending changes the cache's tensors in place."""

import torch

from ..decode import api, cache
from .operands import wide


@torch.library.custom_op("ssa_kernels::append_to_cache", mutates_args=("k", "v", "means"))
def append_to_cache_op(
    k: torch.Tensor,
    v: torch.Tensor,
    means: torch.Tensor,
    seq_lens: torch.Tensor,
    page_table: torch.Tensor | None,
    max_length: int | None,
    key_table: torch.Tensor | None,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    num_new: torch.Tensor | None,
    impl: str | None,
) -> None:
    """Writes keys, values and means."""
    held = cache.KeyValueCache(k, v, means, seq_lens, page_table, max_length, key_table)
    cache.append_to_cache(held, k_new, v_new, num_new=num_new, impl=impl)


@torch.library.custom_op("ssa_kernels::update_block_means", mutates_args=("means",))
def update_block_means_op(
    k: torch.Tensor,
    v: torch.Tensor,
    means: torch.Tensor,
    seq_lens: torch.Tensor,
    page_table: torch.Tensor | None,
    max_length: int | None,
    key_table: torch.Tensor | None,
    num_tokens: int,
    num_new: torch.Tensor | None,
    impl: str | None,
) -> None:
    """Writes means."""
    held = cache.KeyValueCache(k, v, means, seq_lens, page_table, max_length, key_table)
    cache.update_block_means(held, num_tokens=num_tokens, num_new=num_new, impl=impl)


@torch.library.custom_op("ssa_kernels::decode_attention", mutates_args=())
def decode_attention_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    means: torch.Tensor,
    seq_lens: torch.Tensor,
    page_table: torch.Tensor | None,
    max_length: int | None,
    key_table: torch.Tensor | None,
    mode: str,
    top_k: int,
    num_new: torch.Tensor | None,
    scale: float | None,
    score: str,
    impl: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (o, lse)."""
    held = cache.KeyValueCache(k, v, means, seq_lens, page_table, max_length, key_table)
    o, lse = api.decode_attention(
        q, held, mode=mode, top_k=top_k, num_new=num_new, scale=scale, score=score, return_lse=True, impl=impl
    )
    assert lse is not None  # return_lse is set
    return o, lse


@torch.library.custom_op("ssa_kernels::select_cached_blocks", mutates_args=())
def select_cached_blocks_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    means: torch.Tensor,
    seq_lens: torch.Tensor,
    page_table: torch.Tensor | None,
    max_length: int | None,
    key_table: torch.Tensor | None,
    top_k: int,
    num_new: torch.Tensor | None,
    scale: float | None,
    score: str,
    impl: str | None,
) -> torch.Tensor:
    """Returns indices."""
    held = cache.KeyValueCache(k, v, means, seq_lens, page_table, max_length, key_table)
    return api.select_cached_blocks(q, held, top_k=top_k, num_new=num_new, scale=scale, score=score, impl=impl)


@append_to_cache_op.register_fake
def _(k, v, means, seq_lens, page_table, max_length, key_table, k_new, v_new, num_new, impl):
    return None


@update_block_means_op.register_fake
def _(k, v, means, seq_lens, page_table, max_length, key_table, num_tokens, num_new, impl):
    return None


@decode_attention_op.register_fake
def _(q, k, v, means, seq_lens, page_table, max_length, key_table, mode, top_k, num_new, scale, score, impl):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=wide(q.dtype))


@select_cached_blocks_op.register_fake
def _(q, k, v, means, seq_lens, page_table, max_length, key_table, top_k, num_new, scale, score, impl):
    lists = q.shape[2] if score == "per_head" else k.shape[-2]
    return q.new_empty((*q.shape[:2], lists, top_k), dtype=torch.int32)


def _operands(held: cache.KeyValueCache) -> tuple:
    return held.k, held.v, held.means, held.seq_lens, held.page_table, held.max_length, held.key_table


def append_to_cache(
    cache: cache.KeyValueCache,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    num_new: torch.Tensor | None = None,
    impl: str | None = None,
) -> None:
    """Appends by the custom op; arguments as in `ssa_kernels.append_to_cache`."""
    append_to_cache_op(*_operands(cache), k.detach(), v.detach(), num_new, impl)


def update_block_means(
    cache: cache.KeyValueCache, *, num_tokens: int, num_new: torch.Tensor | None = None, impl: str | None = None
) -> None:
    """Writes means by the custom op; arguments as in `ssa_kernels.update_block_means`."""
    update_block_means_op(*_operands(cache), num_tokens, num_new, impl)


def decode_attention(
    q: torch.Tensor,
    cache: cache.KeyValueCache,
    *,
    mode: str = "sparse",
    top_k: int = 16,
    num_new: torch.Tensor | None = None,
    scale: float | None = None,
    score: str = "softmax_sum",
    return_lse: bool = False,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns (o, lse) by the custom op; arguments as in `ssa_kernels.decode_attention`."""
    o, lse = decode_attention_op(q.detach(), *_operands(cache), mode, top_k, num_new, scale, score, impl)
    return o, lse if return_lse else None


def select_cached_blocks(
    q: torch.Tensor,
    cache: cache.KeyValueCache,
    *,
    top_k: int = 16,
    num_new: torch.Tensor | None = None,
    scale: float | None = None,
    score: str = "softmax_sum",
    impl: str | None = None,
) -> torch.Tensor:
    """Returns indices by the custom op; arguments as in `ssa_kernels.select_cached_blocks`."""
    return select_cached_blocks_op(q.detach(), *_operands(cache), top_k, num_new, scale, score, impl)
