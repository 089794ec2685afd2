"""A run's data by source: the values of a step's record, and the table of what each source gave to the run.

Tokens and epochs are those read since the start of the run, without padding; they count the steps whose data was left out
or skipped, as `tokens` does. The loss of one step has few labels of a small source, so the table's is a mean over the
labels of the newest RECENT steps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ssa_pretrain.settings.quantities import compact

RECENT = 50  # steps
HEAD = ("source", "tokens", "share", "epochs", "loss")


def step_values(
    names: Sequence[str], by_part: Sequence[tuple[float, int]], read: Mapping[str, tuple[int, float]]
) -> dict[str, Any]:
    """Returns the values by source of a step's record.

    Args:
        names: of the sources by number.
        by_part: sum of cross entropies and number of labels of each source in this step.
        read: tokens and epochs of each source up to this step.
    """
    counted = [(name, loss, labels) for name, (loss, labels) in zip(names, by_part, strict=False) if labels]
    return {
        "cross_entropy_by_source": {name: loss / labels for name, loss, labels in counted},
        "labels_by_source": {name: labels for name, _, labels in counted},
        "tokens_by_source": {name: tokens for name, (tokens, _) in read.items()},
        "epochs_by_source": {name: epochs for name, (_, epochs) in read.items()},
    }


def source_rows(steps: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns the table of a run's sources, one row each in the columns of HEAD; empty without such records.

    Args:
        steps: training records in order.
    """
    newest = next((record for record in reversed(steps) if record.get("tokens_by_source")), None)
    if newest is None:
        return []
    losses = recent_losses(steps)
    tokens, epochs = newest["tokens_by_source"], newest.get("epochs_by_source", {})
    total = max(1, sum(tokens.values()))
    return [
        [
            name,
            compact(tokens[name]),
            f"{tokens[name] / total:.1%}",
            f"{epochs[name]:.3g}" if name in epochs else "",
            f"{losses[name]:.3f}" if name in losses else "",
        ]
        for name in sorted(tokens, key=lambda name: -tokens[name])
    ]


def recent_losses(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the mean cross entropy of each source over its labels in the newest RECENT steps, nats."""
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for record in list(steps)[-RECENT:]:
        for name, loss in (record.get("cross_entropy_by_source") or {}).items():
            if loss is not None:
                labels = record["labels_by_source"][name]
                sums[name], counts[name] = sums.get(name, 0.0) + loss * labels, counts.get(name, 0) + labels
    return {name: sums[name] / counts[name] for name in sums}


def source_lines(steps: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table as lines for the console; empty without several sources."""
    rows = source_rows(steps)
    if len(rows) < 2:
        return ""
    table = [list(HEAD), *rows]
    wide = [max(len(row[column]) for row in table) for column in range(len(HEAD))]
    aligned = [
        [row[0].ljust(wide[0]), *(cell.rjust(w) for cell, w in zip(row[1:], wide[1:], strict=True))] for row in table
    ]
    return "\n".join("  ".join(row).rstrip() for row in aligned)
