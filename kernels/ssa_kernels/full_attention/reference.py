"""The full stream in plain PyTorch: the definition of the operator, and the implementation for a CPU.

o[t, h] = sum_j softmax_j(scale q[t, h] . k[j, g]) v[j, g] over the document's keys j <= t, where g = h // group_size. It calls torch's
fused attention for chunks of queries (masked_attention.py). Source: arXiv 2511.20102, section 3.
"""

import torch

from ..documents import DocumentLayout, as_layout
from ..masked_attention import masked_attention


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
    block_size = cu_seqlens.block_size if isinstance(cu_seqlens, DocumentLayout) else 16  # any block size works here
    layout = as_layout(cu_seqlens, q, k, block_size=block_size)
    o, lse = masked_attention(q, k, v, layout, scale)
    return o, lse if return_lse else None
