"""The sparse stream in plain PyTorch: causal softmax attention over the keys of the chosen blocks only.

It is the definition of the operator, and the implementation for training on a CPU. For each chunk of queries the chosen blocks become a mask for
torch's fused attention (masked_attention.py, which explains why this is not a gather). Gradients come from torch.
"""

import torch

from ..documents import DocumentLayout
from ..masked_attention import masked_attention


def sparse_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, *, layout: DocumentLayout, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (o, lse); arguments as in `sparse_attention`, with the layout built."""
    chosen = chosen_block_rows(indices, layout)
    block_row_of_key = key_block_rows(layout)
    o, lse = masked_attention(
        q, k, v, layout, scale, lambda queries, keys: chosen[queries][..., block_row_of_key[keys]].transpose(0, 1)
    )
    empty = (indices < 0).all(-1).repeat_interleave(q.shape[1] // indices.shape[1], 1)
    return o, lse.masked_fill(
        empty, float("-inf")
    )  # torch's fused attention returns 0 for the logarithm of an empty sum


def chosen_block_rows(indices: torch.Tensor, layout: DocumentLayout) -> torch.Tensor:
    """Returns bool `[T, G or H, R]`: whether each query chose each block row."""
    block_rows = indices + layout.query_first_block_row[:, None, None]
    block_rows = torch.where(indices < 0, layout.num_block_rows, block_rows).clamp(0, layout.num_block_rows).long()
    chosen = torch.zeros(*indices.shape[:2], layout.num_block_rows + 1, dtype=torch.bool, device=indices.device)
    return chosen.scatter_(2, block_rows, True)[..., :-1]


def key_block_rows(layout: DocumentLayout) -> torch.Tensor:
    """Returns int64 `[keys]`: each key's block row."""
    key = torch.arange(layout.num_tokens, dtype=torch.int32, device=layout.cu_seqlens.device)
    document = torch.searchsorted(layout.cu_seqlens[1:], key, right=True)
    return (layout.document_first_block_row[document] + (key - layout.cu_seqlens[document]) // layout.block_size).long()
