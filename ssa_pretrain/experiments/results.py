"""The results of one training run, read from its folder: metrics.jsonl, config.yaml and evaluations/*.json. Nothing is cached or written.

A folder of a run that is training, was killed or has not begun is read as far as it goes.
"""

import json
import statistics
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ssa_pretrain.monitor.metrics_file import FILE_NAME, read_records

EVALUATIONS = "evaluations"


@dataclass(frozen=True)
class RunResult:
    """A run's files.

    Attributes:
        setting: the setting's name.
        seed: its seed.
        folder: output_dir.
        steps: optimizer steps of the whole run.
    """

    setting: str
    seed: int
    folder: Path
    steps: int = 0
    _records: list[dict[str, Any]] | None = field(default=None, repr=False)

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl; none if the run has not begun."""
        if self._records is not None:
            return self._records
        path = self.folder / FILE_NAME
        return list(read_records(path)) if path.is_file() else []

    @cached_property
    def train(self) -> list[dict[str, Any]]:
        """The records of training steps, in order."""
        return [record for record in self.records if record["kind"] == "train"]

    @cached_property
    def held_out(self) -> dict[tuple[int, str], dict[str, Any]]:
        """The records of held-out evaluations by step and mode."""
        return {(r["step"], r["mode"]): r for r in self.records if r["kind"] == "evaluation"}

    @cached_property
    def evaluations(self) -> dict[str, dict[str, Any]]:
        """The results of `evaluate` by name."""
        found = {}
        for path in sorted((self.folder / EVALUATIONS).glob("*.json")):
            try:
                found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:  # not a result
                continue
        return found

    @property
    def step(self) -> int:
        """Optimizer steps done, by metrics.jsonl."""
        return self.train[-1]["step"] if self.train else 0

    @property
    def evaluated_steps(self) -> set[int]:
        """The steps with held-out metrics in both modes."""
        return {step for step, mode in self.held_out if mode == "full" and (step, "sparse") in self.held_out}

    @property
    def last_step(self) -> int:
        """The newest step with held-out metrics in both modes; 0 without any."""
        return max(self.evaluated_steps, default=0)

    @property
    def is_finished(self) -> bool:
        """Whether the run's last step is trained and evaluated."""
        return self.steps > 0 and self.last_step >= self.steps

    @property
    def seconds_per_step(self) -> float | None:
        """Median time of the newest steps; None before the third."""
        times = [r["seconds"] for r in self.train[2:] if r.get("seconds")]
        return statistics.median(times[-50:]) if times else None

    def metric(self, key: str, mode: str, step: int) -> Any:
        """Returns a held-out metric of the run itself; None if it is unknown."""
        return self.held_out.get((step, mode), {}).get(key)

    def curve(self, key: str, mode: str) -> list[tuple[float, float]]:
        """Returns (tokens, value) of a held-out metric over training."""
        records = sorted((r for (_, m), r in self.held_out.items() if m == mode), key=lambda r: r["step"])
        return [(r["tokens"], r[key]) for r in records if r.get(key) is not None]

    def evaluated(self, name: str, mode: str, *keys: str) -> Any:
        """Returns a value of an evaluation of the run's last checkpoint: of `modes`, or of another part if the first key names it; None if it is unknown.

        Args:
            name: of the evaluation.
            mode: the mode.
            keys: ["cross_entropy"], or ["bound", "gap_by_layer"], or ["tasks", "needle", "metrics", "accuracy"].
        """
        result = self.evaluations.get(name)
        if result is None or result.get("step") != self.steps:
            return None
        if len(keys) == 1:
            return result["modes"].get(mode, {}).get(keys[0])
        part, *path = keys
        tree = result.get(part, {})
        tree = tree.get(path.pop(0), {}).get(mode, {}) if part == "tasks" else tree.get(mode, {})
        for key in path:
            tree = tree.get(key) if isinstance(tree, dict) else None
        return tree
