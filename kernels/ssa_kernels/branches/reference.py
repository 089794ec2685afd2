"""The branches in plain PyTorch: the definition of the operators, and the implementation for training on a CPU.

    window:      o[t, h] = sum_j softmax_j(scale q[t, h] . k[j, g]) v[j, g] over the document's keys j with t - window < j <= t
    compressed:  o[t, h] = sum_c softmax_c(scale q[t, h] . mean k[c, g]) mean v[c, g] over the document's blocks c that are complete at t

with g = h // group_size. Block c of K keys is complete at the position of its last key. Means are summed in float32 (float64 for float64 inputs) and
rounded to the keys' dtype. A query before the end of its document's first block sees no block and gets o = 0, lse = -inf. Both are masked attention
(masked_attention.py), which works on (query, key) pairs of a chunk of queries. Gradients come from torch.

Source: NSA, arXiv 2502.11089, with the mean in place of its learned compression, as the released NSA-1B of arXiv 2511.20102 has it.
"""

from dataclasses import replace

import torch

from ..documents import DocumentLayout
from ..masked_attention import masked_attention
from ..select.reference import mean_of_blocks


def window_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layout: DocumentLayout, window: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (o, lse); arguments as in `window_attention`, with the layout built."""

    def in_window(queries: slice, keys: slice) -> torch.Tensor:
        own = (layout.query_start[queries] + layout.query_position[queries])[:, None]
        return (torch.arange(keys.start, keys.stop, device=q.device) > own - window)[None]

    return masked_attention(q, k, v, layout, scale, in_window)


def compressed_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layout: DocumentLayout, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (o, lse); arguments as in `compressed_attention`, with the layout built."""
    complete = (layout.query_position + 1) // layout.block_size
    # The means as keys: a query's document begins at its first block row, and its last complete block stands for its own key.
    over_means = replace(layout, query_start=layout.query_first_block_row, query_position=complete - 1)
    o, lse = masked_attention(q, mean_of_blocks(k, layout), mean_of_blocks(v, layout), over_means, scale)
    return o, lse.masked_fill((complete == 0)[:, None], float("-inf"))
