"""The page of several runs: their last results side by side, their curves in common charts, and the settings in which they differ.

Each run has one colour in all charts. In charts of held-out text, full attention is a solid line and sparse attention a dashed one. Runs are compared at
equal tokens. What a run lacks is left out.
"""

from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ssa_pretrain.report.cards import goodput_card
from ssa_pretrain.report.summary import Points, RunSummary
from ssa_pretrain.report.tasks import MODES
from ssa_pretrain.settings.quantities import compact, duration
from ssa_pretrain.settings.tree import flatten_settings
from ssa_pretrain.webpage.charts import COLOURS, HALF, WIDE, Line, heat_map, legend, line_chart, smooth
from ssa_pretrain.webpage.layout import card, document, grid, number_table

WINDOW = 10  # steps that a point of a curve averages
HEAD = ("run", "tokens", "mode", "cross entropy", "perplexity", "captured mass")
OWN = ("name", "output_dir", "logging.", "dry_run")  # settings that differ without a meaning for the results
MOST_SETTINGS = 40

Runs = Sequence[tuple[str, RunSummary]]


def names_of(folders: Sequence[Path]) -> list[str]:
    """Returns a name for each run: its folder's, with as many parents as tell it from the others."""
    parts = [folder.resolve().parts for folder in folders]
    deepest = max(map(len, parts), default=1)
    for count in range(1, deepest + 1):
        names = ["/".join(one[-count:]) for one in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(folder) for folder in folders]


def final_metrics(runs: Runs) -> list[tuple[str, ...]]:
    """Returns the newest held-out metrics of each run in each mode as cells of a table, in the order of HEAD."""
    rows = []
    for name, summary in runs:
        for mode, r in summary.final.items():
            tokens = "–" if r.get("tokens") is None else f"{r['tokens']:,}"
            values = [_cell(r, key, form) for key, form in FORMS]
            rows.append((name, tokens, mode, *values))
    return rows


FORMS = (("cross_entropy", ".4f"), ("perplexity", ".2f"), ("captured_mass", ".3f"))


def markdown_table(runs: Runs) -> str:
    """Returns `final_metrics` as markdown."""
    head, *rows = [f"| {' | '.join(row)} |\n" for row in (HEAD, *final_metrics(runs))]
    return "".join([head, "|---" * len(HEAD) + "|\n", *rows])


def page(runs: Runs) -> str:
    """Returns the page."""
    loss = "Mean over about 10 steps, fewer at both ends. The first tenth of each run is left out: it falls so far that the rest would look flat."
    cards = [
        card("Held-out text", "The newest evaluation of each run.", number_table(HEAD, final_metrics(runs)), wide=True),
        _curves(runs, "Training cross entropy", loss, "nats per token", _training, wide=True),
        _held_out(runs, "cross_entropy", "Cross entropy on held-out text", "nats per token"),
        _held_out(runs, "captured_mass", "Captured mass on held-out text", "share"),
        *_heat_maps(runs),
        _curves(runs, "Alignment loss", "Before its weight.", "loss", _smoothed("alignment_loss"), log=True),
        _curves(runs, "Gradient norm", "Global norm before clipping.", "norm", _smoothed("grad_norm"), log=True),
        _tasks(runs),
        goodput_card([(name, summary.goodput) for name, summary in runs if summary.goodput]),
        _state(runs),
        _settings(runs),
    ]
    names = ", ".join(name for name, _ in runs)
    return document("runs side by side", f"<h1>Runs side by side</h1><p>{escape(names)}</p>" + grid(cards))


def _curves(
    runs: Runs,
    heading: str,
    text: str,
    unit: str,
    points: Callable[[RunSummary], Points],
    *,
    wide: bool = False,
    log: bool = False,
) -> str:
    """Returns the chart of one metric of all runs."""
    lines = [Line(name, points(summary), _colour(index)) for index, (name, summary) in enumerate(runs)]
    width, height = (WIDE, 400) if wide else (HALF, 250)
    chart = line_chart(lines, title=heading, y_name=unit, log=log, y_text="{:g}".format, width=width, height=height)
    return card(heading, text, chart and legend(lines) + chart, wide=wide)


def _held_out(runs: Runs, key: str, heading: str, unit: str) -> str:
    """Returns the chart of a held-out metric of all runs in both modes."""
    lines = []
    for index, (name, summary) in enumerate(runs):
        for mode, records in summary.evaluations.items():
            points = [(r["tokens"], r[key]) for r in records if r.get(key) is not None]
            marks = 4.0 if mode == "full" else 3.0
            lines.append(Line(f"{name}, {mode}", points, _colour(index), marks=marks, dashed=mode != "full"))
    chart = line_chart(lines, title=heading, y_name=unit, y_text="{:g}".format)
    return card(
        heading, "Full attention: solid lines. Sparse attention: dashed lines.", chart and legend(lines) + chart
    )


def _heat_maps(runs: Runs) -> Iterator[str]:
    """Yields the map of captured mass by layer of each run, all on one scale of colour."""
    layers = {name: summary.mass_by_layer() for name, summary in runs}
    values = [value for rows, _ in layers.values() for row in rows for _, value in row]
    low = min(0.9, min(values, default=0.9) // 0.05 * 0.05)
    for name, (rows, where) in layers.items():
        chart = heat_map(rows, title=f"Captured attention mass by layer, {name}", low=low, width=HALF)
        text = f"Measured {where}. The colour runs from {low:.2f} (faint) to 1 (strong)."
        yield card(f"Captured mass by layer: {name}", text, chart)


def _tasks(runs: Runs) -> str:
    """Returns the table of the newest results of all tasks, a column per run and mode."""
    names = list(dict.fromkeys(task.name for _, summary in runs for task in summary.tasks))
    found = [{task.name: task.row() for task in summary.tasks} for _, summary in runs]
    rows = []
    for task in names:
        metric = next(one[task][1] for one in found if task in one)
        cells = [one[task][2 + i] if task in one else "–" for one in found for i in range(len(MODES))]
        rows.append([task, metric, *cells])
    head = ["task", "metric", *(f"{name}, {mode}" for name, _ in runs for mode in MODES)]
    return card("Tasks", "The newest results.", number_table(head, rows, labels=2), wide=True) if rows else ""


def _state(runs: Runs) -> str:
    """Returns the table of length, speed and health."""
    rows = []
    for name, summary in runs:
        last = summary.steps[-1] if summary.steps else {"step": 0, "tokens": 0}
        speed = compact(summary.tokens_per_second) if summary.tokens_per_second else "–"
        mfu = f"{last['mfu']:.1%}" if last.get("mfu") is not None else "–"
        share = f"{summary.goodput.share:.1%}" if summary.goodput else "–"
        counts = [f"{last['step']:,}", compact(last["tokens"]), duration(summary.seconds), speed, mfu, share]
        rows.append([name, summary.health.sentence(), *counts])
    head = ["run", "health", "steps", "tokens", "time in steps", "tokens/s", "MFU", "goodput"]
    return card("The runs", "", number_table(head, rows, labels=2), wide=True)


def _settings(runs: Runs) -> str:
    """Returns the table of the settings that are not the same in all runs."""
    flat = [dict(flatten_settings(summary.config)) for _, summary in runs]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if not key.startswith(OWN)]
    differing = [key for key in keys if len({str(one.get(key, "–")) for one in flat}) > 1]
    rows = [[key, *(str(one.get(key, "–")) for one in flat)] for key in differing[:MOST_SETTINGS]]
    more = f" {len(differing) - MOST_SETTINGS} more are left out." if len(differing) > MOST_SETTINGS else ""
    table = number_table(["setting", *(name for name, _ in runs)], rows) if rows else ""
    return card("Settings that differ", f"Names and folders apart.{more}", table, wide=True)


def _training(summary: RunSummary) -> Points:
    """Returns (tokens, smoothed cross entropy) of training from the first tenth of the run on."""
    points = summary.series("cross_entropy")
    return smooth(points, WINDOW / max(1, len(points)))[len(points) // 10 :]


def _smoothed(key: str) -> Callable[[RunSummary], Points]:
    return lambda summary: smooth(summary.series(key), 0.02)


def _cell(record: dict[str, Any], key: str, form: str) -> str:
    value = record.get(key)
    return "–" if value is None else format(value, form)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]
