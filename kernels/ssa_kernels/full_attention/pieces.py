"""Full attention of spans of queries in equal rows, by torch's cuDNN kernels for dense matrices.

A piece is what a span holds of one row: queries [a, b) of the row. Its keys are a rectangle, those before a, which every query sees, and a
triangle, [a, b), under the causal mask. cuDNN computes both at its full speed, where its kernels for packed documents and causal masks
aligned at the bottom right take 1.3 to 1.6 times as long. The two outputs are merged by their log-sum-exps
(merge_triton.py). A piece without keys before it, such as whole rows, has only the triangle.

The triangles of neighbouring pieces of one length are one call over a copy of their keys: a sample of queries has several short pieces per
layer, and each call costs the host time.

The backward needs no merging. With the merged lse, P = exp(scale q k - lse) and dS = P (dP - rowsum(dO O)) are those of the whole softmax in
each part, so dQ is the sum of the parts' and each key's gradient comes from the one part that it is in. (Ring attention, arXiv 2310.01889,
does the same around a ring of devices.)

What it adds in rounding: the two outputs are rounded to bf16 before they are merged, and the two dQ before they are added. Gradients of keys
are summed over pieces in float32.

Shapes follow from the spans alone, and cuDNN builds a graph for each; spans whose lengths change from batch to batch belong to te.py.
"""

from dataclasses import dataclass
from itertools import groupby

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


@dataclass(frozen=True, slots=True)
class Batch:
    """Neighbouring pieces of one length."""

    pieces: tuple[Piece, ...]

    @property
    def queries(self) -> slice:
        """The queries of all pieces."""
        return slice(self.pieces[0].query, self.pieces[-1].queries.stop)

    def of_queries(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the queries' part of x [all queries, ...] as [rows, length, ...]."""
        return x[self.queries].unflatten(0, (-1, self.pieces[0].length))

    def of_keys(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the part of x [all keys, ...] for the same tokens as [rows, length, ...]; a copy of several pieces'."""
        parts = [x[piece.own_keys] for piece in self.pieces]
        own = torch.cat(parts) if len(parts) > 1 else parts[0]
        return own.unflatten(0, (-1, self.pieces[0].length))

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns each piece's part of x [rows, ...]."""
        return x.split([piece.rows for piece in self.pieces])


def batches_of(pieces: tuple[Piece, ...]) -> list[Batch]:
    """Returns the pieces in runs of equal length."""
    return [Batch(tuple(run)) for _, run in groupby(pieces, key=lambda piece: piece.length)]


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
    for batch in batches_of(pieces):
        q_own, k_own, v_own = batch.of_queries(q), batch.of_keys(k), batch.of_keys(v)
        o, lse_BHT, *states = dense_forward(q_own, k_own, v_own, causal=True, scale=scale)
        for piece, o_own, lse_own in zip(batch.pieces, batch.split(o), batch.split(lse_BHT), strict=True):
            queries, earlier = piece.queries, piece.earlier_keys
            if not piece.before:
                out[queries].copy_(o_own.reshape(out[queries].shape))
                lse[queries].view(piece.rows, piece.length, -1).copy_(lse_own.transpose(1, 2))
                continue
            o_before, lse_before, *_ = dense_forward(
                q[queries][None], k[earlier][None], v[earlier][None], causal=False, scale=scale
            )
            merge(o_own[0], o_before[0], lse_own[0], lse_before[0], out[queries], lse[queries])
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
    batches = batches_of(pieces)
    lses = [batch.of_queries(lse[0]).transpose(1, 2).contiguous() for batch in batches]
    for batch, lse_BHT in zip(batches, lses, strict=True):
        grad_own, q_own, o_own = map(batch.of_queries, (grad_o, q, o))
        k_own, v_own = map(batch.of_keys, (k, v))
        dq_own, *of_keys = dense_backward(
            grad_own, q_own, o_own, k_own, v_own, lse_BHT, states, causal=True, scale=scale
        )
        dq[batch.queries].copy_(dq_own.reshape(dq[batch.queries].shape))
        # No two pieces have the same keys of their own, and nothing has been added to the sums yet: one launch stores all.
        sums = [x[piece.own_keys] for x in (dk, dv) for piece in batch.pieces]
        found = [part.flatten(0, 1) for x in of_keys for part in batch.split(x)]
        torch._foreach_copy_(sums, found)  # pyright: ignore[reportPrivateImportUsage]
    for batch, lse_BHT in zip(batches, lses, strict=True):
        for piece, lse_piece in zip(batch.pieces, batch.split(lse_BHT), strict=True):
            if not piece.before:
                continue
            queries, earlier = piece.queries, piece.earlier_keys
            grad_part, q_part, o_part = (x[queries][None] for x in (grad_o, q, o))
            k_part, v_part = k[earlier][None], v[earlier][None]
            dq_part, dk_part, dv_part = dense_backward(
                grad_part, q_part, o_part, k_part, v_part, lse_piece, states, causal=False, scale=scale
            )
            for sums, found in ((dq[queries], dq_part), (dk[earlier], dk_part), (dv[earlier], dv_part)):
                sums.add_(found[0])  # dk[earlier] += ... would also copy the sums onto themselves
    return dq, dk, dv


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
