"""Results as CSV lines, ratios as a markdown table and as a plot."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from ssa_pretrain.bench.goals import GOALS, SMALLER_IS_BETTER, Goal

RESULTS, TABLE, PLOT = "results.csv", "ratios.md", "ratios.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The result of one variant: a line in the CSV file, where None is left empty."""

    case: str
    model: str
    variant: str
    ms: float
    spread: float
    tokens_per_second_per_gpu: float | None
    model_tflops_per_gpu: float | None
    mfu: float | None
    peak_gib: float | None
    world_size: int
    device: str
    versions: str
    command: str


def append(folder: Path, results: Sequence[Result]) -> None:
    """Appends results to the CSV file, so that they survive a later failure."""
    path = folder / RESULTS
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Result)])
        if fresh:
            writer.writeheader()
        writer.writerows({k: "" if v is None else v for k, v in asdict(result).items()} for result in results)


def read(folder: Path) -> dict[str, Result]:
    """Returns the newest result of each variant in the CSV file, from any command."""
    kinds = get_type_hints(Result)
    found = {}
    with (folder / RESULTS).open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            values: dict[str, Any] = {
                k: kinds[k](v) if kinds[k] in (str, int) else float(v) if v else None for k, v in line.items()
            }
            found[line["variant"]] = Result(**values)
    return found


def ratio(goal: Goal, results: Mapping[str, Result]) -> float | None:
    """Returns the ratio of a goal, None if one of its variants was not measured."""
    over, under = results.get(goal.over), results.get(goal.under)
    if over is None or under is None:
        return None
    column = {"speed": "tokens_per_second_per_gpu", "memory": "peak_gib", "time": "ms"}[goal.of]
    high, low = getattr(over, column), getattr(under, column)
    return high / low if high is not None and low else None


def verdict(goal: Goal, value: float) -> str:
    """Returns whether a ratio reaches its goal, in words; empty without a goal."""
    if goal.must is None or goal.aim is None:
        return ""
    sign = -1 if goal.of in SMALLER_IS_BETTER else 1
    if sign * value >= sign * goal.aim:
        return "aim reached"
    return "must reached" if sign * value >= sign * goal.must else "missed"


def write_ratios(folder: Path, results: Mapping[str, Result]) -> str:
    """Writes the table of all ratios whose variants were measured, and a plot if matplotlib is installed. Returns the table."""
    found = [(goal, value) for goal in GOALS if (value := ratio(goal, results)) is not None]
    found = [
        (goal if _has_goals(results[goal.over]) else replace(goal, must=None, aim=None), value) for goal, value in found
    ]
    text = "\n".join([*_ratio_lines(found), "", *_result_lines(results)]) + "\n"
    (folder / TABLE).write_text(text, encoding="utf-8")
    _plot(folder / PLOT, found)
    return text


def _ratio_lines(found: Sequence[tuple[Goal, float]]) -> list[str]:
    """Returns the table of ratios with their goals."""
    lines = ["| ratio | measured | must | aim | |", "|---|---|---|---|---|"]
    for goal, value in found:
        sign = "≤" if goal.of in SMALLER_IS_BETTER else "≥"
        must, aim = (f"{sign} {limit:g}" if limit is not None else "" for limit in (goal.must, goal.aim))
        lines.append(f"| {goal.label} | {value:.3f} | {must} | {aim} | {verdict(goal, value)} |")
    return lines


def _result_lines(results: Mapping[str, Result]) -> list[str]:
    """Returns the table of results, with device, versions and command of the newest."""
    lines = [
        "| variant | model | ms | spread | tokens/s per GPU | TFLOP/s per GPU | MFU | peak, GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results.values():
        cells = (
            result.model,
            f"{result.ms:.2f}",
            f"{result.spread:.1%}",
            _cell(result.tokens_per_second_per_gpu, ",.0f"),
            _cell(result.model_tflops_per_gpu, ".0f"),
            _cell(result.mfu, ".1%"),
            _cell(result.peak_gib, ".1f"),
        )
        lines.append(f"| {result.variant} | {' | '.join(cells)} |")
    if results:
        last = list(results.values())[-1]
        lines += ["", f"{last.world_size} x {last.device}; {last.versions}.", f"`{last.command}`"]
    return lines


def _has_goals(result: Result) -> bool:
    """Returns whether the goals hold for this model and device."""
    return result.model == "llama_1b" and ("H100" in result.device or "H200" in result.device)


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _plot(path: Path, found: Sequence[tuple[Goal, float]]) -> None:
    try:
        import matplotlib
    except ImportError:  # the `bench` extra
        return
    if not found:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.45 * len(found) + 1.2))
    for place, (goal, value) in enumerate(reversed(found)):
        color = {"aim reached": "C2", "must reached": "C0", "missed": "C3"}.get(verdict(goal, value), "C7")
        axes.barh(place, value, color=color)
        axes.text(value, place, f" {value:.3f}", va="center", fontsize=8)
        for limit, style in ((goal.must, "-"), (goal.aim, ":")):
            if limit is not None:
                axes.plot([limit, limit], [place - 0.4, place + 0.4], style, color="black", linewidth=1)
    axes.set_yticks(range(len(found)), [goal.label for goal, _ in reversed(found)], fontsize=8)
    axes.set_xlabel("ratio; solid line: must, dotted: aim")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
