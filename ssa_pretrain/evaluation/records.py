"""A result as the records that trackers take: those of metrics.jsonl, one per mode and one per task and mode."""

from collections.abc import Iterator
from typing import Any

from ssa_pretrain.evaluation.held_out import mean

SKIPPED = ("cross_entropy_by_position", "labels_by_position", "alignment_by_layer")


def records(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the records of a result, as results.py writes it, in the order of the table."""
    clock = {"step": result["step"], "tokens": result["tokens"]}
    for mode, metrics in result["modes"].items():
        kept = {key: value for key, value in metrics.items() if key not in SKIPPED}
        masses = {"captured_mass": mean(metrics["captured_mass_by_layer"]), "rows": result["rows"]}
        yield {"kind": "evaluation", **clock, "split": result["split"], "mode": mode, **kept, **masses}
    for task, by_mode in result["tasks"].items():
        for mode, found in by_mode.items():
            yield {"kind": "task", **clock, "task": task, "mode": mode, **found["metrics"]}
    for task, by_mode in result["lm_eval"].items():
        for mode, metrics in by_mode.items():
            yield {"kind": "task", **clock, "task": task, "mode": mode, **metrics}
