"""The results as a Markdown page with its JSON, and as a plot of tokens/s per GPU over GPUs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.scaling.cases import ONE_GPU, SSA
from benchmarks.scaling.judged import (
    Result,
    checks,
    find,
    has_requirements,
    loss_difference,
    measured,
    over_full,
    plan_errors,
    relative_speed,
)

SHOWN_PARTS = 6


def page(title: str, results: Sequence[Result], *, about: dict[str, Any], size: str) -> str:
    """Returns the Markdown page.

    Args:
        title: its heading.
        results: of all parts.
        about: device, versions, date, commands and seconds of each part.
        size: name in SIZES.
    """
    blocks = [
        [f"# {title}"],
        about_lines(about),
        speed_lines(results),
        fixed_lines(results),
        exposed_lines(results),
        part_lines(results),
        save_lines(results),
        test_lines(results),
        check_lines(results, judged=has_requirements(results, size)),
        error_lines(results),
    ]
    return "\n".join(line for block in blocks if block for line in [*block, ""]).rstrip() + "\n"


def write(path: Path, text: str, results: Sequence[Result], about: dict[str, Any]) -> None:
    """Writes the page, and beside it the results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps({"about": about, "results": list(results)}, indent=1) + "\n")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns a Markdown table, empty without rows."""
    if not rows:
        return []
    return [line(columns), "|" + "---|" * len(columns), *map(line, rows)]


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def with_error(text: str, result: Result, what: str) -> str:
    """Returns a planned value with its error, if that is known."""
    error = plan_errors(result).get(what)
    return text if error is None else f"{text} ({error:+.0%})"


def about_lines(about: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    seconds = ", ".join(f"{part} {taken:.0f} s" for part, taken in about["seconds"].items())
    first = f"{about['date']}; {about['device']}; {about['cores']} host cores; {versions}. Commit {about['commit']}."
    return [first, "", f"`{about['command']}`: {seconds}."]


def speed_lines(results: Sequence[Result]) -> list[str]:
    columns = ("layout", "rows", "variant", "tokens/s per GPU", "over one GPU", "over full", "MFU", "ms per step")
    columns = (*columns, "planned", "spread", "peak, GiB", "planned")
    rows = []
    for r in measured(results):
        numbers = (
            cell(r["tokens_per_second"], ",.0f"),
            cell(relative_speed(results, r), ".3f"),
            cell(over_full(results, r), ".3f"),
            cell(r["mfu"], ".1%"),
            cell(r["ms"], ",.0f"),
            with_error(cell(r.get("planned_ms"), ",.0f"), r, "time"),
            cell(r["spread"], ".1%"),
            cell(r.get("peak_gib"), ".1f"),
            with_error(cell(r["planned_gib"], ".1f"), r, "memory"),
        )
        rows.append((r["layout"], r["length"], r["variant"], *numbers))
    head = ["## Whole steps, equal tokens per GPU", ""]
    return head + table(columns, rows) if rows else []


def fixed_lines(results: Sequence[Result]) -> list[str]:
    columns = ("layout", "rows", "tokens per step", "tokens/s per GPU", "over one GPU", "losses", "beside one GPU's")
    rows = []
    for r in measured(results):
        if "losses" not in r:
            continue
        base = find(results, ONE_GPU, r["length"], SSA)
        speed = r["fixed_tokens_per_second"]
        ratio = speed / base["fixed_tokens_per_second"] if base else None
        losses = ", ".join(f"{loss:.4f}" for loss, _ in r["losses"])
        numbers = (f"{r['fixed_tokens']:,}", f"{speed:,.0f}", cell(ratio, ".3f"), losses)
        rows.append((r["layout"], r["length"], *numbers, cell(loss_difference(r, base), ".1e")))
    head = ["## The same global batch on every layout: the first steps, ssa", ""]
    return head + table(columns, rows) if rows else []


def exposed_lines(results: Sequence[Result]) -> list[str]:
    columns = ("layout", "rows", "variant", "exposed", "hidden", "device idle", "ms of the traced step")
    rows = [
        (
            *(r["layout"], r["length"], r["variant"]),
            *(f"{r[share]:.2%}" for share in ("exposed", "hidden", "idle")),
            f"{r['traced_ms']:,.0f}",
        )
        for r in measured(results)
        if "exposed" in r
    ]
    head = [
        "## Communication, shares of a step",
        "",
        "Exposed: on the rank that waits most, of two steps the one that waits less.",
        "",
    ]
    return head + table(columns, rows) if rows else []


def part_lines(results: Sequence[Result]) -> list[str]:
    columns = ("layout", "rows", "variant", "part", "calls", "ms", "exposed ms", "share of the step")
    rows = []
    for r in measured(results):
        for part in r.get("parts", [])[:SHOWN_PARTS]:
            name = f"{part['kind']}, {part['direction']}, stream {part['stream']}"
            numbers = (str(part["calls"]), f"{part['busy']:.1f}", f"{part['exposed']:.1f}")
            share = f"{part['exposed'] / r['traced_ms']:.2%}"
            rows.append((r["layout"], r["length"], r["variant"], name, *numbers, share))
    head = ["## Communication by part, rank 0", ""]
    return head + table(columns, rows) if rows else []


def save_lines(results: Sequence[Result]) -> list[str]:
    found = []
    for r in results:
        if "save_seconds" in r:
            difference = loss_difference(r, {"losses": r["resumed_losses"]})
            found.append(
                f"- {r['case']}: {r['gib']:.1f} GiB, copied in {r['copy_seconds']:.2f} s and written in "
                f"{r['save_seconds']:.1f} s beside training, whose steps took {r['step_beside']:.2f} times as long. "
                f"Resumed on {r['resumed_on']}: losses differ by {difference:.1e}."
            )
        if "difference" in r:
            found.append(
                f"- {r['case']} of {r['layout']}: the first new step {r['seconds_to_new_step']:.0f} s after the kill; "
                f"losses of steps done twice differ by {r['difference']:.1e}; exit code {r['exit_code']}."
            )
    return ["## Checkpoints and restarts", "", *found] if found else []


def test_lines(results: Sequence[Result]) -> list[str]:
    found = [f"- `{r['command']}`: {r['tests']}" for r in results if "tests" in r]
    return ["## Tests", "", *found] if found else []


def check_lines(results: Sequence[Result], *, judged: bool) -> list[str]:
    columns = ("requirement", "measured", "limit", "")
    rows = []
    for check in checks(results):
        verdict = ("reached" if check.passed else "**missed**") if judged else ""
        value = f"{check.value:.3f}" if check.is_minimum else f"{check.value:.1e}"
        rows.append((check.what, value, f"{'≥' if check.is_minimum else '≤'} {check.limit:g}", verdict))
    return ["## Requirements", "", *table(columns, rows)] if rows else []


def error_lines(results: Sequence[Result]) -> list[str]:
    found = [f"- {r['case']}: {r['error']}" for r in results if "error" in r]
    return ["## Not measured", "", *found] if found else []


def plot(path: Path, results: Sequence[Result]) -> None:
    """Draws tokens/s per GPU of ssa over GPUs, one line per kind of layout and length of rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=False)
    for place, length in zip(axes, ("8k", "32k"), strict=True):
        chosen = [r for r in measured(results) if (r["variant"], r["length"]) == (SSA, length)]
        plain = sorted((r["gpus"], r["tokens_per_second"]) for r in chosen if _is_data_parallel(r["layout"]))
        place.plot(*zip(*plain, strict=True) if plain else ([], []), "o-", color="C0", label="data parallel")
        for r in chosen:
            if not _is_data_parallel(r["layout"]):
                place.plot(r["gpus"], r["tokens_per_second"], "x", color="C1")
                place.annotate(
                    r["layout"],
                    (r["gpus"], r["tokens_per_second"]),
                    fontsize=7,
                    ha="right",
                    xytext=(-4, 0),
                    textcoords="offset points",
                )
        place.set(title=f"ssa, rows of {length}", xlabel="GPUs", ylabel="tokens/s per GPU")
        place.set_ylim(bottom=0)
        place.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _is_data_parallel(layout: str) -> bool:
    return layout == ONE_GPU or (layout.startswith("dp") and " " not in layout)
