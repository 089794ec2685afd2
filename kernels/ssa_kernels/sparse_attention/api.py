"""`sparse_attention`: the public function, its checks and the choice of implementation."""

import torch

from ..checks import aligned, check_attention, check_scale, check_tensors, looks_at_values
from ..dispatch import past_modes, resolve_impl
from ..documents import DocumentLayout, as_layout
from .reference import sparse_attention_reference


@past_modes
def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    *,
    block_size: int,
    cu_seqlens: torch.Tensor | DocumentLayout,
    scale: float | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (o, lse): causal softmax attention of each query over the keys of its chosen blocks.

    Args:
        q: `[tokens, H, D]`.
        k, v: `[tokens, G, D]`, G dividing H, in q's dtype.
        indices: int32 `[tokens, G or H, top_k]` from `select_blocks`: block numbers within the query's document up to its own block,
            ascending, padded with -1 at the end. Other values are refused on a CPU. On a GPU, where checking would mean waiting, the
            caller is responsible; no kernel accesses memory outside its tensors.
        block_size: keys per block.
        cu_seqlens: int32 `[documents + 1]`, or a layout built from it.
        scale: factor of the logits, default D^-1/2.
        impl: None, "triton" or "reference".

    Returns:
        o `[tokens, H, D]` in q's dtype, differentiable in q, k and v, and lse `[tokens, H]`, float32, natural logarithm, no gradient. A query
        without blocks gets o = 0 and lse = -inf.

    Raises:
        ValueError: for arguments that do not fit each other, and for inputs that the implementation does not support (float64: reference only).
    """
    check_attention(q=q, k=k, v=v)
    scale = check_scale(scale, q.shape[-1])
    layout = as_layout(cu_seqlens, q, k, block_size=block_size)
    _check_indices(indices, q, k, layout)
    q, k, v, indices = (x.contiguous() for x in (q, k, v, indices))
    if resolve_impl(impl, q, "sparse_attention") == "triton":
        from .autograd import SparseAttention  # imported here because Triton may be missing on a CPU machine

        return SparseAttention.apply(aligned(q), aligned(k), aligned(v), aligned(indices), layout, scale)
    return sparse_attention_reference(q, k, v, indices, layout=layout, scale=scale)


def _check_indices(indices: torch.Tensor, q: torch.Tensor, k: torch.Tensor, layout: DocumentLayout) -> None:
    """Raises ValueError unless the indices are lists of blocks for each query. Values are checked on a CPU only."""
    check_tensors(q=q, indices=indices)
    (queries, heads), kv_heads = q.shape[:2], k.shape[1]
    fits = indices.dim() == 3 and indices.shape[0] == queries and indices.shape[1] in (kv_heads, heads)
    if not fits or indices.shape[2] < 1 or indices.dtype != torch.int32:
        raise ValueError(
            f"indices of shape {tuple(indices.shape)} and {indices.dtype} must be int32 [{queries}, {kv_heads} or {heads}, top_k] with top_k at "
            "least 1; try select_blocks"
        )
    if not looks_at_values(indices):
        return
    own = (layout.query_position // layout.block_size)[:, None, None]
    before, after = indices[..., :-1], indices[..., 1:]
    wrong = (indices < -1) | (indices > own)
    wrong[..., 1:] |= (after >= 0) & ((before < 0) | (before >= after))
    if bool(wrong.any()):
        query = int(wrong.flatten(1).any(1).nonzero()[0])
        raise ValueError(
            f"indices of query {query}, {indices[query].tolist()}, must be block numbers in [0, {int(own[query])}], its own block, ascending and "
            "padded with -1 at the end; try select_blocks"
        )
