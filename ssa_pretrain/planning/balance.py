"""How evenly the drawn streams load the data ranks, computed from the draws themselves.

Microbatches differ in cost by their main stream and by how many queries are drawn for the other one. Data ranks wait for
each other at the end of a step, so the slowest rank sets its time. schedule.py draws so that all data ranks compute the
same kind of microbatch in the same slot (the n-th microbatch of each rank) wherever the batch allows. The stages of a
pipeline pass the same microbatches on, so a stage waits for another kind only where the kind changes, from one slot to the
next.

A microbatch costs its floating-point operations, with one document per row. Rows of many documents differ by their
lengths as well, with or without a draw. Standard library only.
"""

from dataclasses import dataclass

from ssa_pretrain.config import AttentionConfig
from ssa_pretrain.planning.flops import RowFlops
from ssa_pretrain.schedule import WINDOW, Place, counterpart_pairs, main_stream, num_pairs


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
        slowest: operations of the data rank that has most, over those of the mean rank.
        same_stream: share of slots in which all data ranks have the same main stream.
        changes: changes of the main stream from one microbatch of a data rank to its next, per step.
    """

    slowest: float
    same_stream: float
    changes: float


def balance(attention: AttentionConfig, batch: Batch, row: RowFlops, *, seed: int, steps: int = WINDOW) -> Balance:
    """Returns the balance of the data ranks over the first steps of a run.

    Args:
        attention: the method and its draws.
        batch: the global batch.
        row: operations of one row.
        seed: the run's seed.
        steps: how many steps; the main stream's share is exact over a multiple of schedule.WINDOW.
    """
    slowest = same = changes = 0.0
    for step in range(steps):
        mains = _main_streams(attention, batch, seed, step)
        costs = _costs(attention, batch, row, mains, seed, step)
        ranks = [sum(costs[rank :: batch.dp]) for rank in range(batch.dp)]
        slots = [mains[first : first + batch.dp] for first in range(0, len(mains), batch.dp)]
        slowest += max(ranks) * batch.dp / sum(ranks)
        same += sum(len({*slot}) == 1 for slot in slots) / len(slots)
        changes += sum(a != b for a, b in zip(mains, mains[batch.dp :], strict=False)) / batch.dp
    return Balance(slowest=slowest / steps, same_stream=same / steps, changes=changes / steps)


def _main_streams(attention: AttentionConfig, batch: Batch, seed: int, step: int) -> list[str]:
    """Returns the main stream of each microbatch of a step."""
    count = batch.dp * batch.num_microbatches
    common = {"seed": seed, "step": step, "num_microbatches": count}
    return [main_stream(attention, Place(**common, microbatch=number)) for number in range(count)]


def _costs(
    attention: AttentionConfig, batch: Batch, row: RowFlops, mains: list[str], seed: int, step: int
) -> list[float]:
    """Returns the operations of each microbatch of a step."""
    base = {main: row.computed(main, 0.0) for main in ("full", "sparse")}
    if len(attention.method.streams) == 1:
        return [batch.rows * base[main] for main in mains]
    pairs = num_pairs(batch.row_length)
    each = {main: (row.computed(main, 1.0) - base[main]) / pairs for main in base}
    common = {"seed": seed, "step": step, "num_microbatches": len(mains)}
    costs = []
    for number, main in enumerate(mains):
        place = Place(**common, microbatch=number)
        drawn = sum(counterpart_pairs(attention, place, rows=batch.rows, row_length=batch.row_length))
        costs.append(batch.rows * base[main] + drawn * each[main])
    return costs
