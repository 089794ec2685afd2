"""The loss of a step by part of the corpus: sums of cross entropies and numbers of labels, kept on the device.

A row comes from one part, so a microbatch is a few spans of tokens, each of one part (`Batch.parts`), also
under context parallelism. Each span is one sum: no scatter, so the order of the additions is always the same, and nothing
waits for the device. The sums of all parts are reduced over the ranks in one message per step, beside that of the other
results, and are read with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ssa_pretrain.data.batches import Batch


@dataclass(slots=True)
class PartSums:
    """The sums of one pass over this rank's microbatches; only a last stage adds to them.

    Attributes:
        num_parts: parts of the corpus, the same on every rank; 0: nothing is counted.
        found: part's number, sum of the cross entropies and number of labels of each span.
    """

    num_parts: int = 0
    found: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)

    def add(self, losses: Tensor, batch: Batch) -> None:
        """Adds a localised microbatch.

        Args:
            losses: [1, T], cross entropies, 0 where the label does not count.
            batch: the microbatch.
        """
        if not self.num_parts:
            return
        sizes = [count for _, count in batch.parts]
        pieces = zip(batch.parts, losses.detach()[0].split(sizes), batch.loss_mask[0].split(sizes), strict=True)
        self.found += [(part, own.sum(), mask.sum()) for (part, _), own, mask in pieces]

    def reduce(self, device: torch.device, *, tp: int) -> Tensor:
        """Returns the sums of each part, then the labels of each, over all ranks: float64 [2 * num_parts]; every rank calls it.

        Args:
            device: this rank's.
            tp: tensor ranks, which have equal sums.
        """
        sums = torch.zeros(2, self.num_parts, dtype=torch.float64, device=device)
        for part in sorted({part for part, *_ in self.found}):
            losses, labels = zip(*(values for number, *values in self.found if number == part), strict=True)
            sums[0, part] = torch.stack(losses).double().sum()
            sums[1, part] = torch.stack(labels).double().sum()
        if self.num_parts:
            dist.all_reduce(sums)
        return sums.flatten() / tp

    def split(self, values: Sequence[float]) -> tuple[list[tuple[float, int]], Sequence[float]]:
        """Returns `StepResult.by_part` and the other values, from a list that begins with what `reduce` returned."""
        losses, labels = values[: self.num_parts], values[self.num_parts : 2 * self.num_parts]
        by_part = [(loss, round(count)) for loss, count in zip(losses, labels, strict=True)]
        return by_part, values[2 * self.num_parts :]
