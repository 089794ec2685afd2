"""The sparse stream in plain PyTorch: causal softmax attention over the keys of the chosen blocks alone.

It defines what the kernels must compute, and it is what training on a CPU runs: the chosen blocks become a mask, chunk by chunk of
queries, for torch's fused attention (dense.py, which says why not a gather). Gradients come from torch.
"""

import torch

from ..documents import DocumentLayout
from ..masked_attention import masked_attention


def sparse_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, *, layout: DocumentLayout, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (o, lse); arguments as in `sparse_attention`, with the layout built."""
    chosen = chosen_rows(indices, layout)
    row_of_key = key_rows(layout)
    o, lse = masked_attention(
        q, k, v, layout, scale, lambda queries, keys: chosen[queries][..., row_of_key[keys]].transpose(0, 1)
    )
    empty = (indices < 0).all(-1).repeat_interleave(q.shape[1] // indices.shape[1], 1)
    return o, lse.masked_fill(empty, float("-inf"))  # torch's fused attention gives 0 for the logarithm of no sum


def chosen_rows(indices: torch.Tensor, layout: DocumentLayout) -> torch.Tensor:
    """Returns bool `[T, G or H, R]`: whether a query chose a block row."""
    rows = indices + layout.query_first_block_row[:, None, None]
    rows = torch.where(indices < 0, layout.num_block_rows, rows).clamp(0, layout.num_block_rows).long()
    chosen = torch.zeros(*indices.shape[:2], layout.num_block_rows + 1, dtype=torch.bool, device=indices.device)
    return chosen.scatter_(2, rows, True)[..., :-1]


def key_rows(layout: DocumentLayout) -> torch.Tensor:
    """Returns int64 `[keys]`: the block row in which each key lies."""
    key = torch.arange(layout.num_tokens, dtype=torch.int32, device=layout.cu_seqlens.device)
    document = torch.searchsorted(layout.cu_seqlens[1:], key, right=True)
    return (layout.document_first_block_row[document] + (key - layout.cu_seqlens[document]) // layout.block_size).long()
