"""Context parallelism: a microbatch's tokens are distributed over ranks; keys and values are gathered, queries stay.

The T tokens of a microbatch are cut into 2 * cp chunks of equal length, and rank i holds chunks i and 2 * cp - 1 - i (zigzag). A query's work
grows with its position in its row, and a rank's two chunks mirror each other: if each row is one document, every rank computes the same number of
(query, key) pairs. A document may be cut anywhere. Everything except attention works token by token, so a rank runs the model on its T / cp tokens
without changes.

In attention, each layer gathers the keys (after RoPE, by position in the document) and values over the context ranks; with few kv heads this is
cheap. It restores the order of the chunks, and the rank's queries attend to all keys: the full stream up to the query within its document, selection
over the means of all blocks, the sparse stream over the chosen blocks. This is the single process's mathematics on some of its queries
(ssa_kernels.query_spans). Every rank has a part of the gradients of all keys and values. A reduce-scatter sums them and returns to each rank those of
its own tokens.

The sum is taken in fp32 (in fp64 for fp64) whatever the keys' dtype, and rounded once: a sum in bf16 would lose more precision with more ranks.
Bytes per layer and rank: 2 * T * G * D * 2 gathered in bf16 each time the layer runs forward, and twice that reduced in its backward, with the G kv
heads and T tokens of one rank's microbatch.

Loss: the cross entropy is a sum over labels that are counted over all ranks. Each rank computes the alignment of its own queries among those that
are drawn. megatron-core averages gradients over data *and* context ranks and multiplies the loss by cp; engine/step.py has the scales.

Not done here: overlapping the gather with computation; distributing each document separately, which would balance rows of many documents.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from ssa_kernels import DocumentLayout, query_spans
from ssa_pretrain.data.batches import Batch
from ssa_pretrain.data.spans import Span, intersection

CHUNKS_PER_RANK = 2


def chunk_spans(num_tokens: int, cp: int, cp_rank: int) -> list[Span]:
    """Returns (first token, number of tokens) of each span that a context rank holds, ascending; adjacent chunks are merged.

    Args:
        num_tokens: T of the microbatch, a multiple of 2 * cp.
        cp: context-parallel degree.
        cp_rank: below cp.

    Raises:
        ValueError: T cannot be cut into 2 * cp chunks of equal length.
    """
    if num_tokens % (CHUNKS_PER_RANK * cp):
        raise ValueError(
            f"num_tokens={num_tokens} of a microbatch must be a multiple of 2 * cp = {CHUNKS_PER_RANK * cp}; pad the rows"
        )
    chunk = num_tokens // (CHUNKS_PER_RANK * cp)
    first, second = cp_rank * chunk, (CHUNKS_PER_RANK * cp - 1 - cp_rank) * chunk
    if first + chunk == second:
        return [(first, 2 * chunk)]
    return [(first, chunk), (second, chunk)]


class ContextParallel:
    """One rank's view of its context-parallel group; in a group of one, every method is the identity."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = group.size()
        self.rank = group.rank()

    def split(self, batch: Batch) -> Batch:
        """Returns this rank's tokens, labels, loss mask and positions of a whole microbatch; the rest stays that of all tokens."""
        if self.size == 1:
            return batch
        spans = chunk_spans(len(batch.positions), self.size, self.rank)

        def own(tensor: Tensor) -> Tensor:
            return torch.cat([tensor[..., first : first + length] for first, length in spans], dim=-1)

        parts = {name: own(getattr(batch, name)) for name in ("tokens", "labels", "loss_mask", "positions")}
        return replace(batch, **parts)

    def num_tokens(self, batch: Batch) -> int:
        """Returns the number of tokens of the whole microbatch of which `batch` is this rank's part."""
        return len(batch.positions) * self.size

    def queries(self, layout: DocumentLayout) -> DocumentLayout:
        """Returns the layout of this rank's queries over all keys."""
        return layout if self.size == 1 else query_spans(layout, chunk_spans(layout.num_tokens, self.size, self.rank))

    def own_spans(self, spans: Sequence[Span], num_tokens: int) -> list[Span]:
        """Returns the part of some spans that this rank holds, (first, length) among its own tokens; adjacent spans are not merged.

        Args:
            spans: (first, length) among all tokens, ascending.
            num_tokens: T of the whole microbatch.
        """
        found, offset = [], 0
        for own_first, own_length in chunk_spans(num_tokens, self.size, self.rank):
            held = intersection(spans, [(own_first, own_length)])
            found += [(first - own_first + offset, length) for first, length in held]
            offset += own_length
        return found

    def gather(self, k_TGD: Tensor, v_TGD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the keys and values of all tokens, in order, from this rank's; differentiable."""
        if self.size == 1:
            return k_TGD, v_TGD
        return _GatherKeys.apply(k_TGD, v_TGD, self.group)

    def values_at(self, values: Tensor, indices: Tensor, num_tokens: int) -> Tensor:
        """Returns the values at tokens of the whole microbatch, on every context rank.

        Args:
            values: [this rank's tokens, V].
            indices: int64, among all tokens.
            num_tokens: T of the whole microbatch.
        """
        if self.size == 1:
            return values[indices]
        found = values.new_zeros(len(indices), values.shape[1])
        offset = 0
        for first, length in chunk_spans(num_tokens, self.size, self.rank):
            here = ((indices >= first) & (indices < first + length))[:, None]
            local = (indices - first + offset).clamp(offset, offset + length - 1)
            found = torch.where(here, values[local], found)
            offset += length
        dist.all_reduce(found, group=self.group)  # each index is on one rank; the others add zeros
        return found


class _GatherKeys(torch.autograd.Function):
    """(k, v of this rank's two chunks, group) -> (k, v of all tokens); one message each way carries both."""

    @staticmethod
    def forward(ctx, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        ctx.group, ctx.dtype = group, k.dtype
        size, local = group.size(), torch.stack((k, v))
        gathered = local.new_empty(size * 2, *k.shape)
        dist.all_gather_into_tensor(gathered, local, group=group)
        # By rank, key or value, and chunk. The first chunks ascend with the rank, the second ones descend.
        chunks = gathered.view(size, 2, CHUNKS_PER_RANK, -1, *k.shape[1:])
        whole = (torch.cat((chunks[:, i, 0], chunks[:, i, 1].flip(0))) for i in range(2))
        k_all, v_all = (x.view(size * k.shape[0], *k.shape[1:]) for x in whole)
        return k_all, v_all

    @staticmethod
    def backward(ctx, grad_k: Tensor, grad_v: Tensor):
        size = ctx.group.size()
        wide = torch.promote_types(ctx.dtype, torch.float32)
        tokens, *heads = grad_k.shape
        parts = grad_k.new_empty(size, 2, CHUNKS_PER_RANK, tokens // (CHUNKS_PER_RANK * size), *heads, dtype=wide)
        for i, grad in enumerate((grad_k, grad_v)):
            first, second = grad.reshape(CHUNKS_PER_RANK, size, -1, *heads)
            parts[:, i, 0], parts[:, i, 1] = first, second.flip(0)
        own = parts.new_empty(2, tokens // size, *heads)
        dist.reduce_scatter_tensor(own, parts.view(size * 2, tokens // size, *heads), group=ctx.group)
        return own[0].to(ctx.dtype), own[1].to(ctx.dtype), None
