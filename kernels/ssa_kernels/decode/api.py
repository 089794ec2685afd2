"""`decode_attention` and `select_cached_blocks`: the public functions, their checks and the choice of implementation."""

import torch

from ..checks import check_one_dtype, check_scale
from ..dispatch import past_modes, resolve_impl
from ..select.api import check_selection
from .cache import KeyValueCache, check_step
from .reference import decode_attention_reference, select_cached_reference

MAX_NEW_TOKENS = 8
MAX_TOP_K = 128  # of the kernels
MODES = ("sparse", "full")


@past_modes
def decode_attention(
    q: torch.Tensor,
    cache: KeyValueCache,
    *,
    mode: str = "sparse",
    top_k: int = 16,
    num_new: torch.Tensor | None = None,
    scale: float | None = None,
    score: str = "softmax_sum",
    return_lse: bool = False,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns (o, lse): attention of the last tokens of each sequence over its cached keys, their own included.

    The same mathematics as `select_blocks` with `sparse_attention`, or as `full_attention`, on the same tokens. It is deterministic, has no
    gradient, never waits for a GPU, and its launches depend only on shapes and `cache.max_length`, so a CUDA graph can replay it while
    lengths and page tables change.

    Args:
        q: `[B, T, H, D]` in the cache's dtype, T from 1 to 8 new tokens per sequence; the cache's G divides H. Token t of sequence b is at
            position seq_lens[b] - n + t, where n is num_new[b], or T without num_new. Append the step's keys first.
        cache: keys, values and block means of this layer.
        mode: "sparse" (the chosen blocks only) or "full".
        top_k: blocks per query in sparse mode, the own block included.
        num_new: int32 `[B]`, how many of the T tokens each sequence has, from the first. By default all.
        scale: factor of the logits, default D^-1/2.
        score: as in `select_blocks`.
        return_lse: whether to return the log-sum-exp `[B, T, H]`, float32, natural logarithm. Otherwise it is None.
        impl: None, "triton" or "reference".

    Returns:
        o `[B, T, H, D]` in q's dtype, and lse or None. Tokens that a sequence does not have get o = 0 and lse = -inf.

    Raises:
        ValueError: for arguments that do not fit each other, and for inputs that the implementation does not support (float64 and
            compressed, official_compat: reference only; the kernels need D in [16, 256], H / G up to 32 and top_k up to 128).
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} must be one of {', '.join(MODES)}; try sparse")
    scale, top_k = _check(q, cache, num_new, scale, top_k, score)
    chosen = top_k if mode == "sparse" else None
    if resolve_impl(impl, q, "decode_attention") == "triton":
        _check_triton(q, cache, chosen, score)
        from .launch import decode_attention_triton  # imported here because Triton may be missing on a CPU machine

        o, lse = decode_attention_triton(
            q.detach().contiguous(), cache, num_new, top_k=chosen, scale=scale, score=score
        )
    else:
        o, lse = decode_attention_reference(q.detach(), cache, num_new, top_k=chosen, scale=scale, score=score)
    return o, lse if return_lse else None


@past_modes
def select_cached_blocks(
    q: torch.Tensor,
    cache: KeyValueCache,
    *,
    top_k: int = 16,
    num_new: torch.Tensor | None = None,
    scale: float | None = None,
    score: str = "softmax_sum",
    impl: str | None = None,
) -> torch.Tensor:
    """Returns the blocks that `decode_attention` attends to: int32 `[B, T, G, top_k]` (`[B, T, H, top_k]` for per_head).

    Block numbers within the sequence, ascending, padded with -1 at the end, as `select_blocks` returns for the same tokens; all -1 for tokens that
    a sequence does not have. Arguments and errors as in `decode_attention`.
    """
    scale, top_k = _check(q, cache, num_new, scale, top_k, score)
    if resolve_impl(impl, q, "select_cached_blocks") == "triton":
        _check_triton(q, cache, top_k, score)
        from .launch import select_cached_triton

        return select_cached_triton(q.detach().contiguous(), cache, num_new, top_k=top_k, scale=scale, score=score)
    return select_cached_reference(q.detach(), cache, num_new, top_k=top_k, scale=scale, score=score)


def _check(
    q: torch.Tensor, cache: KeyValueCache, num_new: torch.Tensor | None, scale: object, top_k: object, score: object
) -> tuple[float, int]:
    """Returns (scale, top_k). Raises ValueError for arguments that do not fit each other."""
    check_step(cache, num_new, q=q)
    check_one_dtype(cache=cache.k, q=q)
    kv_heads, head_dim = cache.k.shape[2:]
    if q.shape[3] != head_dim or q.shape[2] % kv_heads:
        raise ValueError(
            f"q {tuple(q.shape)} must be [B, T, H, D] with the cache's D={head_dim}, and H a multiple of its G={kv_heads}"
        )
    if q.shape[1] > MAX_NEW_TOKENS:
        raise ValueError(
            f"q of {q.shape[1]} tokens per sequence must have at most {MAX_NEW_TOKENS}; try select_blocks and sparse_attention, or full_attention, "
            "for a prompt"
        )
    return check_scale(scale, head_dim), check_selection(cache.block_size, top_k, score)


def _check_triton(q: torch.Tensor, cache: KeyValueCache, top_k: int | None, score: str) -> None:
    """Raises ValueError for what the kernels do not support."""
    group_size, head_dim = q.shape[2] // cache.k.shape[2], q.shape[3]
    if group_size > 32 or not 16 <= head_dim <= 256:
        raise ValueError(
            f"H / G = {group_size} and D = {head_dim} must be at most 32 and in [16, 256] for the Triton kernels; try impl='reference'"
        )
    if top_k is not None and score in ("compressed", "official_compat"):
        raise ValueError(f"score={score!r} has no decoding kernel; try impl='reference', or softmax_sum")
    if top_k is not None and top_k > MAX_TOP_K:
        raise ValueError(f"top_k={top_k} must be at most {MAX_TOP_K} for the decoding kernels; try impl='reference'")
