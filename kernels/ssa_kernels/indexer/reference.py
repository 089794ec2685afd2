"""The trained scorer in plain PyTorch, by chunks of queries: the definition of its operators, and the implementation for training on a CPU.

Keys are laid out by block rows (documents.py), so that a sum over a block is a sum over a dim. A chunk of queries meets only the block rows of its
documents up to its last query: memory is (chunk x keys). Everything is in float32 (float64 for float64 inputs) and in logarithms, so a block on
which the scorer puts nothing has a finite loss. Gradients of the loss come from torch, chunk by chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..documents import DocumentLayout
from ..select.reference import _top

QUERIES_PER_CHUNK = 128
NOTHING = -1e30  # the logit of a key that a query does not see; finite, so that no gradient is NaN


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some neighbouring queries and the block rows that they can reach."""

    queries: slice
    block_rows: slice
    first: torch.Tensor  # int [T]: the first block row of the query's document, counted from block_rows.start
    own: torch.Tensor  # int [T]: number of the query's own block in its document
    seen: torch.Tensor  # bool [T, R, K]: whether the query sees the key at this place of the block row

    @property
    def candidates(self) -> torch.Tensor:
        """bool [T, R]: the blocks of the query's document up to its own."""
        row = torch.arange(self.seen.shape[1], device=self.own.device)
        return (row >= self.first[:, None]) & (row <= (self.first + self.own)[:, None])


def chunks(layout: DocumentLayout, size: int = QUERIES_PER_CHUNK) -> Iterator[Chunk]:
    """Yields the queries of a layout in chunks of neighbours."""
    place = torch.arange(layout.block_size, device=layout.block_start.device)
    for begin in range(0, layout.num_queries, size):
        queries = slice(begin, min(begin + size, layout.num_queries))
        first, own_key = layout.query_first_block_row[queries], layout.query_keys[queries]
        own = layout.query_position[queries] // layout.block_size
        rows = slice(int(first.min()), int((first + own).max()) + 1)
        key = layout.block_start[rows, None] + place
        inside = place < layout.block_length[rows, None]
        start = layout.query_start[queries]
        seen = inside & (key >= start[:, None, None]) & (key <= own_key[:, None, None])
        yield Chunk(queries, rows, first - rows.start, own, seen)


def by_block_row(k: torch.Tensor, layout: DocumentLayout, rows: slice) -> torch.Tensor:
    """Returns keys [R, K, G, D] of some block rows; places past a block's end hold any keys."""
    place = torch.arange(layout.block_size, device=k.device)
    return k[(layout.block_start[rows, None] + place).clamp(max=layout.num_tokens - 1)]


def log_mass(q: torch.Tensor, k: torch.Tensor, chunk: Chunk, scale: float) -> torch.Tensor:
    """Returns the logarithm of the block mass [T, G, R] of a chunk's queries q [T, H, D] over keys k [R, K, G, D]; differentiable."""
    wide = torch.promote_types(q.dtype, torch.float32)
    tokens, heads, dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.to(wide).view(tokens, kv_heads, heads // kv_heads, dim)
    logits = torch.einsum("tghd,rkgd->tghrk", grouped, k.to(wide)) * scale
    logits = logits.masked_fill(~chunk.seen[:, None, None], NOTHING)
    of_block = logits.logsumexp(-1)
    share = of_block - of_block.logsumexp(-1, keepdim=True)
    return share.logsumexp(2) - torch.tensor(heads // kv_heads, dtype=wide).log()


def block_mass_reference(q: torch.Tensor, k: torch.Tensor, *, layout: DocumentLayout, scale: float) -> torch.Tensor:
    """Returns the block mass [T, G, C]; arguments as in `block_mass`, with the layout built."""
    q, k = q.detach(), k.detach()
    columns = -(-layout.max_length // layout.block_size)
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(q.shape[0], k.shape[1], columns, dtype=wide, device=q.device)
    for chunk in chunks(layout):
        mass = log_mass(q[chunk.queries], by_block_row(k, layout, chunk.block_rows), chunk, scale).exp()
        column = torch.arange(columns, device=q.device)
        row = (chunk.first[:, None] + column).clamp(max=mass.shape[2] - 1)[:, None].expand(-1, k.shape[1], -1)
        out[chunk.queries] = torch.where((column <= chunk.own[:, None])[:, None], mass.gather(2, row.long()), 0.0)
    return out


def choose_reference(
    iq: torch.Tensor, ik: torch.Tensor, *, layout: DocumentLayout, top_k: int, scale: float
) -> torch.Tensor:
    """Returns indices; arguments as in `choose_by_index`, with the layout built."""
    iq, ik = iq.detach(), ik.detach()
    found = []
    for chunk in chunks(layout):
        score = log_mass(iq[chunk.queries], by_block_row(ik, layout, chunk.block_rows), chunk, scale)
        row = torch.arange(score.shape[2], device=iq.device)
        earlier = chunk.candidates & (row < (chunk.first + chunk.own)[:, None])
        found.append(_top(score.masked_fill(~earlier[:, None], float("-inf")), chunk.first, chunk.own, top_k))
    return torch.cat(found)


def loss_reference(
    iq: torch.Tensor,
    ik: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    layout: DocumentLayout,
    top_k: int,
    scales: tuple[float, float],
    with_gradients: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Returns the sums over queries and kv heads of loss and captured mass, and the loss's gradients of iq and ik if asked for."""
    wide = torch.promote_types(iq.dtype, torch.float32)
    loss, captured = (torch.zeros((), dtype=wide, device=iq.device) for _ in range(2))
    grad_q, grad_k = (torch.zeros_like(x, dtype=wide) if with_gradients else None for x in (iq, ik))
    for chunk in chunks(layout):
        target = log_mass(q[chunk.queries], by_block_row(k, layout, chunk.block_rows), chunk, scales[0])
        some = iq[chunk.queries].detach().to(wide).requires_grad_(with_gradients)
        keys = by_block_row(ik, layout, chunk.block_rows).detach().to(wide).requires_grad_(with_gradients)
        with torch.set_grad_enabled(with_gradients):
            predicted = log_mass(some, keys, chunk, scales[1])
            one, mass = terms(target, predicted, chunk.first + chunk.own, chunk.own, chunk.candidates, top_k)
        loss, captured = loss + one.detach(), captured + mass
        if grad_q is not None and grad_k is not None:
            grad_q[chunk.queries], grad_rows = torch.autograd.grad(one, (some, keys))
            place = torch.arange(layout.block_size, device=ik.device)
            length = layout.block_length[chunk.block_rows, None]
            key = (layout.block_start[chunk.block_rows, None] + place)[place < length]
            grad_k.index_add_(0, key, grad_rows[place < length])
    return loss, captured, grad_q, grad_k


def terms(
    target: torch.Tensor,
    predicted: torch.Tensor,
    own_column: torch.Tensor,
    own: torch.Tensor,
    candidates: torch.Tensor,
    top_k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the sums of loss and captured mass over some queries; the loss is differentiable in `predicted`.

    Args:
        target, predicted: logarithms of block masses [T, G, C].
        own_column: [T], the column of the query's own block.
        own: [T], that block's number in its document.
        candidates: bool [T, C], the columns of blocks up to the own one.
        top_k: blocks per query.
    """
    mass = torch.where(candidates[:, None], target.exp(), 0.0)
    divergence = torch.where(mass > 0, mass * (target - predicted), 0.0).sum(-1)
    free = (own >= top_k)[:, None]  # more than top_k blocks up to its own
    rank = predicted.detach().masked_fill(~candidates[:, None], float("-inf"))
    rank = rank.scatter(2, own_column[:, None, None].expand(-1, rank.shape[1], 1).long(), float("inf"))
    chosen = rank.topk(min(top_k, rank.shape[2]), dim=-1).indices
    captured = torch.where(free, mass.gather(2, chosen).sum(-1), 1.0)
    return torch.where(free, divergence, 0.0).sum(), captured.sum()
