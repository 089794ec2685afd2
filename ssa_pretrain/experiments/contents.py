"""The numbers of a report, computed from what the runs' folders hold: the JSON file, of which report.py makes text and figure.py a picture.

Tables use each setting's newest step that all its seeds have evaluated, so they can be made at any time, and they name that step. Comparisons are paired by seed
at equal steps. Claims use finished runs only, paired by seed, and the rule of verdicts.py.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ssa_pretrain.experiments.jobs import BenchJob, EvaluationJob, Job, TrainJob
from ssa_pretrain.experiments.overhead import bench_content
from ssa_pretrain.experiments.recipe import Claim, Comparison, Panel, Recipe, Table
from ssa_pretrain.experiments.results import RunResult
from ssa_pretrain.experiments.verdicts import Mean, combined, judge, mean_of
from ssa_pretrain.monitor.environment import last_start

Runs = dict[str, list[RunResult]]  # by setting, in the order of the recipe


@dataclass(frozen=True)
class Evidence:
    """What a report is made of: the recipe, and its jobs."""

    recipe: Recipe
    runs: Sequence[TrainJob]
    evaluations: Sequence[EvaluationJob]
    benches: Sequence[BenchJob]

    def results(self) -> Runs:
        """Returns the results of every run by setting."""
        found: Runs = {}
        for run in self.runs:
            found.setdefault(run.setting, []).append(run.result)
        return found


def contents(evidence: Evidence, command: str) -> dict[str, Any]:
    """Returns everything that a report shows, as plain values.

    Args:
        evidence: the recipe and its jobs.
        command: that made it.
    """
    recipe, runs = evidence.recipe, evidence.results()
    benches = [bench_content(job.bench.name, job.folder) for job in evidence.benches if job.is_done]
    tested = [claim_content(claim, runs) for claim in recipe.claims]
    return {
        "recipe": recipe.name,
        "title": recipe.title,
        "about": recipe.about,
        "command": command,
        "machines": machines(runs),
        "jobs": [state_of(job) for job in (*evidence.runs, *evidence.evaluations, *evidence.benches)],
        "tables": [table_content(table, runs) for table in recipe.tables],
        "comparisons": [comparison_content(comparison, runs) for comparison in recipe.comparisons],
        "claims": [*(bench["claim"] for bench in benches if bench["claim"]), *tested],
        "benches": benches,
        "panels": [panel_content(panel, runs) for panel in recipe.panels],
    }


def state_of(job: Job) -> dict[str, Any]:
    """Returns where a job stands: done, failed, stopped at a step, or not begun."""
    found: dict[str, Any] = {"job": job.name, "state": "done" if job.is_done else "not begun", "reason": ""}
    if isinstance(job, TrainJob):
        found |= {"step": job.result.step, "steps": job.steps}
        if not job.is_done and found["step"]:
            found["state"] = f"at step {found['step']} of {job.steps}"
    if isinstance(job, EvaluationJob) and not job.is_done and len(job.missing) < len(job.evaluations):
        found["state"] = f"{len(job.evaluations) - len(job.missing)} of {len(job.evaluations)} evaluations"
    if failure := job.failure:
        found |= {"state": f"failed with exit code {failure['code']}", "reason": failure["text"]}
    return found


def machines(runs: Runs) -> list[str]:
    """Returns the devices and library versions that the runs used last."""
    found: dict[str, None] = {}
    for result in (one for ones in runs.values() for one in ones):
        if start := last_start(result.folder):
            named = ", ".join(f"{name} {number}" for name, number in start["versions"].items())
            found[f"{start['processes']} x {start['device']}: {named}"] = None
    return list(found)


def common_step(results: Sequence[RunResult]) -> int:
    """Returns the newest step that all of the runs that have evaluated at all have evaluated; 0 if there is none."""
    steps = [result.evaluated_steps for result in results if result.evaluated_steps]
    return max(set.intersection(*steps), default=0) if steps else 0


def table_content(table: Table, runs: Runs) -> dict[str, Any]:
    """Returns a table: its measures' names and forms, and a row per setting that has evaluated."""
    rows = []
    for setting, results in runs.items():
        step = common_step(results)
        if (table.settings and setting not in table.settings) or not step:
            continue
        begun = [result for result in results if result.evaluated_steps]
        values = [_known(measure.value(result, step) for result in begun) for measure in table.measures]
        cells = [_mean(mean_of(one)) for one in values]
        rows.append({"setting": setting, "seeds": len(begun), "step": step, "cells": cells, "values": values})
    heads = [{"name": measure.name, "form": measure.form} for measure in table.measures]
    return {"title": table.title, "note": table.note, "heads": heads, "rows": rows}


def comparison_content(comparison: Comparison, runs: Runs) -> dict[str, Any]:
    """Returns the paired differences of two settings, a row per step that two seeds or more have in common, or one if there is only one."""
    pairs = [
        (a, b) for a in runs.get(comparison.first, ()) for b in runs.get(comparison.second, ()) if a.seed == b.seed
    ]
    steps = sorted({step for a, b in pairs for step in a.evaluated_steps & b.evaluated_steps})
    rows = []
    for step in steps:
        both = [(a, b) for a, b in pairs if step in a.evaluated_steps & b.evaluated_steps]
        if len(both) < min(2, len(pairs)):
            continue
        cells = []
        for measure in comparison.measures:
            values = [(measure.value(a, step), measure.value(b, step)) for a, b in both]
            cells.append(_mean(mean_of([x - y for x, y in values if x is not None and y is not None])))
        rows.append({"step": step, "seeds": len(both), "cells": cells})
    heads = [{"name": measure.name, "form": measure.form} for measure in comparison.measures]
    return {"first": comparison.first, "second": comparison.second, "heads": heads, "rows": rows}


def claim_content(claim: Claim, runs: Runs) -> dict[str, Any]:
    """Returns a claim with its tests and verdicts."""
    seeds = sorted({result.seed for results in runs.values() for result in results})
    tests, verdicts = [], []
    for test in claim.tests:
        values = []
        for seed in seeds:
            of_seed = {s: r for s, results in runs.items() for r in results if r.seed == seed and r.is_finished}
            values.append(test.value(of_seed))
        known = _known(values)
        verdicts.append(judge(known, test.margin))
        mean = _mean(mean_of(known))
        tests.append(
            {"label": test.label, "margin": test.margin, "values": known, "mean": mean, "verdict": verdicts[-1].value}
        )
    return {"text": claim.text, "verdict": combined(verdicts).value, "tests": tests}


def panel_content(panel: Panel, runs: Runs) -> dict[str, Any]:
    """Returns a chart's curves: by setting, (x, mean, standard error) where all seeds that have begun have a value."""
    curves = {}
    for setting, results in runs.items():
        if panel.settings and setting not in panel.settings:
            continue
        points = [dict(panel.points(result)) for result in results]
        points = [one for one in points if one]
        common = sorted(set.intersection(*map(set, points))) if points else []
        means = [(x, mean_of([one[x] for one in points])) for x in common]
        if means:
            curves[setting] = [(x, m.mean, 0.0 if math.isnan(m.error) else m.error) for x, m in means if m is not None]
    return {
        "title": panel.title,
        "x_name": panel.x_name,
        "y_name": panel.y_name,
        "log_x": panel.log_x,
        "log_y": panel.log_y,
        "curves": curves,
    }


def _known(values: Any) -> list[float]:
    return [value for value in values if value is not None]


def _mean(found: Mean | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)
