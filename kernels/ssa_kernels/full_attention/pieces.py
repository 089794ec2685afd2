"""Full attention of spans of queries in equal rows, by torch's cuDNN kernels for dense matrices: two calls per piece of a row.

A piece is what a span holds of one row: queries [a, b) of the row. Its keys are a rectangle, those before a, which every query sees, and a
triangle, [a, b), under the causal mask. cuDNN computes both at its full speed, where its kernels for packed documents and causal masks
aligned at the bottom right take 1.3 to 1.6 times as long. The two outputs are merged by their log-sum-exps
(merge_triton.py).

The backward needs no merging. With the merged lse, P = exp(scale q k - lse) and dS = P (dP - rowsum(dO O)) are those of the whole softmax in
each part, so dQ is the sum of the parts' and each key's gradient comes from the one part that it is in. (Ring attention, arXiv 2310.01889,
does the same around a ring of devices.) A piece without keys before it, such as whole rows, is one call.

What it adds in rounding: the two outputs are rounded to bf16 before they are merged, and the two dQ before they are added. Gradients of keys
are summed over pieces in float32.

Shapes follow from the spans alone, and cuDNN builds a graph for each; spans whose lengths change from batch to batch belong to te.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..documents import QuerySpan

# Shorter ones are not worth cuDNN's fixed costs, and its support for very short rows has varied.
SHORTEST = 128


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring queries of one row, or neighbouring whole rows.

    Attributes:
        query: the first query, among those of all spans.
        rows: 1, or the number of whole rows.
        length: queries per row.
        key: the row's first key.
        before: keys of the row before the first query.
    """

    query: int
    rows: int
    length: int
    key: int
    before: int

    @property
    def queries(self) -> slice:
        """The piece's queries."""
        return slice(self.query, self.query + self.rows * self.length)

    @property
    def own_keys(self) -> slice:
        """The keys of the same tokens."""
        return slice(self.key + self.before, self.key + self.before + self.rows * self.length)

    @property
    def earlier_keys(self) -> slice:
        """The row's keys before them."""
        return slice(self.key, self.key + self.before)


def pieces_of(spans: tuple[QuerySpan, ...], num_tokens: int, num_rows: int) -> tuple[Piece, ...]:
    """Returns the pieces of spans of `num_rows` equal rows with `num_tokens` tokens in all, or none if one is too short for cuDNN."""
    row_length, found, query = num_tokens // num_rows, [], 0
    for span in spans:
        first = span.first
        while first < span.end:
            row, before = divmod(first, row_length)
            length = min(span.end, (row + 1) * row_length) - first
            piece = Piece(query, 1, length, row * row_length, before)
            last = found[-1] if found else None
            if last and length == row_length == last.length and last.own_keys.stop == first:
                found[-1] = Piece(last.query, last.rows + 1, row_length, last.key, 0)
            else:
                found.append(piece)
            first, query = first + length, query + length
    sizes = [size for piece in found for size in (piece.length, piece.before or SHORTEST)]
    return tuple(found) if min(sizes) >= SHORTEST else ()


def pieces_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pieces: tuple[Piece, ...], *, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (o [queries, H, D], lse float32 [1, queries, H], state_0, state_1).

    Args:
        q: [queries, H, D], the pieces' queries one after another.
        k, v: [keys, G, D].
        pieces: of the layout's spans.
        scale: factor of the logits.
    """
    from .merge_triton import merge  # imported here because Triton may be missing on a CPU machine

    out, lse, states = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32), []
    for piece in pieces:
        own, (q_own, k_own, v_own) = piece.queries, _own(piece, q, k, v)
        o, lse_BHT, *states = dense_forward(q_own, k_own, v_own, causal=True, scale=scale)
        if not piece.before:
            out[own].copy_(o.reshape(out[own].shape))
            lse[own].view(piece.rows, piece.length, -1).copy_(lse_BHT.transpose(1, 2))
            continue
        o_before, lse_before, *_ = dense_forward(
            q_own, k[piece.earlier_keys][None], v[piece.earlier_keys][None], causal=False, scale=scale
        )
        merge(o[0], o_before[0], lse_BHT[0], lse_before[0], out[own], lse[own])
    # Without dropout the generator states are never read, so the last call's stand for all.
    return out, lse[None], states[0], states[1]


def pieces_backward(
    grad_o: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    states: tuple[torch.Tensor, torch.Tensor],
    pieces: tuple[Piece, ...],
    *,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (dq, dk, dv) in the shapes of q, k and v, dk and dv in float32; the other arguments are the forward's arguments and results."""
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
    for piece, part in _parts(pieces):
        queries, causal = piece.queries, part == piece.own_keys
        lse_BHT = lse[0, queries].view(piece.rows, piece.length, -1).transpose(1, 2).contiguous()
        grad_part, q_part, o_part = (_by_row(x[queries], piece.rows) for x in (grad_o, q, o))
        k_part, v_part = (_by_row(x[part], piece.rows) for x in (k, v))
        dq_part, dk_part, dv_part = dense_backward(
            grad_part, q_part, o_part, k_part, v_part, lse_BHT, states, causal=causal, scale=scale
        )
        own = dq[queries]
        own.copy_(dq_part.reshape(own.shape)) if causal else own.add_(dq_part.reshape(own.shape))
        for sums, found in ((dk[part], dk_part), (dv[part], dv_part)):
            sums.add_(found.reshape(sums.shape))  # dk[part] += ... would also copy the sums onto themselves
    return dq, dk, dv


def _parts(pieces: tuple[Piece, ...]) -> Iterator[tuple[Piece, slice]]:
    """Returns each piece with the keys of its triangle, and then with those of its rectangle if it has one."""
    for piece in pieces:
        yield piece, piece.own_keys
        if piece.before:
            yield piece, piece.earlier_keys


def _own(piece: Piece, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns the piece's queries, and the keys and values of the same tokens, as [rows, length, heads, D]."""
    return tuple(_by_row(x, piece.rows) for x in (q[piece.queries], k[piece.own_keys], v[piece.own_keys]))


def _by_row(x: torch.Tensor, rows: int) -> torch.Tensor:
    return x.view(rows, -1, *x.shape[1:])


def dense_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (o [B, T, H, D], lse float32 [B, H, T], state_0, state_1) of q [B, T, H, D] over k and v [B, S, G, D]."""
    o, lse, _, _, _, _, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), None, True, 0.0, causal, False, scale=scale
    )
    return o.transpose(1, 2), lse.squeeze(-1), seed, offset


def dense_backward(
    grad_o: torch.Tensor,
    q: torch.Tensor,
    o: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse_BHT: torch.Tensor,
    states: tuple[torch.Tensor, torch.Tensor],
    *,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (dq, dk, dv) in the shapes of q, k and v; o and lse may be those of a softmax over more keys."""
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *(x.transpose(1, 2) for x in (grad_o, q, k, v, o)), lse_BHT.unsqueeze(-1),
        *states, None, None, None, q.shape[1], k.shape[1], 0.0, causal, scale=scale,
    )  # fmt: skip
    dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
    return dq, dk, dv
