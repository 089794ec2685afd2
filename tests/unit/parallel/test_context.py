"""How context parallelism splits a microbatch, without processes. tests/distributed/test_context.py tests the rest."""

import numpy as np
import pytest
import torch

from ssa_kernels import build_layout
from ssa_pretrain.data.batches import Batch, collate
from ssa_pretrain.data.rows import Row
from ssa_pretrain.parallel.context import ContextParallel, chunk_spans


class Group:
    """A process group with a given size and rank."""

    def __init__(self, size: int, rank: int) -> None:
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


def microbatch(rows: int = 2, length: int = 48) -> Batch:
    generator = np.random.default_rng(0)
    return collate(
        [
            Row(generator.integers(0, 90, length + 1), generator.random(length + 1) < 0.2)  # documents of a few tokens
            for _ in range(rows)
        ],
        index=3,
    )


@pytest.mark.parametrize("cp", [1, 2, 3, 4, 8])
def test_every_token_is_on_one_rank_and_chunks_are_mirrored(cp: int) -> None:
    spans = [chunk_spans(96, cp, rank) for rank in range(cp)]
    held = sorted(token for of_rank in spans for first, length in of_rank for token in range(first, first + length))
    assert held == list(range(96))
    for rank, of_rank in enumerate(spans):
        assert sum(length for _, length in of_rank) == 96 // cp
        assert len(of_rank) == (1 if rank == cp - 1 else 2), "chunks that touch are one stretch"
        assert of_rank == sorted(of_rank)
        # The mean of a rank's places is the middle: one document's work is the same on every rank.
        assert sum(sum(range(first, first + length)) for first, length in of_rank) / (96 // cp) == 95 / 2


def test_indivisible_token_count_is_refused() -> None:
    with pytest.raises(
        ValueError, match="num_tokens=100 of a microbatch must be a multiple of 2 \\* cp = 8; pad the rows"
    ):
        chunk_spans(100, 4, 0)


@pytest.mark.parametrize("cp", [2, 3, 4])
def test_rank_slice_equals_the_batch_at_its_positions(cp: int) -> None:
    batch = microbatch()
    layout = build_layout(batch.cu_seqlens, num_tokens=96, block_size=16)
    labels = 0.0
    for rank in range(cp):
        context = ContextParallel(Group(cp, rank))
        part, queries = context.split(batch), context.queries(layout)
        places = torch.cat([torch.arange(first, first + length) for first, length in chunk_spans(96, cp, rank)])
        for name in ("tokens", "labels", "loss_mask", "positions"):
            assert torch.equal(getattr(part, name), getattr(batch, name)[..., places]), name
        assert torch.equal(part.cu_seqlens, batch.cu_seqlens) and part.index == 3 and part.num_rows == batch.num_rows
        assert context.num_tokens(part) == 96
        assert torch.equal(queries.query_start + queries.query_position, places.to(torch.int32))
        assert torch.equal(queries.query_position, part.positions.to(torch.int32))
        labels += float(part.loss_mask.sum())
    assert labels == float(batch.loss_mask.sum()) < 96


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_ranks_hold_each_query_of_some_spans_once(cp: int) -> None:
    """The spans cross the ranks' borders. What a rank holds names the same tokens through its own part."""
    spans = [(0, 5), (20, 9), (30, 31), (90, 6)]
    held = []
    for rank in range(cp):
        context = ContextParallel(Group(cp, rank))
        own = [t for first, length in chunk_spans(96, cp, rank) for t in range(first, first + length)]
        for first, length in context.own_spans(spans, 96):
            held += own[first : first + length]
    assert sorted(held) == [t for first, length in spans for t in range(first, first + length)]


def test_group_of_one_changes_nothing() -> None:
    context, batch = ContextParallel(Group(1, 0)), microbatch()
    layout = build_layout(batch.cu_seqlens, num_tokens=96, block_size=16)
    k, v = torch.ones(96, 1, 2), torch.zeros(96, 1, 2)
    assert context.split(batch) is batch and context.queries(layout) is layout
    assert context.gather(k, v)[0] is k and context.gather(k, v)[1] is v
    assert torch.equal(context.values_at(k[:, 0], torch.tensor([5, 0]), 96), k[:2, 0])
