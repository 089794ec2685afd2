"""Ranges of steps whose data is left out: `training.skip_steps`, and the windows of rollbacks.

A step in a range is not trained on. Its rows are not read, and weights, moments and Adam's step counts stay as they are. Everything else continues: the
step has its number, its rows and its learning rate, and the next step has the rows that it would have had anyway. So step stays the only clock. The
same definition as OLMo-core's (olmo_core/train/trainer.py, `steps_to_skip`). PaLM (arXiv 2204.02311, section 5.1) left out batches too, but moved the
later ones forward, so that its step counter did not advance.

Steps are counted from 1, as in metrics.jsonl, and both ends of a range belong to it. Standard library only.
"""

from collections.abc import Iterable, Sequence

Range = tuple[int, int]  # first and last step


def merged(ranges: Iterable[Sequence[int]]) -> list[Range]:
    """Returns ranges in order, with those that touch or overlap joined: the same steps have the same form."""
    found: list[Range] = []
    for first, last in sorted((first, last) for first, last in ranges):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(last, found[-1][1]))
        else:
            found.append((first, last))
    return found


def up_to(ranges: Iterable[Sequence[int]], step: int) -> list[Range]:
    """Returns the merged part of ranges up to and including a step."""
    return merged((first, min(last, step)) for first, last in ranges if first <= step)


def contains(ranges: Iterable[Sequence[int]], step: int) -> bool:
    """Returns whether a step lies in one of the ranges."""
    return any(first <= step <= last for first, last in ranges)


def are_valid(ranges: Sequence[Sequence[int]]) -> bool:
    """Returns whether every range is a pair [first, last] with 1 <= first <= last."""
    return all(len(pair) == 2 and 1 <= pair[0] <= pair[1] for pair in ranges)
