"""The report of a recipe: REPORT.md, .json and .png in the folder of the experiment. Text and picture show what the JSON file has."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssa_pretrain.experiments.contents import Evidence, contents
from ssa_pretrain.experiments.figure import draw
from ssa_pretrain.experiments.verdicts import Mean
from ssa_pretrain.settings.files import write_atomically

RULE = (
    "A test has one number per seed. With the mean d, the standard error e and Student's one-sided 95% quantile t, it holds if d + t e is at most the "
    "margin, and does not hold if d − t e is above it; otherwise, or with one seed, it cannot be told. Runs that are not finished do not count."
)


def write_report(evidence: Evidence, out: Path, command: str) -> Path:
    """Writes the report's files and returns the path of the text.

    Args:
        evidence: the recipe and its jobs.
        out: the experiment's folder.
        command: that made it.
    """
    content = contents(evidence, command)
    path = out / f"report_{evidence.recipe.name}.md"
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(path.with_suffix(".json"), json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    picture = draw(content, path.with_suffix(".png"))
    write_atomically(path, markdown(content, path.with_suffix(".png").name if picture else ""))
    return path


def markdown(content: Mapping[str, Any], picture: str) -> str:
    """Returns the report as text.

    Args:
        content: of the JSON file.
        picture: the figure's file; empty: there is none.
    """
    parts = [f"# {content['title']}", content["about"], f"```sh\n{content['command']}\n```"]
    parts += ["\n".join(f"- {machine}" for machine in content["machines"])] if content["machines"] else []
    parts += [f"![{content['title']}]({picture})"] if picture else []
    parts += _claims(content["claims"])
    for bench in content["benches"]:
        parts += _bench(bench)
    for table in content["tables"]:
        parts += _table(table)
    for comparison in content["comparisons"]:
        parts += _comparison(comparison)
    parts += _jobs(content["jobs"])
    return "\n\n".join(parts) + "\n"


def lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _claims(claims: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the verdicts with the numbers behind them."""
    if not claims:
        return []
    rows = []
    for claim in claims:
        tests = claim["tests"] or [{"label": "no test fits this size", "mean": None, "margin": 0.0, "verdict": ""}]
        for number, test in enumerate(tests):
            first = [claim["text"], f"**{claim['verdict']}**"] if number == 0 else ["", ""]
            mean = _cell(test["mean"], ".4f", signed=True)
            seeds = str(test["mean"]["count"]) if test["mean"] else "0"
            rows.append([*first, test["label"], mean, f"{test['margin']:g}", seeds, test["verdict"]])
    head = ["claim", "verdict", "number", "mean ± standard error", "at most", "seeds", "test"]
    return ["## Verdicts", RULE, lines(head, rows)]


def _table(table: Mapping[str, Any]) -> list[str]:
    """Returns a table of settings."""
    if not table["rows"]:
        return []
    shown = [i for i, _ in enumerate(table["heads"]) if any(row["cells"][i] for row in table["rows"])]
    head = ["setting", "seeds", "step", *(table["heads"][i]["name"] for i in shown)]
    rows = [
        [
            row["setting"],
            str(row["seeds"]),
            str(row["step"]),
            *(_cell(row["cells"][i], table["heads"][i]["form"]) for i in shown),
        ]
        for row in table["rows"]
    ]
    note = [table["note"]] if table["note"] else []
    return [f"## {table['title']}", *note, lines(head, rows)] if shown else []


def _comparison(comparison: Mapping[str, Any]) -> list[str]:
    """Returns the table of paired differences over training."""
    if not comparison["rows"]:
        return []
    heads = comparison["heads"]
    rows = [
        [
            str(row["step"]),
            str(row["seeds"]),
            *(_cell(c, h["form"], signed=True) for c, h in zip(row["cells"], heads, strict=True)),
        ]
        for row in comparison["rows"]
    ]
    title = f"## {comparison['first']} minus {comparison['second']}, paired by seed"
    return [title, lines(["step", "seeds", *(head["name"] for head in heads)], rows)]


def _bench(bench: Mapping[str, Any]) -> list[str]:
    """Returns the tables of a benchmark: times, and parts."""
    rows = [
        [
            row["variant"],
            f"{row['ms']:.2f}",
            f"{row['spread']:.1%}",
            *(_number(row[key], form) for key, form in (("over_moba", ".3f"), ("over_full", ".3f"))),
            *(_number(row[key], form) for key, form in (("tokens_per_second", ",.0f"), ("peak_gib", ".1f"))),
        ]
        for row in bench["rows"]
    ]
    head = ["variant", "ms", "spread", "time / moba", "time / full", "tokens/s", "peak, GiB"]
    found = [
        f"## Benchmark {bench['name']}",
        f"{bench.get('device', '')}; {bench.get('versions', '')}.",
        lines(head, rows),
    ]
    parts = list(dict.fromkeys(part for row in bench["rows"] for part in row["parts"]))
    if parts:
        cells = [[row["variant"], *(_number(row["parts"].get(part), ".2f") for part in parts)] for row in bench["rows"]]
        found += ["Device time by kind of kernel, ms, of one profiled run:", lines(["variant", *parts], cells)]
    return found


def _jobs(jobs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the state of all jobs, with the end of the log of those that failed."""
    rows = [[job["job"], job["state"]] for job in jobs]
    failed = [f"`{job['job']}`:\n\n```\n{job['reason']}\n```" for job in jobs if job["reason"]]
    done = sum(job["state"] == "done" for job in jobs)
    return [f"## Jobs: {done} of {len(jobs)} done", lines(["job", "state"], rows), *failed]


def _cell(cell: Mapping[str, Any] | None, form: str, *, signed: bool = False) -> str:
    if cell is None:
        return "–"
    return Mean(cell["mean"], cell["error"], cell["count"]).text(form, signed=signed)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
