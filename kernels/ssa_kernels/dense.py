"""Attention under a mask of (kv head, query, key), by chunks of queries: what both reference streams are made of.

A chunk of queries meets only the keys between the start of its first query's document and its last query, so causality and
document borders save work, and memory stays at (chunk x keys). On the CPU a chunk is one call of torch's fused attention, which
also returns the log-sum-exp; elsewhere (GPU comparisons, float64) it is written out. Gradients come from torch.

Measured against gathering each query's chosen keys (one core, H 8, 2 kv heads, D 32, K 16, N 8, forward + backward, ms): tokens
512: 15 against 58; 1024: 43 against 127; 2048: 149 against 242. At N 4 the gather draws level at 2048. So there is one way here.

Not done here: nothing of Triton, no dropout, no gradient through the log-sum-exp.
"""

from collections.abc import Callable

import torch

from .documents import DocumentLayout

QUERIES_PER_CHUNK = 128  # 64 to 256 measured within 5% of each other

MaskOf = Callable[[slice, slice], torch.Tensor]


def masked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: DocumentLayout,
    scale: float,
    mask_of: MaskOf | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns causal attention within documents, further restricted by `mask_of`, and its log-sum-exp.

    Args:
        q: `[T, H, D]`.
        k, v: `[keys, G, D]`.
        layout: documents, and where each query stands in them.
        scale: factor of the logits.
        mask_of: (queries, keys) -> bool `[G or H, queries, keys]`, True where a query may look; None for everywhere.

    Returns:
        o `[T, H, D]` in q's dtype and lse `[T, H]`, float32 (float64 for float64 inputs), natural logarithm, no gradient.
    """
    heads = q.shape[1]
    repeat = heads // k.shape[1]
    k_HTD = k.transpose(0, 1).repeat_interleave(repeat, 0)
    v_HTD = v.transpose(0, 1).repeat_interleave(repeat, 0)
    outs, lses = [], []
    for first in range(0, q.shape[0], QUERIES_PER_CHUNK):
        queries = slice(first, min(first + QUERIES_PER_CHUNK, q.shape[0]))
        start = layout.query_start[queries]
        own = start + layout.query_position[queries]
        keys = slice(int(start.min()), int(own.max()) + 1)
        number = torch.arange(keys.start, keys.stop, device=q.device)
        mask = ((number >= start[:, None]) & (number <= own[:, None]))[None]
        if mask_of is not None:
            mask = mask & mask_of(queries, keys)
        if mask.shape[0] not in (1, heads):
            mask = mask.repeat_interleave(heads // mask.shape[0], 0)
        o, lse = _attend(q[queries].transpose(0, 1), k_HTD[:, keys], v_HTD[:, keys], mask, scale)
        outs.append(o.transpose(0, 1))
        lses.append(lse.transpose(0, 1))
    return torch.cat(outs), torch.cat(lses)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float):
    """One chunk: q [H, T, D], k and v [H, S, D], mask [1 or H, T, S] -> o [H, T, D], lse [H, T]."""
    if q.is_cpu:
        bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[None], k[None], v[None], 0.0, False, attn_mask=bias[None].expand(1, q.shape[0], -1, -1), scale=scale
        )
        return o[0], lse[0].detach()
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = (q.to(wide) @ k.to(wide).transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))
    return (logits.softmax(-1) @ v.to(wide)).to(q.dtype), logits.detach().logsumexp(-1)
