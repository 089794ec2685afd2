"""`sparse_attention`: the public function, its checks and the choice of implementation."""

import torch

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
        k, v: `[tokens, G, D]`, G dividing H.
        indices: int32 `[tokens, G or H, top_k]` from `select_blocks`: block numbers within the query's document, ascending,
            -1 padded at the end, the own block among them.
        block_size: keys per block.
        cu_seqlens: int32 `[documents + 1]`, or a layout built from it.
        scale: factor of the logits, default D^-1/2.
        impl: None, "triton" or "reference".

    Returns:
        o `[tokens, H, D]` in q's dtype, differentiable in q, k and v, and lse `[tokens, H]`, float32, natural logarithm, no gradient.
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads % kv_heads:
        raise ValueError(f"num_query_heads={heads} must be a multiple of num_kv_heads={kv_heads}")
    if indices.shape[0] != q.shape[0] or indices.shape[1] not in (kv_heads, heads):
        raise ValueError(
            f"indices of shape {tuple(indices.shape)} must be [{q.shape[0]}, {kv_heads} or {heads}, top_k]; try select_blocks"
        )
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    layout = as_layout(cu_seqlens, num_tokens=k.shape[0], block_size=block_size)
    if resolve_impl(impl, q, "sparse_attention") == "triton":
        from .autograd import SparseAttention  # here, because it imports Triton

        tensors = (x.contiguous() for x in (q, k, v, indices))
        return SparseAttention.apply(*tensors, layout, scale)
    return sparse_attention_reference(q, k, v, indices, layout=layout, scale=scale)
