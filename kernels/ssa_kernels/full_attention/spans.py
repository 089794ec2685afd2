"""Full attention of some spans of queries over all keys, by the library's kernel for packed documents: one call per span.

A span's queries are neighbours (documents.py, `QuerySpan`), so within each document they come last among the keys that they see. Packed
attention with different boundaries for queries and keys, and a causal mask aligned at the bottom right, is then exactly the full stream: no
query meets a key twice or needlessly. Keys past the span's last query are cut off; documents before it are keys without queries.

The kernel is torch's FlashAttention-2 (or 3 or 4, if the process has activated one; fused.py), whose causal mask is aligned that way.
Gradients of keys and values are summed over the spans in float32. Where Transformer Engine is installed, te.py does the same in one call.
"""

import torch

from ..documents import QuerySpan


def spans_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spans: tuple[QuerySpan, ...],
    *,
    max_length: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (o [queries, H, D], lse float32 [1, queries, H], state_0, state_1).

    Args:
        q: [queries, H, D], the spans' queries one after another.
        k, v: [keys, G, D].
        spans: the layout's.
        max_length: no document is longer.
        scale: factor of the logits.
    """
    outs, lses, states = [], [], []
    for span, q_span in zip(spans, _pieces(q, spans), strict=True):
        o, lse_HT, *state = flash_forward(q_span, k[: span.end], v[: span.end], span, max_length, scale)
        outs.append(o)
        lses.append(lse_HT)
        states.append(state)
    # Without dropout the generator states are never read, so the first call's stand for all.
    return torch.cat(outs), torch.cat(lses, 1).transpose(0, 1)[None], *states[0]


def spans_backward(
    grad_o: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    states: tuple[torch.Tensor, torch.Tensor],
    spans: tuple[QuerySpan, ...],
    *,
    max_length: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (dq, dk, dv) in the shapes of q, k and v, dk and dv in float32; the other arguments are the forward's arguments and results."""
    dk, dv = (torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (k, v))
    dqs = []
    pieces = zip(spans, *(_pieces(x, spans) for x in (grad_o, q, o, lse[0])), strict=True)
    for span, grad_span, q_span, o_span, lse_TH in pieces:
        dq, dk_span, dv_span = flash_backward(
            grad_span,
            q_span,
            k[: span.end],
            v[: span.end],
            o_span,
            lse_TH.transpose(0, 1).contiguous(),
            states,
            span,
            max_length,
            scale,
        )
        dqs.append(dq)
        dk[: span.end].add_(dk_span)  # += would also copy the sums onto themselves
        dv[: span.end].add_(dv_span)
    return torch.cat(dqs), dk, dv


def _pieces(x: torch.Tensor, spans: tuple[QuerySpan, ...]) -> tuple[torch.Tensor, ...]:
    return x.split([span.length for span in spans])


def flash_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, span: QuerySpan, max_length: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (o, lse [H, queries], state_0, state_1) of one span's queries over the keys before its end."""
    o, lse, state, unused, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, span.cu_seqlens_q, span.cu_seqlens_k, *_longest(span, max_length), 0.0, True, False, scale=scale
    )
    return o, lse, state, unused


def flash_backward(
    grad_o: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    states: tuple[torch.Tensor, torch.Tensor],
    span: QuerySpan,
    max_length: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (dq, dk, dv) of one span; dk and dv cover the keys before its end."""
    return torch.ops.aten._flash_attention_backward(
        grad_o, q, k, v, o, lse, span.cu_seqlens_q, span.cu_seqlens_k, *_longest(span, max_length), 0.0, True, *states,
        scale=scale,
    )  # fmt: skip


def _longest(span: QuerySpan, max_length: int) -> tuple[int, int]:
    """Returns the maximum number of queries and of keys per document."""
    return min(span.length, max_length), min(span.end, max_length)
