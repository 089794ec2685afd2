"""The results of a run's tasks: records of metrics.jsonl from training, and those of the newest `ssa_pretrain.evaluate`, which lm_eval's tasks come from.

A task has several metrics; its main one is the first of MAIN that it has.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAIN = (
    "acc_norm",
    "acc",
    "accuracy",
    "exact_match",
    "f1",
    "word_perplexity",
    "perplexity",
    "bits_per_byte",
    "cross_entropy",
)
MODES = ("full", "sparse")


@dataclass(slots=True)
class TaskScores:
    """The results of a task by mode.

    Attributes:
        name: of the task.
        records: step, tokens and metrics of each evaluation, in order of the step.
    """

    name: str
    records: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def main(self) -> str:
        """The main metric's key; empty if the task has none that is known."""
        newest = self.newest()
        return next((key for key in MAIN if any(_number(record, key) is not None for record in newest.values())), "")

    def newest(self) -> dict[str, dict[str, Any]]:
        """Returns the newest record of each mode."""
        return {mode: records[-1] for mode, records in self.records.items() if records}

    def points(self, mode: str) -> list[tuple[float, float]]:
        """Returns (tokens, value) of the main metric."""
        key = self.main
        found = [(record.get("tokens"), _number(record, key)) for record in self.records.get(mode, ())]
        return [(x, y) for x, y in found if x is not None and y is not None]

    def row(self) -> list[str]:
        """Returns the task's line of a table: name, main metric, value with standard error by mode, step."""
        newest, key = self.newest(), self.main
        steps = sorted({record["step"] for record in newest.values()})
        return [
            self.name,
            key,
            *(_value(newest.get(mode, {}), key) for mode in MODES),
            "/".join(f"{s:,}" for s in steps),
        ]


def read_tasks(records: Sequence[dict[str, Any]], folder: Path, evaluation: dict[str, Any] | None) -> list[TaskScores]:
    """Returns the tasks of a run, in the order of their first results.

    Args:
        records: all records of metrics.jsonl.
        folder: the run's.
        evaluation: content of evaluation.json, which names the file with the tasks' results.

    Raises:
        ValueError: that file cannot be read.
    """
    tasks: dict[str, TaskScores] = {}
    found = [record for record in records if record["kind"] == "task"]
    for record in [*found, *_evaluated(folder, evaluation)]:
        task = tasks.setdefault(record["task"], TaskScores(record["task"]))
        task.records.setdefault(record["mode"], []).append(record)
    for task in tasks.values():
        for series in task.records.values():
            series.sort(key=lambda record: record["step"])  # stable: `evaluate` comes after training
    return list(tasks.values())


def _evaluated(folder: Path, evaluation: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Returns records of the tasks that `ssa_pretrain.evaluate` ran, lm_eval's included."""
    path = folder / str((evaluation or {}).get("details", ""))
    if not (path.is_file() and path.suffix == ".json"):
        return []
    result = json.loads(path.read_text(encoding="utf-8"))
    clock = {"step": result["step"], "tokens": result.get("tokens")}
    own = {name: {m: one["metrics"] for m, one in modes.items()} for name, modes in result.get("tasks", {}).items()}
    return [
        {**metrics, **clock, "task": name, "mode": mode}
        for name, modes in (own | result.get("lm_eval", {})).items()
        for mode, metrics in modes.items()
    ]


def _number(record: dict[str, Any], key: str) -> float | None:
    value = record.get(key)
    return float(value) if isinstance(value, int | float) else None


def _value(record: dict[str, Any], key: str) -> str:
    """Returns a metric with its standard error, if it has one."""
    value, error = _number(record, key), _number(record, f"{key}_stderr")
    if value is None:
        return "–"
    text = f"{value:.3f}" if value < 100 else f"{value:,.1f}"
    return text if error is None else f"{text} ± {error:.3f}"
