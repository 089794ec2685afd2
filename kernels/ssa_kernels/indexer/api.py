"""The public functions of the trained scorer, their checks and the choice of implementation.

A scorer is a small attention of its own: J index query heads and one index key per kv head. A block's score is the share of that attention's
softmax which falls on the block,

    p[t, g, c] = mean over g's index heads j of sum over the keys s <= t of block c of softmax_s(scale iq[t, j] . ik[s, g]),

so ranking blocks by p is ranking them by the log-sum-exp of their tokens' index scores (J = 1). The scorer is trained to predict the same share
of full attention (`index_loss`). Sources: DeepSeek-V3.2's lightning indexer (token scores, KL divergence from the attention summed over heads and
normalised) and MiniMax's MSA (arXiv 2606.13392: one index head per kv head, blocks, the own block always chosen).

Not here: projections, RoPE, and where the loss enters the gradient (ssa_pretrain/model/indexer.py); decoding from a cache of index keys.
"""

from typing import NamedTuple

import torch

from ..checks import check_attention, check_scale, check_tensors, check_whole
from ..dispatch import resolve_impl
from ..documents import DocumentLayout, as_layout
from .loss import IndexLossFunction
from .reference import block_mass_reference, choose_reference

LARGEST_BLOCK = 128  # keys, of the kernels


class IndexLoss(NamedTuple):
    """The result of `index_loss`."""

    loss: torch.Tensor  # scalar, float32 (float64 for float64 inputs): mean over queries and kv heads, nats
    captured_mass: (
        torch.Tensor
    )  # scalar, no gradient: mean share of full attention in the blocks that the scorer chooses


def choose_by_index(
    iq: torch.Tensor,
    ik: torch.Tensor,
    *,
    block_size: int,
    top_k: int,
    cu_seqlens: torch.Tensor | DocumentLayout,
    scale: float | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Returns the blocks of each query: its own block, and the top_k - 1 earlier ones with the largest score. No gradient, deterministic.

    Args:
        iq: index queries `[queries, G * J, D]`, J per kv head.
        ik: index keys `[keys, G, D]`, in iq's dtype.
        block_size: keys per block.
        top_k: blocks per query, the own block included.
        cu_seqlens: int32 `[documents + 1]`, or a layout built from it.
        scale: factor of the index scores, default D^-1/2.
        impl: None, "triton" or "reference".

    Returns:
        int32 `[queries, G, top_k]`: block numbers within the query's document, ascending, padded with -1 at the end, as `sparse_attention`
        takes them. Of blocks with equal scores, the more recent are taken.

    Raises:
        ValueError: for arguments that do not fit each other, and for inputs that the kernels do not support (float64, D above 128, J above 32,
            blocks above 128).
    """
    iq, ik, layout, scale = _checked(iq, ik, block_size, cu_seqlens, scale)
    top_k = check_whole("top_k", top_k, least=1, hint=": the own block is always chosen; try 16")
    if resolve_impl(impl, iq, "choose_by_index") == "triton":
        _check_triton(iq, ik, layout)
        from .launch import choose_triton  # imported here because Triton may be missing on a CPU machine

        return choose_triton(iq, ik, layout=layout, top_k=top_k, scale=scale)
    return choose_reference(iq, ik, layout=layout, top_k=top_k, scale=scale)


def block_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    block_size: int,
    cu_seqlens: torch.Tensor | DocumentLayout,
    scale: float | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Returns the share of each query's causal attention that falls on each block of its document, a mean over the heads of a kv head.

    Args:
        q: `[queries, H, D]`.
        k: `[keys, G, D]`, G dividing H, in q's dtype.
        block_size, cu_seqlens, scale, impl: as in `choose_by_index`.

    Returns:
        `[queries, G, C]`, float32 (float64 for float64 inputs), C blocks of the longest document possible; 0 for blocks after the query's own.
        A row sums to 1. It has no gradient. `index_loss` computes the same by chunks of queries and keeps none of it.

    Raises:
        ValueError: as `choose_by_index`.
    """
    q, k, layout, scale = _checked(q, k, block_size, cu_seqlens, scale)
    if resolve_impl(impl, q, "block_mass") == "triton":
        _check_triton(q, k, layout)
        from .launch import log_block_mass

        return log_block_mass(q, k, layout=layout, scale=scale)[0].exp()
    return block_mass_reference(q, k, layout=layout, scale=scale)


def index_loss(
    iq: torch.Tensor,
    ik: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    block_size: int,
    top_k: int,
    cu_seqlens: torch.Tensor | DocumentLayout,
    scale: float | None = None,
    index_scale: float | None = None,
    impl: str | None = None,
) -> IndexLoss:
    """Returns (loss, captured mass); the loss is differentiable in iq and ik only.

    With t the block mass of full attention over q and k (the target, without gradient) and p the scorer's,

        loss = mean over queries and kv heads of sum over blocks c up to the query's own of t[c] (log t[c] - log p[c]).

    A query with at most top_k blocks up to its own has nothing to choose: its loss is 0 and its captured mass 1. The gradients are computed with
    the loss, by chunks of queries, so the backward keeps two tensors of the shapes of iq and ik, and nothing of size queries x keys exists.

    Args:
        iq, ik: as in `choose_by_index`.
        q: `[queries, H, D']`, the queries of full attention.
        k: `[keys, G, D']`.
        block_size, top_k, cu_seqlens, impl: as in `choose_by_index`.
        scale: factor of full attention's logits, default D'^-1/2.
        index_scale: factor of the index scores, default D^-1/2.

    Raises:
        ValueError: as `choose_by_index`, and unless both pairs have the same queries, keys and kv heads.
    """
    q, k = q.detach(), k.detach()
    iq, ik, layout, index_scale = _checked(iq, ik, block_size, cu_seqlens, index_scale)
    q, k, _, scale = _checked(q, k, block_size, layout, scale)
    check_tensors(iq=iq, q=q)
    if iq.shape[0] != q.shape[0] or ik.shape[:2] != k.shape[:2] or iq.dtype != q.dtype:
        raise ValueError(
            f"iq {tuple(iq.shape)} and ik {tuple(ik.shape)} must have the queries, keys, kv heads and dtype of q {tuple(q.shape)} and "
            f"k {tuple(k.shape)}"
        )
    top_k = check_whole("top_k", top_k, least=1, hint=": the own block is always chosen; try 16")
    chosen = resolve_impl(impl, iq, "index_loss")
    if chosen == "triton":
        _check_triton(iq, ik, layout)
        _check_triton(q, k, layout)
    with_gradients = torch.is_grad_enabled() and (iq.requires_grad or ik.requires_grad)
    return IndexLoss(
        *IndexLossFunction.apply(iq, ik, q, k, layout, top_k, (scale, index_scale), with_gradients, chosen)
    )


def _checked(
    q: torch.Tensor, k: torch.Tensor, block_size: int, cu_seqlens: torch.Tensor | DocumentLayout, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor, DocumentLayout, float]:
    """Returns contiguous queries and keys, their layout and scale. Raises ValueError if they do not fit each other."""
    check_attention(q=q, k=k)
    layout = as_layout(cu_seqlens, q, k, block_size=block_size)
    return q.contiguous(), k.contiguous(), layout, check_scale(scale, q.shape[-1])


def _check_triton(q: torch.Tensor, k: torch.Tensor, layout: DocumentLayout) -> None:
    group_size, head_dim = q.shape[1] // k.shape[1], q.shape[2]
    if group_size > 32 or not 16 <= head_dim <= 128 or layout.block_size > LARGEST_BLOCK:
        raise ValueError(
            f"H / G = {group_size}, D = {head_dim} and block_size={layout.block_size} must be at most 32, in [16, 128] and at most "
            f"{LARGEST_BLOCK} for the Triton kernels; try impl='reference'"
        )
