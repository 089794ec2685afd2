"""Causal softmax attention over all earlier keys of the same document: SSA's full stream.

o[t, h] = sum_j softmax_j(scale q[t, h] . k[j, g]) v[j, g] over the document's keys j <= t, where g = h // (H / G).
The reference is torch's fused attention over chunks of queries (dense.py). Source: algorithm of arXiv 2511.20102, section 3.
"""

import torch

from .dense import masked_attention
from .dispatch import resolve_impl
from .documents import DocumentLayout, as_layout


def full_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | DocumentLayout,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns (o, lse), differentiable in q, k and v.

    Args:
        q: `[tokens, H, D]`.
        k, v: `[tokens, G, D]`, G dividing H.
        cu_seqlens: int32 `[documents + 1]`, or a layout built from it.
        scale: factor of the logits, default D^-1/2.
        return_lse: whether to give the log-sum-exp: `[tokens, H]`, float32, natural logarithm, no gradient. Else None.
        impl: None, "triton" (the fused GPU path) or "reference".
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if resolve_impl(impl, q, "full_attention") == "triton":
        raise NotImplementedError("full_attention has no GPU path yet; try impl='reference'")
    return full_attention_reference(q, k, v, cu_seqlens=cu_seqlens, scale=scale, return_lse=return_lse)


def full_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | DocumentLayout,
    scale: float,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns (o, lse) in plain PyTorch; arguments as in `full_attention`."""
    block_size = cu_seqlens.block_size if isinstance(cu_seqlens, DocumentLayout) else 16  # blocks play no part here
    layout = as_layout(cu_seqlens, num_tokens=k.shape[0], block_size=block_size)
    o, lse = masked_attention(q, k, v, layout, scale)
    return o, lse if return_lse else None
