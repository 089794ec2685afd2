"""A cache of keys, values and block means for decoding, contiguous or paged.

Each sequence is one document that starts with its own block 0. A page is a block: page c of a sequence holds its keys, its values and the mean of its keys, so
pages can be shared, moved and freed as a whole. A contiguous cache is the same with page b * R + c for block c of sequence b.

`seq_lens` counts the tokens of each sequence **including those of the current step**. It is on the device, and all layers of a model share it:
a step adds to it once, then each layer appends its keys and values and attends. Taking tokens back (a rejected draft) is subtracting from it.

Selection scores only blocks before the query's own, and those are complete. So a mean is computed when its block is complete, from all the
block's keys in the cache: the same sum, in the same order, as the prefill computes (select/reference.py). There is no running state that
could drift from it, and none to undo. Means of incomplete blocks are never written or read.

Without `page_table` the memory of a sequence is k[b]; with it, pages may lie anywhere and in any order. Entries for blocks that a sequence
has not reached are never read, nor is memory that was never written. On a GPU, lengths above the capacity count as the capacity, page
numbers outside the pages as the nearest page and entries of a `key_table` as the nearest key, so no kernel accesses memory outside its tensors.
On a CPU all three are refused.

A `key_table` is for keys and values that another library wrote, such as a batch with padding between its tokens: it says where each token's key
lies in k[b], which may have any number of rows. Means are by block of tokens as ever. The owner writes keys and values, and calls
`update_block_means`.

Not done here: choosing and freeing pages, a cache for sequences with several documents, quantised keys.
"""

from dataclasses import dataclass

import torch

from ..checks import check_floats, check_one_dtype, check_tensors, check_whole, looks_at_values
from ..dispatch import past_modes, resolve_impl


@dataclass(frozen=True, slots=True)
class KeyValueCache:
    """Keys, values and block means of B sequences of one layer. Shapes: R blocks per sequence, P pages, K keys per block.

    Raises:
        ValueError: for tensors that do not fit each other.
    """

    k: torch.Tensor  # [B, R * K, G, D], with a page table [P, K, G, D], with a key table [B, any number, G, D]
    v: torch.Tensor  # the same
    means: torch.Tensor  # [B, R, G, D], or with a page table [P, G, D], in k's dtype
    seq_lens: torch.Tensor  # int32 [B], tokens of each sequence, those of the current step included
    page_table: torch.Tensor | None = None  # int32 [B, R], the page of each block
    max_length: int | None = None  # no sequence of the next call is longer; bounds grids; by default the capacity
    key_table: torch.Tensor | None = None  # int32 [B, R * K]: key j of sequence b is k[b, key_table[b, j]]

    def __post_init__(self) -> None:
        _check_cache(self)

    @property
    def block_size(self) -> int:
        """K, the keys per block, which is the page size."""
        if self.page_table is not None:
            return self.k.shape[1]
        return (self.k if self.key_table is None else self.key_table).shape[1] // self.means.shape[1]

    @property
    def blocks_per_sequence(self) -> int:
        """R, the blocks that a sequence has room for."""
        return self.means.shape[1] if self.page_table is None else self.page_table.shape[1]

    @property
    def capacity(self) -> int:
        """The tokens that a sequence has room for."""
        return self.blocks_per_sequence * self.block_size

    @property
    def longest(self) -> int:
        """The bound on a sequence's length: `max_length`, or the capacity."""
        return self.capacity if self.max_length is None else min(self.max_length, self.capacity)

    @property
    def num_pages(self) -> int:
        """P, the number of pages."""
        return self.means.shape[0] if self.page_table is not None else self.means.shape[0] * self.means.shape[1]

    def pages(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns views of keys and values `[P, K, G, D]` (with a key table as they are) and of means `[P, G, D]`."""
        means = self.means.view(self.num_pages, *self.k.shape[2:])
        if self.key_table is not None:
            return self.k, self.v, means
        shape = (self.num_pages, self.block_size, *self.k.shape[2:])
        return self.k.view(shape), self.v.view(shape), means

    def block_pages(self) -> torch.Tensor:
        """Returns the page of each block, int32 or int64 `[B, R]`."""
        if self.page_table is not None:
            return self.page_table
        return torch.arange(self.num_pages, device=self.k.device).view(self.means.shape[:2])


def build_cache(
    shape: tuple[int, int, int, int],
    *,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    num_pages: int | None = None,
) -> KeyValueCache:
    """Returns an empty cache.

    Args:
        shape: (B sequences, tokens per sequence, G kv heads, D head dim); the tokens are rounded up to whole blocks.
        block_size: keys per block.
        dtype: of keys, values and means.
        device: where the cache lies.
        num_pages: if given, the cache is paged: this many pages, which all sequences share, and a page table of zeros to be filled in.

    Raises:
        ValueError: for a size below 1 and a dtype that operators do not compute in.
    """
    names = ("sequences", "tokens per sequence", "kv heads", "head dim")
    batch, tokens, kv_heads, head_dim = (check_whole(n, x, least=1) for n, x in zip(names, shape, strict=True))
    block_size = check_whole("block_size", block_size, least=1, hint=": keys per block; try 16")
    blocks = -(-tokens // block_size)
    paged = num_pages is not None
    pages = check_whole("num_pages", num_pages, least=1, hint=", or None") if paged else batch * blocks
    keys = (pages, block_size) if paged else (batch, blocks * block_size)
    means = (pages,) if paged else (batch, blocks)
    k, v = (torch.empty(*keys, kv_heads, head_dim, dtype=dtype, device=device) for _ in range(2))
    return KeyValueCache(
        k=k,
        v=v,
        means=torch.empty(*means, kv_heads, head_dim, dtype=dtype, device=device),
        seq_lens=torch.zeros(batch, dtype=torch.int32, device=device),
        page_table=torch.zeros(batch, blocks, dtype=torch.int32, device=device) if paged else None,
    )


@past_modes
def append_to_cache(
    cache: KeyValueCache,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    num_new: torch.Tensor | None = None,
    impl: str | None = None,
) -> None:
    """Writes the step's keys and values to the end of each sequence, and the means of the blocks that they complete.

    `cache.seq_lens` already counts them: token t of sequence b becomes key seq_lens[b] - n + t, where n is num_new[b], or T without num_new.
    One launch, deterministic, without waiting. T may be 1 (decoding), a few (drafts), or a whole prompt.

    Args:
        cache: the layer's cache.
        k, v: `[B, T, G, D]` in the cache's dtype.
        num_new: int32 `[B]`, how many of the T tokens each sequence gets, from the first; the others are ignored. By default all.
        impl: None, "triton" or "reference".

    Raises:
        ValueError: for arguments that do not fit each other, and a cache with a key table. On a CPU also for sequences with more tokens than their
            length or their room.
    """
    check_one_dtype(cache=cache.k, k=k, v=v)
    check_step(cache, num_new, k=k, v=v)
    if cache.key_table is not None:
        raise ValueError(
            "append_to_cache takes no cache with a key_table; write keys and values, then try update_block_means"
        )
    if k.shape != v.shape or k.shape[2:] != cache.k.shape[2:]:
        raise ValueError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)} must be [B, T, G, D] with the cache's G and D {tuple(cache.k.shape[2:])}"
        )
    if resolve_impl(impl, k, "append_to_cache") == "triton":
        from .append_triton import append_triton  # imported here because Triton may be missing on a CPU machine

        append_triton(cache, k.detach(), v.detach(), num_new)
    else:
        from .reference import append_reference

        append_reference(cache, k.detach(), v.detach(), num_new)


@past_modes
def update_block_means(
    cache: KeyValueCache, *, num_tokens: int, num_new: torch.Tensor | None = None, impl: str | None = None
) -> None:
    """Writes the means of the blocks that the last tokens of each sequence complete, for an owner who has written keys and values.

    The same sums as `append_to_cache`, in one launch, deterministic, without waiting.

    Args:
        cache: the layer's cache, whose keys are written and counted.
        num_tokens: T, the most tokens that a sequence got since its means were last written.
        num_new: int32 `[B]`, how many each sequence got. By default T.
        impl: None, "triton" or "reference".

    Raises:
        ValueError: for arguments that do not fit each other.
    """
    check_whole("num_tokens", num_tokens, least=1, hint=": new tokens per sequence")
    check_step(cache, num_new, num_tokens=num_tokens)
    if resolve_impl(impl, cache.k, "update_block_means") == "triton":
        from .append_triton import update_means_triton

        update_means_triton(cache, num_tokens, num_new)
    else:
        from .reference import update_means_reference

        update_means_reference(cache, num_tokens, num_new)


def check_step(
    cache: KeyValueCache, num_new: torch.Tensor | None, *, num_tokens: int = 0, **tensors: torch.Tensor
) -> None:
    """Raises ValueError unless the tensors are [B, T, heads, D] for the cache's sequences. Values are checked on a CPU only.

    Without tensors, T is `num_tokens`.
    """
    if not isinstance(cache, KeyValueCache):
        raise ValueError(f"cache must be a KeyValueCache by build_cache, got {type(cache).__name__}")
    check_tensors(cache=cache.k, **tensors)
    batch = len(cache.seq_lens)
    for name, tensor in tensors.items():
        if tensor.dim() != 4 or tensor.shape[0] != batch or 0 in tensor.shape:
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} must be [B, T, heads, D], no size 0, with the cache's B={batch}"
            )
    tokens = next(iter(tensors.values())).shape[1] if tensors else num_tokens
    if num_new is not None:
        check_tensors(cache=cache.k, num_new=num_new)
        if num_new.dtype != torch.int32 or num_new.shape != (batch,):
            raise ValueError(
                f"num_new of shape {tuple(num_new.shape)} and {num_new.dtype} must be int32 [{batch}], tokens per sequence"
            )
    if looks_at_values(cache.seq_lens):
        _check_values(cache, tokens, num_new)


def _check_values(cache: KeyValueCache, tokens: int, num_new: torch.Tensor | None) -> None:
    """Raises ValueError for lengths beyond the capacity, more new tokens than T or than the length, and pages that do not exist."""
    lengths = cache.seq_lens
    if int(lengths.min()) < 0 or int(lengths.max()) > cache.longest:
        bound = "the capacity" if cache.max_length is None else "max_length"
        raise ValueError(f"seq_lens={lengths.tolist()[:8]}... must lie in [0, {cache.longest}], {bound}")
    new = torch.full_like(lengths, tokens) if num_new is None else num_new
    if bool(((new < 0) | (new > tokens) | (new > lengths)).any()):
        raise ValueError(
            f"num_new={new.tolist()[:8]}... must lie in [0, {tokens}], the tokens given, and not exceed seq_lens={lengths.tolist()[:8]}..., "
            "which count them; add to seq_lens before the step, or pass num_new"
        )
    if cache.page_table is not None:
        reached = torch.arange(cache.blocks_per_sequence) * cache.block_size < lengths[:, None]
        wrong = reached & ((cache.page_table < 0) | (cache.page_table >= cache.num_pages))
        if bool(wrong.any()):
            sequence = int(wrong.any(1).nonzero()[0])
            raise ValueError(
                f"page_table of sequence {sequence} must hold pages in [0, {cache.num_pages}) for its {int(lengths[sequence])} tokens"
            )
    if cache.key_table is not None:
        reached = torch.arange(cache.capacity) < lengths[:, None]
        if bool((reached & ((cache.key_table < 0) | (cache.key_table >= cache.k.shape[1]))).any()):
            raise ValueError(
                f"key_table must hold rows of k in [0, {cache.k.shape[1]}) for the {lengths.tolist()[:8]}... tokens"
            )


def _check_cache(cache: KeyValueCache) -> None:
    """Raises ValueError unless the tensors are contiguous and of one device, with shapes and dtypes that fit each other."""
    check_tensors(k=cache.k, v=cache.v, means=cache.means, seq_lens=cache.seq_lens)
    check_floats(k=cache.k)
    check_one_dtype(k=cache.k, v=cache.v, means=cache.means)
    k, means, table, keys = cache.k, cache.means, cache.page_table, cache.key_table
    given = {name: x for name, x in (("page_table", table), ("key_table", keys)) if x is not None}
    check_tensors(k=k, **given)
    if len(given) > 1:
        raise ValueError("page_table and key_table of a cache exclude each other; try one of them")
    fits = k.dim() == 4 and cache.v.shape == k.shape and means.dim() == (4 if table is None else 3) and 0 not in k.shape
    fits = fits and means.shape[0] == k.shape[0] and means.shape[-2:] == k.shape[2:]
    rows = k if keys is None else keys
    fits = fits and (table is not None or (means.shape[1] > 0 and rows.shape[1] % means.shape[1] == 0))
    if not fits or not all(x.is_contiguous() for x in (k, cache.v, means)):
        raise ValueError(
            f"k {tuple(k.shape)}, v {tuple(cache.v.shape)} and means {tuple(means.shape)} of a cache must be contiguous: [B, R * K, G, D] twice and "
            "[B, R, G, D], or with a page table [P, K, G, D] twice and [P, G, D]; try build_cache"
        )
    batch = len(cache.seq_lens) if table is not None else k.shape[0]
    wanted: dict[str, tuple[torch.Tensor, tuple[int, ...]]] = {"seq_lens": (cache.seq_lens, (batch,))}
    if table is not None:
        wanted["page_table"] = (table, (batch, table.shape[-1]))
    if keys is not None:
        wanted["key_table"] = (keys, (batch, keys.shape[-1]))
    for name, (tensor, shape) in wanted.items():
        if tensor.dtype != torch.int32 or tuple(tensor.shape) != shape or not tensor.is_contiguous() or 0 in shape:
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} and {tensor.dtype} of a cache must be int32 {list(shape)}, contiguous; try build_cache"
            )
    if cache.max_length is not None:
        check_whole("max_length", cache.max_length, least=1, hint=", or None")
