"""How evenly the drawn streams load the data ranks, computed from the draws themselves.

Microbatches differ in cost by their main stream and by how many queries are drawn for the other one. Data ranks wait for
each other at the end of a step, so the slowest rank sets its time. schedule.py draws so that all data ranks compute the
same kind of microbatch in the same slot (the n-th microbatch of each rank) wherever the batch allows. The stages of a
pipeline pass the same microbatches on, so a stage waits for another kind only where the kind changes, from one slot to the
next.

A microbatch costs its floating-point operations, with one document per row. Rows of many documents differ by their
lengths as well, with or without a draw. Standard library only.
"""

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Protocol

from ssa_pretrain.config import AttentionConfig
from ssa_pretrain.schedule import WINDOW, Place, counterpart_pairs, main_stream, num_pairs


class RowCost(Protocol):
    """The cost of a row: operations (`flops.RowFlops`), or seconds."""

    def computed(self, main: str, share: float) -> float:
        """Returns the cost with a main stream, "full" or "sparse", and a share of the queries drawn for the other one."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The global batch of a step.

    Attributes:
        dp: data ranks.
        num_microbatches: microbatches per data rank.
        rows: rows per microbatch.
        row_length: tokens per row.
    """

    dp: int
    num_microbatches: int
    rows: int
    row_length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """Means over the steps.

    Attributes:
        slowest: cost of the data rank that has most, over that of the mean rank.
        same_stream: share of slots in which all data ranks have the same main stream.
        changes: changes of the main stream from one microbatch of a data rank to its next, per step.
    """

    slowest: float
    same_stream: float
    changes: float


def balance(attention: AttentionConfig, batch: Batch, row: RowCost, *, seed: int, steps: int = WINDOW) -> Balance:
    """Returns the balance of the data ranks over the first steps of a run.

    Args:
        attention: the method and its draws.
        batch: the global batch.
        row: cost of one row.
        seed: the run's seed.
        steps: how many steps; the main stream's share is exact over a multiple of schedule.WINDOW.
    """
    slowest = same = changes = 0.0
    settings = tuple(getattr(attention, field.name) for field in fields(attention))
    for step in range(steps):
        mains, drawn = _draws(settings, batch, seed, step)
        costs = _costs(batch, row, mains, drawn)
        ranks = [sum(costs[rank :: batch.dp]) for rank in range(batch.dp)]
        slots = [mains[first : first + batch.dp] for first in range(0, len(mains), batch.dp)]
        slowest += max(ranks) * batch.dp / sum(ranks)
        same += sum(len({*slot}) == 1 for slot in slots) / len(slots)
        changes += sum(a != b for a, b in zip(mains, mains[batch.dp :], strict=False)) / batch.dp
    return Balance(slowest=slowest / steps, same_stream=same / steps, changes=changes / steps)


@lru_cache(maxsize=256)
def _draws(settings: tuple[Any, ...], batch: Batch, seed: int, step: int) -> tuple[list[str], list[int]]:
    """Returns the main stream of each microbatch of a step, and the pairs of chunks that its rows draw for the other stream.

    Args:
        settings: the values of an `AttentionConfig`, which can be a key of the cache.
        batch: the global batch.
        seed: the run's seed.
        step: the step.
    """
    names = (field.name for field in fields(AttentionConfig))
    attention = AttentionConfig(**dict(zip(names, settings, strict=True)))
    count = batch.dp * batch.num_microbatches
    common = {"seed": seed, "step": step, "num_microbatches": count}
    places = [Place(**common, microbatch=number) for number in range(count)]
    mains = [main_stream(attention, place) for place in places]
    if len(attention.method.streams) == 1:
        return mains, [0] * count
    length = batch.row_length
    if attention.counterpart_share == 1.0:
        return mains, [batch.rows * num_pairs(length)] * count
    return mains, [sum(counterpart_pairs(attention, place, rows=batch.rows, row_length=length)) for place in places]


def _costs(batch: Batch, row: RowCost, mains: list[str], drawn: list[int]) -> list[float]:
    """Returns the cost of each microbatch of a step."""
    base = {main: row.computed(main, 0.0) for main in {*mains}}
    pairs = num_pairs(batch.row_length)
    each = {main: (row.computed(main, 1.0) - cost) / pairs for main, cost in base.items()}
    return [batch.rows * base[main] + count * each[main] for main, count in zip(mains, drawn, strict=True)]
