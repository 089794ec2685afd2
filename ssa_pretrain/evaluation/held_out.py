"""Evaluation on held-out rows, with full and with sparse attention: the metrics, and the records of a run that trains."""

import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from ssa_pretrain.data.rows import HeldOutRows
from ssa_pretrain.engine import EvaluationResult
from ssa_pretrain.evaluation import MODES
from ssa_pretrain.planning.plan import Plan
from ssa_pretrain.run import Run, packing_of
from ssa_pretrain.schedule import is_due

Evaluated = set[
    tuple[int, str]
]  # step and mode, or series of a task, of each evaluation in a run's metrics; known on rank 0


def evaluate_mode(run: Run, mode: str) -> EvaluationResult:
    """Returns the held-out metrics of a mode."""
    return evaluate_rows(run, run.held_out, mode)


def evaluate_rows(
    run: Run, rows: HeldOutRows, mode: str, observe: Callable[..., None] | None = None
) -> EvaluationResult:
    """Returns the metrics of a mode on some rows. The microbatches are evaluated in slices, with a progress bar.

    Args:
        run: the model.
        rows: of the run's sequence length.
        mode: the main stream.
        observe: receives each layer's queries, keys and values (model/attention.py `PackedTokens.observe`).
    """
    plan, dp_rank, packing = run.plan, run.placement.dp_rank, packing_of(run.config)
    total = num_held_out_microbatches(run.config.training.micro_batch_size, plan, rows.num_rows)
    size = 2 * plan.dp * plan.pp
    results = []
    hidden = not (run.placement.is_rank_0 and sys.stderr.isatty())
    with tqdm(total=total, desc=f"held-out, {mode}", unit="microbatch", disable=hidden, leave=False) as bar:
        for begin in range(0, total, size):
            indices = range(begin, min(begin + size, total))
            batches = [packing.microbatch(rows, i, index=i) for i in indices if i % plan.dp == dp_rank]
            results.append(run.engine.evaluate(batches, mode=mode, observe=observe))
            bar.update(len(indices))
    return combine_results(results)


def num_held_out_microbatches(micro_batch_size: int, plan: Plan, num_rows: int) -> int:
    """Returns the number of microbatches for the held-out rows.

    It is the same on every data rank, and under an interleaved pipeline a multiple of pp. The last microbatches are filled up with padding
    rows, which no mean counts.
    """
    unit = plan.dp * (plan.pp if plan.vpp > 1 else 1)
    return -(-num_rows // (micro_batch_size * unit)) * unit


def combine_results(results: list[EvaluationResult]) -> EvaluationResult:
    """Returns the metrics over all slices. Cross entropy is averaged over labels (NaN without any), the layers' metrics over tokens."""
    num_labels, num_tokens = sum(r.num_labels for r in results), sum(r.num_tokens for r in results)

    def mean_by_layer(values: list[list[float]]) -> list[float]:
        weighted = ([r.num_tokens * x for x in by_layer] for r, by_layer in zip(results, values, strict=True))
        return [sum(layer) / num_tokens for layer in zip(*weighted, strict=True)]

    return EvaluationResult(
        cross_entropy=sum(r.cross_entropy * r.num_labels for r in results) / num_labels if num_labels else math.nan,
        alignment_by_layer=mean_by_layer([r.alignment_by_layer for r in results]),
        captured_mass_by_layer=mean_by_layer([r.captured_mass_by_layer for r in results]),
        num_labels=num_labels,
        num_tokens=num_tokens,
        cross_entropy_by_position=[sum(x) for x in zip(*(r.cross_entropy_by_position for r in results), strict=True)],
        labels_by_position=[sum(x) for x in zip(*(r.labels_by_position for r in results), strict=True)],
    )


def missing_evaluations(run: Run, evaluated: Evaluated, step: int, names: Iterable[str]) -> list[str]:
    """Returns, on every rank, which evaluations of a step are not in the run's metrics: `names` are modes and series of tasks."""
    missing = [[name for name in names if (step, name) not in evaluated]]
    dist.broadcast_object_list(missing, src=0)
    return missing[0]


def is_evaluation_missing(run: Run, evaluated: Evaluated, step: int) -> bool:
    """Returns, on every rank, whether an evaluation was due at the step that a run resumes from, but did not run because of a signal.

    The held-out rows come after the tasks, so their records are there only if those of the tasks are.
    """
    if not is_due(step, run.config.evaluation.interval, run.plan.steps):
        return False
    return bool(missing_evaluations(run, evaluated, step, MODES))


def evaluation_record(run: Run, result: EvaluationResult, step: int, mode: str) -> dict[str, Any]:
    """Returns the record of an evaluation for metrics.jsonl."""
    return {
        "step": step,
        "tokens": run.plan.tokens_before(step),
        "split": "heldout",
        "mode": mode,
        "cross_entropy": result.cross_entropy,
        "alignment_loss": mean(result.alignment_by_layer),
        "captured_mass": mean(result.captured_mass_by_layer),
        "captured_mass_by_layer": result.captured_mass_by_layer,
        "rows": run.held_out.num_rows,
    }


def mean(values: list[float]) -> float | None:
    """Returns the mean; None for an empty list."""
    return sum(values) / len(values) if values else None
