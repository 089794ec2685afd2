"""Cards of the pages: goodput, tasks and what went wrong, which the page of several runs has too, and data by source."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from ssa_pretrain.monitor.by_source import HEAD, source_rows
from ssa_pretrain.report.goodput import MEANINGS, PARTS, RUNNING, Goodput
from ssa_pretrain.report.health import RunHealth
from ssa_pretrain.report.tasks import MODES, TaskScores
from ssa_pretrain.settings.quantities import duration
from ssa_pretrain.webpage.charts import Line, colour_legend, legend, line_chart, smooth, stacked_bars
from ssa_pretrain.webpage.layout import card, number_table

MODE_COLOURS = {"full": "a", "sparse": "b"}
SOURCE_COLOURS = "abcdef"  # of the sources with most tokens
TASK_HEAD = ("task", "metric", *MODES, "step")


def goodput_card(runs: Sequence[tuple[str, Goodput]]) -> str:
    """Returns a bar per run with the parts of its time, and a table of them; empty without runs."""
    if not runs:
        return ""
    several = len(runs) > 1
    bars = [
        (name if several else "", [found.seconds[part] / max(found.total, 1e-9) for part in PARTS])
        for name, found in runs
    ]
    chart = stacked_bars(bars, PARTS, title="Where the time went")
    rows = []
    for part in PARTS:
        cells = [f"{duration(found.seconds[part])} ({_share(found, part)})" for _, found in runs]
        rows.append([part, MEANINGS[part], *cells])
    rows.append(["in all", "from the first start to the last line", *(duration(found.total) for _, found in runs)])
    names = [name if several else "time" for name, _ in runs]
    table = number_table(["part", "", *names], rows, labels=2)
    text = " ".join(goodput_sentence(found, name if several else "") for name, found in runs)
    return card("Goodput", text, colour_legend(PARTS) + chart + table, wide=True)


def goodput_sentence(found: Goodput, name: str = "") -> str:
    """Returns goodput, number of starts and how the run ended, in a sentence."""
    starts = f"{found.starts} start{'s' * (found.starts != 1)}"
    back = f" and {found.rollbacks} rollback{'s' * (found.rollbacks != 1)}" if found.rollbacks else ""
    last = datetime.fromtimestamp(found.last, UTC).strftime("%Y-%m-%d %H:%M UTC")
    how = f"ended ({found.how})" if found.how else "was killed"
    how = "still running, last line" if found.how == RUNNING else how
    head = f"{name}: " if name else ""
    return f"{head}{found.share:.1%} of the time trained steps that count, over {starts}{back}; {how} {last}."


def tasks_card(tasks: Sequence[TaskScores]) -> str:
    """Returns the table of a run's tasks, and a chart for each that was evaluated more than once; empty without tasks."""
    if not tasks:
        return ""
    charts = []
    for task in tasks:
        lines = [
            Line(mode, task.points(mode), MODE_COLOURS[mode], marks=5.5 if mode == "full" else 3) for mode in MODES
        ]
        if max(len(line.points) for line in lines) > 1:
            title = f"{task.name}: {task.main}"
            chart = line_chart(lines, title=title, y_name=title, y_text="{:g}".format, height=190)
            charts.append(chart and f"<div>{legend(lines)}{chart}</div>")
    drawn = f'<div class="columns">{"".join(charts)}</div>' if any(charts) else ""
    text = "The newest result of each task with each kind of attention, with standard errors where the task has them."
    return card("Tasks", text, number_table(TASK_HEAD, [task.row() for task in tasks], labels=2) + drawn, wide=True)


def sources_card(steps: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table of a run's data by source, with the loss of each over training; empty without several sources."""
    rows = source_rows(steps)
    if len(rows) < 2:
        return ""
    lines = [
        Line(row[0], smooth(source_points(steps, row[0])), colour)
        for row, colour in zip(rows, SOURCE_COLOURS, strict=False)
    ]
    chart = line_chart(lines, title="Cross entropy by source", y_name="nats per token", height=190)
    text = "Tokens and epochs read so far, without padding; the loss over the labels of the newest steps. The chart is smoothed."
    return card("Data by source", text, number_table(HEAD, rows) + (chart and legend(lines) + chart), wide=True)


def source_points(steps: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """Returns (tokens, cross entropy) of a source in every step that has it."""
    found = ((record["tokens"], (record.get("cross_entropy_by_source") or {}).get(name)) for record in steps)
    return [(tokens, loss) for tokens, loss in found if loss is not None]


def health_card(health: RunHealth) -> str:
    """Returns skipped steps, spikes, rollbacks, failed saves and hangs as a table; a sentence if there are none."""
    heading, text = "Health", f"{health.sentence()[:1].upper()}{health.sentence()[1:]}."
    if health.is_clean:
        return card(heading, "", f"<p>{text}</p>")
    return card(heading, text, number_table(("step", "what", ""), health.events(), labels=3), wide=True)


def _share(found: Goodput, part: str) -> str:
    return f"{found.seconds[part] / found.total:.1%}" if found.total else "–"
