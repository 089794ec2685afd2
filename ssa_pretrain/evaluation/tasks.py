"""The tasks of `evaluation.tasks`: built once from their files, then evaluated in each mode, in a run that trains or on a checkpoint.

A task's metrics are plain numbers, named `task/<name>/<mode>/<metric>` in W&B. Its details are what only a result file has room for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ssa_pretrain.config import ChoiceTask, NeedleTask, PerplexityTask, TaskConfig
from ssa_pretrain.data.manifest import load_manifest
from ssa_pretrain.data.rows import HeldOutRows
from ssa_pretrain.errors import DataError
from ssa_pretrain.evaluation import MODES
from ssa_pretrain.evaluation.held_out import evaluate_rows, mean, missing_evaluations
from ssa_pretrain.evaluation.multiple_choice import Question, read_questions, score_questions
from ssa_pretrain.evaluation.needle import Needle, build_needles, score_needles
from ssa_pretrain.evaluation.scoring import tokenizer_of
from ssa_pretrain.evaluation.text_size import TextSize, perplexities, text_size
from ssa_pretrain.monitor.metrics_file import task_series
from ssa_pretrain.run import Run
from ssa_pretrain.schedule import is_due


@dataclass(frozen=True, slots=True)
class TaskResult:
    """A task's metrics in one mode, by name, and further values for the result file."""

    metrics: dict[str, float | int | None]
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Task:
    """A task that is ready to be evaluated.

    Attributes:
        name: the user's.
        content: what its file or its settings gave: questions, needles, or held-out rows with the size of their text.
    """

    name: str
    content: list[Question] | list[Needle] | tuple[HeldOutRows, TextSize]
    kind: str

    def evaluate(self, run: Run, mode: str) -> TaskResult:
        """Returns the task's result in a mode; every rank calls it."""
        content: Any = self.content
        if self.kind == "multiple_choice":
            return TaskResult(dict(score_questions(run, content, mode)))
        if self.kind == "needle":
            metrics, cells = score_needles(run, content, mode)
            return TaskResult(dict(metrics), {"cells": cells})
        rows, size = content
        result = evaluate_rows(run, rows, mode)
        own = {"cross_entropy": result.cross_entropy, "captured_mass": mean(result.captured_mass_by_layer)}
        return TaskResult(own | perplexities(result, size) | {"rows": rows.num_rows}, asdict(result))


def build_tasks(run: Run) -> list[Task]:
    """Returns the configured tasks, in order.

    Raises:
        DataError: a task's file is not usable.
    """
    return [Task(name, _content(run, task), task.kind) for name, task in run.config.evaluation.tasks.items()]


def evaluate_due_tasks(run: Run, tasks: Sequence[Task], evaluated: set[tuple[int, str]], step: int) -> Iterator[dict]:
    """Yields the records of the tasks that are due at a step of training and not in the run's metrics; every rank calls it.

    Args:
        run: the run.
        tasks: of the run.
        evaluated: step and series of each record in the run's metrics; known on rank 0.
        step: optimizer steps done. Tasks are due at step 0 as the held-out rows are.
    """
    if not tasks or not (step == 0 or is_due(step, run.config.evaluation.task_interval or 1, run.plan.steps)):
        return
    wanted = {task_series(task.name, mode): (task, mode) for task in tasks for mode in MODES}
    for name in missing_evaluations(run, evaluated, step, wanted):
        task, mode = wanted[name]
        head = {"step": step, "tokens": run.plan.tokens_before(step), "task": task.name, "mode": mode}
        yield head | task.evaluate(run, mode).metrics


def _content(run: Run, task: TaskConfig) -> Any:
    """Returns what a task is evaluated on."""
    if isinstance(task, ChoiceTask):
        return read_questions(Path(task.path), task.limit)
    if isinstance(task, NeedleTask):
        return build_needles(run, task)
    assert isinstance(task, PerplexityTask)
    try:
        manifest = load_manifest(task.path)
        rows = HeldOutRows(manifest, sequence_length=run.config.data.sequence_length, rows=task.rows)
    except ValueError as error:
        raise DataError(str(error)) from error
    return rows, text_size(rows, tokenizer_of(run), isolate_documents=run.config.data.isolate_documents)
