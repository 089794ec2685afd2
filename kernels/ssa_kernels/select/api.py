"""`select_blocks`: the public function, its checks and the choice of implementation."""

from dataclasses import replace
from itertools import accumulate

import torch

from ..checks import check_attention, check_scale, check_tensors, check_whole
from ..dispatch import past_modes, resolve_impl
from ..documents import DocumentLayout, as_layout
from ..queries import query_slice
from .reference import COMPLETE_OWN, select_blocks_reference

SCORES = ("softmax_sum", "per_head", "compressed", "official_compat")


@past_modes
def select_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    block_size: int,
    top_k: int,
    cu_seqlens: torch.Tensor | DocumentLayout,
    scale: float | None = None,
    score: str = "softmax_sum",
    lse: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Returns the blocks each query attends to: exact, deterministic, without gradient.

    Args:
        q: `[tokens, H, D]`.
        k: `[tokens, G, D]`, G dividing H, in q's dtype.
        block_size: keys per block.
        top_k: blocks per query, the own block included.
        cu_seqlens: int32 `[documents + 1]`, or a layout built from it.
        scale: factor of the logits, default D^-1/2.
        score: "softmax_sum" (SSA), "per_head" (MoBA), "compressed" (NSA) or "official_compat" (the official code's choice; see reference.py).
        lse: float32 `[tokens, H]`, the log-sum-exp of `compressed_attention` for the same arguments, which saves the kernels the sums of the
            scores compressed and official_compat. The reference computes them again.
        impl: None, "triton" or "reference".

    Returns:
        int32 `[tokens, G, top_k]` (`[tokens, H, top_k]` for per_head): block numbers within the query's own document, ascending,
        padded with -1 at the end. The own block is always included. The others are the earlier blocks of largest importance; of equal
        ones, the more recent are taken.

    Raises:
        ValueError: for arguments that do not fit each other, and for inputs that the implementation does not support (float64: reference only;
            the kernels need D in [16, 256] and H / G up to 32).
    """
    check_attention(q=q, k=k)
    scale = check_scale(scale, q.shape[-1])
    layout = as_layout(cu_seqlens, q, k, block_size=block_size)
    block_size, top_k = layout.block_size, check_selection(layout.block_size, top_k, score)
    _check_lse(lse, q, score)
    if resolve_impl(impl, q, "select_blocks") == "triton":
        _check_triton(q, k)
        from .launch import (  # imported here because Triton may be missing on a CPU machine
            queries_per_tile,
            select_blocks_triton,
        )

        # A tile of queries walks the block rows from its first query's document to its last one's. Only neighbours bound that.
        spans = _neighbours(q, layout, queries_per_tile(q.shape[1] // k.shape[1]))
        sums = [None] * len(spans) if lse is None else lse.detach().split([len(q_span) for q_span, _ in spans])
        found = [
            select_blocks_triton(q_span, k, layout=span_layout, top_k=top_k, scale=scale, score=score, lse=part)
            for (q_span, span_layout), part in zip(spans, sums, strict=True)
        ]
        return found[0] if len(found) == 1 else torch.cat(found)
    return select_blocks_reference(q.contiguous(), k.contiguous(), layout=layout, top_k=top_k, scale=scale, score=score)


def _neighbours(q: torch.Tensor, layout: DocumentLayout, tile: int) -> list[tuple[torch.Tensor, DocumentLayout]]:
    """Returns the queries and layout of each span; all together if no tile of queries then reaches from one span into the next."""
    lengths = [span.length for span in layout.spans]
    if all(length % tile == 0 for length in lengths[:-1]):
        return [(q, layout)]
    ends = list(accumulate(lengths))
    pieces = zip(q.split(lengths), lengths, ends, strict=True)
    apart = replace(layout, spans=(), segments=None)  # a slice of one span does not reach into the next
    return [(q_span, query_slice(apart, slice(end - length, end))) for q_span, length, end in pieces]


def _check_lse(lse: object, q: torch.Tensor, score: str) -> None:
    """Raises ValueError unless lse is None, or float32 [tokens, H] on q's device for a score that it serves."""
    if lse is None:
        return
    check_tensors(q=q, lse=lse)
    assert isinstance(lse, torch.Tensor)
    if (
        score not in COMPLETE_OWN
        or lse.shape != q.shape[:2]
        or lse.dtype != torch.promote_types(q.dtype, torch.float32)
    ):
        raise ValueError(
            f"lse {tuple(lse.shape)}, {lse.dtype} with score={score!r} must be the log-sum-exp [{q.shape[0]}, {q.shape[1]}] of compressed_attention, "
            f"with score compressed or official_compat; try None"
        )


def _check_triton(q: torch.Tensor, k: torch.Tensor) -> None:
    group_size, head_dim = q.shape[1] // k.shape[1], q.shape[2]
    if group_size > 32 or not 16 <= head_dim <= 256:
        raise ValueError(
            f"H / G = {group_size} and D = {head_dim} must be at most 32 and in [16, 256] for the Triton kernels; try impl='reference'"
        )


def check_selection(block_size: int, top_k: object, score: object) -> int:
    """Returns top_k as an int. Raises ValueError unless top_k, the score and the block size fit each other."""
    top_k = check_whole("top_k", top_k, least=1, hint=": the own block is always chosen; try 16")
    if score not in SCORES:
        raise ValueError(f"score={score!r} must be one of {', '.join(SCORES)}; try softmax_sum")
    if score == "official_compat" and not 1 < top_k <= block_size:
        raise ValueError(
            f"top_k={top_k} must lie in [2, block_size={block_size}] for score='official_compat'; try {block_size}"
        )
    return top_k
