"""Several runs side by side: `python -m ssa_pretrain.report.compare RUN RUN … [out=FILE.html]`.

Reads each run's metrics.jsonl and prints the last held-out metrics of each run in both modes as a markdown table. With `out=`, writes a page
with the same table, the training cross entropy of all runs in one chart, and their captured mass in another. Exit code 3: wrong arguments.
"""

import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ssa_pretrain.monitor.metrics import FILE_NAME, read_records
from ssa_pretrain.report.summary import Points
from ssa_pretrain.settings.output import pipe_may_close
from ssa_pretrain.webpage.charts import COLOURS, WIDE, Line, legend, line_chart, smooth
from ssa_pretrain.webpage.layout import card, document, grid, number_table

WINDOW = 10  # steps that a point of a curve averages
HEAD = ("run", "tokens", "mode", "cross entropy", "perplexity", "captured mass")
USAGE = "give folders of runs, and out=FILE.html for a page with charts"

Runs = Mapping[str, Sequence[Mapping[str, Any]]]  # records of metrics.jsonl by name of the run


def final_metrics(runs: Runs) -> list[tuple[str, ...]]:
    """Returns the last evaluation of each run in each mode as cells of a table, in the order of HEAD."""
    rows = []
    for name, records in runs.items():
        last = {r["mode"]: r for r in records if r["kind"] == "evaluation"}
        for mode, r in last.items():
            mass = "–" if r["captured_mass"] is None else f"{r['captured_mass']:.3f}"
            rows.append((name, f"{r['tokens']:,}", mode, f"{r['cross_entropy']:.4f}", f"{r['perplexity']:.2f}", mass))
    return rows


def markdown_table(runs: Runs) -> str:
    """Returns `final_metrics` as markdown."""
    head, *rows = [f"| {' | '.join(row)} |\n" for row in (HEAD, *final_metrics(runs))]
    return "".join([head, "|---" * len(HEAD) + "|\n", *rows])


def page(runs: Runs) -> str:
    """Returns the page with the table and the charts."""
    losses = _lines({name: _cross_entropy(records) for name, records in runs.items()})
    masses = _lines({name: _captured_mass(records) for name, records in runs.items()}, marks=3)
    loss = line_chart(losses, title="Training cross entropy", y_name="nats per token", width=WIDE, height=400)
    mass = line_chart(masses, title="Captured attention mass", y_name="share", width=WIDE, height=260)
    cards = [
        card("Held-out text", "The last evaluation of each run.", number_table(HEAD, final_metrics(runs)), wide=True),
        card(
            "Training cross entropy",
            f"Mean over about {WINDOW} steps, fewer at both ends. "
            "The first tenth of each run is left out: it falls so far that the rest would look flat.",
            loss and legend(losses) + loss,
            wide=True,
        ),
        card("Captured attention mass", "Held-out text, full mode.", mass and legend(masses) + mass, wide=True),
    ]
    return document("runs side by side", f"<h1>Runs side by side</h1><p>{escape(', '.join(runs))}</p>" + grid(cards))


def _cross_entropy(records: Sequence[Mapping[str, Any]]) -> Points:
    """Returns (tokens, smoothed cross entropy) of training from the first tenth of the run on."""
    points = [
        (r["tokens"], r["cross_entropy"]) for r in records if r["kind"] == "train" and r["cross_entropy"] is not None
    ]
    return smooth(points, WINDOW / max(1, len(points)))[len(points) // 10 :]


def _captured_mass(records: Sequence[Mapping[str, Any]]) -> Points:
    """Returns (tokens, captured mass) of the evaluations in full mode."""
    evaluations = [r for r in records if r["kind"] == "evaluation" and r["mode"] == "full"]
    return [(r["tokens"], r["captured_mass"]) for r in evaluations if r["captured_mass"] is not None]


def _lines(series: Mapping[str, Points], marks: float = 0.0) -> list[Line]:
    """Returns a line of its own colour for each run."""
    return [
        Line(name, points, COLOURS[index % len(COLOURS)], marks=marks)
        for index, (name, points) in enumerate(series.items())
    ]


def main() -> None:
    """Reads the command line, prints the table, writes the page."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    folders = [Path(argument) for argument in sys.argv[1:] if not argument.startswith("out=")]
    out = next((Path(argument[4:]) for argument in sys.argv[1:] if argument.startswith("out=")), None)
    missing = [str(folder) for folder in folders if not (folder / FILE_NAME).is_file()]
    if not folders or missing or (out and out.suffix != ".html"):
        problem = (
            f"no {FILE_NAME} in {', '.join(missing)}" if missing else "no run given" if not folders else f"out={out}"
        )
        print(f"ssa_pretrain.report.compare: {problem}; {USAGE}", file=sys.stderr)
        raise SystemExit(3)
    runs = {folder.name: list(read_records(folder / FILE_NAME)) for folder in folders}
    print(markdown_table(runs), end="")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page(runs), encoding="utf-8")


if __name__ == "__main__":
    with pipe_may_close():
        main()
