"""Texts as documents of microbatches, and microbatches over data ranks.

A microbatch has the shape of a training microbatch (micro_batch_size * sequence_length tokens), whatever the texts: one shape needs one set of
buffers and fits the user buffers of a run that trains. Texts are placed first-fit, the longest first, each as a document of its own, so they do not
see each other. The rest is filled with documents of token 0 whose results nobody reads.

Every data rank computes equally many microbatches, because a forward under ZeRO-3 needs all of them: one that has none left repeats the first.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from ssa_pretrain.data.batches import Batch
from ssa_pretrain.run import Run

Result = TypeVar("Result")


def pack_texts(texts: Sequence[list[int]], multiple: int, length: int, labels: Sequence[list[int]] = ()) -> Batch:
    """Returns texts as the documents of one microbatch, whose number of tokens is a multiple of `multiple`.

    Args:
        texts: token ids, at least one per text.
        multiple: tokens.
        length: longest document of the filling.
        labels: of each text, as long as the text; empty: no label counts.
    """
    rest = -sum(len(text) for text in texts) % multiple
    texts = [*texts, *([0] * min(length, rest - begin) for begin in range(0, rest, length))]
    tokens = torch.tensor([t for text in texts for t in text])
    positions = torch.cat([torch.arange(len(text)) for text in texts])
    ends = torch.tensor([0] + [len(text) for text in texts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    following = torch.zeros_like(tokens)
    if labels:
        given = torch.tensor([t for label in labels for t in label])
        following[: len(given)] = given
    mask = torch.zeros(1, len(tokens))
    return Batch(0, tokens.unsqueeze(0), following.unsqueeze(0), mask, positions, ends)


def newest_tokens(texts: Sequence[list[int]], multiple: int) -> Batch:
    """Returns each text's last token as a document of its own, at its position, filled up with token 0 to a multiple of `multiple` documents."""
    rest = [0] * (-len(texts) % multiple)
    tokens = torch.tensor([text[-1] for text in texts] + rest)
    positions = torch.tensor([len(text) - 1 for text in texts] + rest)
    empty = torch.zeros_like(tokens).unsqueeze(0)
    ends = torch.arange(len(tokens) + 1, dtype=torch.int32)
    return Batch(0, tokens.unsqueeze(0), empty, empty.float(), positions, ends)


def microbatch_tokens(run: Run) -> int:
    """Returns the tokens of a training microbatch."""
    return run.config.training.micro_batch_size * run.config.data.sequence_length


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Returns the indices of the texts of each microbatch: the longest text first, each into the first microbatch with room for it.

    Args:
        lengths: tokens of each text, at most `capacity`.
        capacity: tokens of a microbatch.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((i for i, left in enumerate(room) if left >= lengths[index]), None)
        if place is None:
            bins.append([])
            room.append(capacity)
            place = len(bins) - 1
        bins[place].append(index)
        room[place] -= lengths[index]
    return bins


def over_data_ranks(
    run: Run, groups: Sequence[list[int]], compute: Callable[[list[int]], list[Result]]
) -> list[Result]:
    """Returns the result of every item, computed group by group on one data rank each.

    Args:
        run: its data ranks share the groups.
        groups: indices of items; together all indices from 0, each once.
        compute: returns the results of a group's items.
    """
    dp, rank = run.plan.dp, run.placement.dp_rank
    found: dict[int, Result] = {}
    for begin in range(0, len(groups), dp):
        group = groups[begin + rank] if begin + rank < len(groups) else None
        results = compute(groups[0] if group is None else group)
        found |= dict(zip(group or (), results, strict=False))
    if dp > 1:
        parts: list[dict[int, Result]] = [{}] * dp
        dist.all_gather_object(parts, found, group=run.placement.groups.dp)
        found = {index: result for part in parts for index, result in part.items()}
    return [found[index] for index in range(len(found))]


def on_all_data_ranks(run: Run, value: bool) -> bool:
    """Returns whether a value is true on every data rank; all of them call it."""
    if run.plan.dp == 1:
        return value
    agreed = torch.tensor(int(value), device=run.placement.device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=run.placement.groups.dp)
    return bool(agreed)
