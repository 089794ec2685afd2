"""Runs EleutherAI's lm_eval on a Hugging Face folder: its own `hf` model and its own `simple_evaluate`, in each mode and with each seed.

The result is one record: for each evaluation its settings, the versions of the tasks, every run's metrics, and mean and standard deviation over the
seeds. It is written after each evaluation, so that an interrupted command leaves what is done. Needs lm_eval (extra `evaluation`; written for 0.4.13).
"""

import json
import statistics
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from ssa_pretrain.huggingface.harness_errors import data_is_reachable, require_tasks
from ssa_pretrain.huggingface.harness_settings import NEEDED, Evaluation, LmEvalOptions
from ssa_pretrain.settings.convert import config_to_dict
from ssa_pretrain.settings.files import write_atomically

SCHEMA = 1
BOOTSTRAPS = 1000  # of standard errors that have no formula


def evaluate_folder(
    folder: Path, named: str, evaluations: dict[str, Evaluation], options: LmEvalOptions, out: Path
) -> dict[str, Any]:
    """Returns the record of all evaluations, and writes it to `out` after each.

    Args:
        folder: of a model that transformers loads with trust_remote_code.
        named: what the record calls it.
        evaluations: by name.
        options: of the command.
        out: file of the record.

    Raises:
        ConfigError: lm_eval does not know a task.
        DataError: the data of a task cannot be fetched.
    """
    packages = {name: version(name) for name in (*NEEDED, "torch")}
    record: dict[str, Any] = {"schema": SCHEMA, "model": named, "versions": packages, "evaluations": {}}
    record["settings"] = {key: value for key, value in config_to_dict(options).items() if key not in ("out", "tasks")}
    out.parent.mkdir(parents=True, exist_ok=True)
    managers: dict[str, TaskManager] = {}  # by metadata: finding lm_eval's tasks takes seconds
    for name, evaluation in evaluations.items():
        key = json.dumps(evaluation.metadata, sort_keys=True)
        if key not in managers:
            metadata = {"pretrained": str(folder), **evaluation.metadata}
            managers[key] = TaskManager(include_path=options.include_path or None, metadata=metadata)
        require_tasks(managers[key], evaluation.tasks, f"{name}: tasks")
        with data_is_reachable(evaluation.tasks):
            runs = list(_runs(folder, evaluation, options, managers[key]))
        versions = {task: number for _, _, found in runs for task, number in found["versions"].items()}
        results = [
            {"mode": mode, "seed": seed, "results": {task: _numbers(m) for task, m in found["results"].items()}}
            for mode, seed, found in runs
        ]
        settings = config_to_dict(evaluation) | {"batch_size": options.batch_size or evaluation.batch_size}
        record["evaluations"][name] = {
            "settings": settings | {"seeds": options.seeds or evaluation.seeds},
            "task_versions": versions,
            "runs": results,
            "summary": summarise(results),
        }
        write_atomically(out, json.dumps(record, indent=1) + "\n")
    return record


def _runs(
    folder: Path, evaluation: Evaluation, options: LmEvalOptions, manager: TaskManager
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yields (mode, seed, lm_eval's results)."""
    for mode in options.modes:
        arguments: dict[str, Any] = {"pretrained": str(folder), "trust_remote_code": True, "attention_mode": mode.value}
        if evaluation.max_length:
            arguments["max_length"] = evaluation.max_length
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")  # lm_eval's default is a GPU
        placed = {"batch_size": options.batch_size or evaluation.batch_size, "device": device}
        model = get_model("hf").create_from_arg_obj(arguments | options.model_args, placed)
        for seed in options.seeds or evaluation.seeds:
            found = simple_evaluate(
                model=model,
                tasks=evaluation.tasks,
                task_manager=manager,
                num_fewshot=evaluation.num_fewshot,
                limit=options.limit or None,
                bootstrap_iters=BOOTSTRAPS,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
            if found is not None:  # otherwise not a process that lm_eval lets report
                yield mode.value, seed, found


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Returns lm_eval's metrics that are numbers, named without the filter `none`: "acc,none" is acc."""
    kept = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    return {name.removesuffix(",none").replace(",", "_"): float(value) for name, value in kept.items()}


def summarise(runs: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Returns mean and standard deviation over the seeds, by task, mode and metric; the deviation of one run is 0."""
    values: dict[str, dict[str, dict[str, list[float]]]] = {}
    for run in runs:
        for task, metrics in run["results"].items():
            for metric, value in metrics.items():
                values.setdefault(task, {}).setdefault(run["mode"], {}).setdefault(metric, []).append(value)
    return {
        task: {
            mode: {
                metric: {"mean": statistics.fmean(found), "std": statistics.stdev(found) if len(found) > 1 else 0.0}
                for metric, found in metrics.items()
            }
            for mode, metrics in modes.items()
        }
        for task, modes in values.items()
    }


def table(record: dict[str, Any]) -> str:
    """Returns the metrics of each task in each mode, as mean ± standard deviation over the seeds."""
    modes = record["settings"]["modes"]
    rows = [["task", "metric", *modes]]
    for evaluation in record["evaluations"].values():
        wanted = evaluation["settings"]["metrics"]
        for task, by_mode in evaluation["summary"].items():
            metrics = by_mode[modes[0]]
            for metric in wanted or [name for name in metrics if not name.endswith("_stderr")]:
                if metric in metrics:
                    cells = [by_mode[mode][metric] for mode in modes]
                    rows.append([task, metric, *(f"{c['mean']:.4f} ± {c['std']:.4f}" for c in cells)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
