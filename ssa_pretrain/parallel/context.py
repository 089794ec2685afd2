"""Context parallelism: a microbatch's tokens are dealt out over ranks, keys and values are gathered, queries stay where they are.

The T tokens of a microbatch are cut into 2 * cp chunks of equal length, and rank i holds chunks i and 2 * cp - 1 - i (zigzag). A query's work
grows with its place in its row, and the two chunks lie mirrored: where each row is one document, ranks have the same work to the pair.
A document may be cut anywhere. Everything but attention works token by token, so a rank runs the model on its T / cp tokens as
on any others.

In attention the keys (after RoPE, by position in the document) and values of the kv heads are few, so each layer gathers them over the
context ranks, puts the chunks back in order, and has the rank's queries attend to all of them: the full stream up to the query within its
document, selection over the block means of all keys, the sparse stream over the blocks chosen. That is the single process's
mathematics on some of its queries (ssa_kernels.query_spans). The gradients of keys and values, which every rank has a part of, are summed by
a reduce-scatter that hands each rank those of its own tokens.

That sum is taken in fp32 (in fp64 for fp64), whatever the keys' dtype, and rounded once: in bf16 it would lose more the more ranks
there are, and 2 kv heads are cheap to send. Bytes a layer and rank, of keys and values with kv heads and T of one rank's microbatch:
2 * T * kv heads * D * 2 gathered in bf16, as often as the layer runs forward, and twice that reduced in its backward.

What the loss needs: cross entropy is a sum over labels that are counted over all ranks, alignment and captured mass are means over tokens, of
which every context rank has as many. megatron-core averages gradients over data *and* context ranks and multiplies the loss by cp, so the
engine's scales hold unchanged (engine/megatron.py).

Not done here: overlapping the gather with anything; dealing out each document by itself, which would even out rows of many documents.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from ssa_kernels import DocumentLayout, query_spans
from ssa_pretrain.data.batches import Batch

CHUNKS_A_RANK = 2


def chunk_spans(num_tokens: int, cp: int, cp_rank: int) -> list[tuple[int, int]]:
    """Return (first token, number of tokens) of each stretch that a context rank holds, ascending; neighbouring chunks are one stretch.

    Args:
        num_tokens: T of the microbatch, a multiple of 2 * cp.
        cp: context-parallel degree.
        cp_rank: below cp.

    Raises:
        ValueError: T cannot be cut into 2 * cp chunks of equal length.
    """
    if num_tokens % (CHUNKS_A_RANK * cp):
        raise ValueError(
            f"num_tokens={num_tokens} of a microbatch must be a multiple of 2 * cp = {CHUNKS_A_RANK * cp}; pad the rows"
        )
    chunk = num_tokens // (CHUNKS_A_RANK * cp)
    first, second = cp_rank * chunk, (CHUNKS_A_RANK * cp - 1 - cp_rank) * chunk
    if first + chunk == second:
        return [(first, 2 * chunk)]
    return [(first, chunk), (second, chunk)]


class ContextParallel:
    """One rank's part in its context-parallel group; of a group of one, everything."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = group.size()
        self.rank = group.rank()

    def split(self, batch: Batch) -> Batch:
        """Return this rank's tokens, labels, loss mask and positions of a whole microbatch; `cu_seqlens` stays that of all tokens."""
        if self.size == 1:
            return batch
        spans = chunk_spans(len(batch.positions), self.size, self.rank)

        def mine(tensor: Tensor) -> Tensor:
            return torch.cat([tensor[..., first : first + length] for first, length in spans], dim=-1)

        parts = {name: mine(getattr(batch, name)) for name in ("tokens", "labels", "loss_mask", "positions")}
        return replace(batch, **parts, num_rows=None)  # queries are no longer rows

    def num_tokens(self, batch: Batch) -> int:
        """Return the tokens of the whole microbatch of which `batch` is this rank's part."""
        return len(batch.positions) * self.size

    def queries(self, layout: DocumentLayout) -> DocumentLayout:
        """Return the layout of this rank's queries over all keys."""
        return layout if self.size == 1 else query_spans(layout, chunk_spans(layout.num_tokens, self.size, self.rank))

    def gather(self, k_TGD: Tensor, v_TGD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of all tokens, in order, from those of this rank's, differentiable."""
        if self.size == 1:
            return k_TGD, v_TGD
        return _GatherKeys.apply(k_TGD, v_TGD, self.group)

    def rows_at(self, values: Tensor, places: Tensor, num_tokens: int) -> Tensor:
        """Return the rows of `values` [this rank's tokens, V] at places of the whole microbatch, on every context rank.

        Args:
            values: one row a token of this rank's.
            places: int64, among all tokens.
            num_tokens: T of the whole microbatch.
        """
        if self.size == 1:
            return values[places]
        found = values.new_zeros(len(places), values.shape[1])
        offset = 0
        for first, length in chunk_spans(num_tokens, self.size, self.rank):
            here = ((places >= first) & (places < first + length))[:, None]
            local = (places - first + offset).clamp(offset, offset + length - 1)
            found = torch.where(here, values[local], found)
            offset += length
        dist.all_reduce(found, group=self.group)  # every place lies on one rank, the others add zeros
        return found


class _GatherKeys(torch.autograd.Function):
    """(k, v of this rank's two chunks, group) -> (k, v of all tokens); both travel in one message each way."""

    @staticmethod
    def forward(ctx, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        ctx.group, ctx.dtype = group, k.dtype
        size, local = group.size(), torch.stack((k, v))
        gathered = local.new_empty(size * 2, *k.shape)
        dist.all_gather_into_tensor(gathered, local, group=group)
        # By rank, key or value, and chunk: the first chunks ascend with the rank, the second ones descend.
        chunks = gathered.view(size, 2, CHUNKS_A_RANK, -1, *k.shape[1:])
        whole = (torch.cat((chunks[:, i, 0], chunks[:, i, 1].flip(0))) for i in range(2))
        k_all, v_all = (x.view(size * k.shape[0], *k.shape[1:]) for x in whole)
        return k_all, v_all

    @staticmethod
    def backward(ctx, grad_k: Tensor, grad_v: Tensor):
        size = ctx.group.size()
        wide = torch.promote_types(ctx.dtype, torch.float32)
        tokens, *heads = grad_k.shape
        parts = grad_k.new_empty(size, 2, CHUNKS_A_RANK, tokens // (CHUNKS_A_RANK * size), *heads, dtype=wide)
        for i, grad in enumerate((grad_k, grad_v)):
            first, second = grad.reshape(CHUNKS_A_RANK, size, -1, *heads)
            parts[:, i, 0], parts[:, i, 1] = first, second.flip(0)
        mine = parts.new_empty(2, tokens // size, *heads)
        dist.reduce_scatter_tensor(mine, parts.view(size * 2, tokens // size, *heads), group=ctx.group)
        return mine[0].to(ctx.dtype), mine[1].to(ctx.dtype), None
