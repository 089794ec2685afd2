"""The report's page: tiles, charts, samples and facts of one run. Every text from a file is escaped; samples are whatever a model wrote."""

from html import escape
from pathlib import Path

from ssa_pretrain.errors import UsageError
from ssa_pretrain.monitor.metrics import perplexity
from ssa_pretrain.report.cards import MODE_COLOURS, goodput_card, health_card, sources_card, tasks_card
from ssa_pretrain.report.summary import RunSummary
from ssa_pretrain.settings.files import write_atomically
from ssa_pretrain.settings.quantities import compact, duration
from ssa_pretrain.webpage.charts import WIDE, Line, heat_map, legend, line_chart, smooth
from ssa_pretrain.webpage.layout import card, document, fact_table, grid, number_table, tiles

METHODS = {
    "ssa": "SSA (Sparse Sparse Attention)",
    "full": "full attention",
    "moba": "MoBA",
    "indexer": "a trained scorer of blocks",
}


def page(summary: RunSummary) -> str:
    """Returns the whole page as HTML."""
    cards = [
        _cross_entropy(summary),
        _held_out(summary),
        _captured_mass(summary),
        _alignment(summary),
        _single(
            summary,
            "index_loss",
            "Index loss",
            "Nats from full attention's mass by block to the scorer's.",
            "nats",
            log=True,
        ),
        _single(summary, "grad_norm", "Gradient norm", "Global norm before clipping.", "norm", log=True),
        _single(summary, "learning_rate", "Learning rate", "Of every step.", "rate"),
        _single(
            summary,
            "tokens_per_second",
            "Speed",
            "Over the last 20 steps, without evaluations and checkpoints.",
            "tokens/s",
        ),
        sources_card(summary.steps),
        tasks_card(summary.tasks),
        goodput_card([(summary.name, summary.goodput)] if summary.goodput else []),
        health_card(summary.health),
        _samples(summary),
        card("The run", "", fact_table(summary.facts()), wide=True),
    ]
    heading = f"<h1>{escape(summary.name)}</h1><p>{escape(_lead(summary))}</p>"
    return document(f"{summary.name}: report", heading + _tiles(summary) + grid(cards))


def write_page(target: Path, text: str) -> None:
    """Writes a page atomically.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        write_atomically(target, text)
    except OSError as error:
        raise UsageError(
            f"{target} cannot be written ({error.strerror}); give --out=FILE in an existing, writable folder"
        ) from error


def _lead(summary: RunSummary) -> str:
    """Returns one sentence on what ran."""
    if not summary.steps:
        return "No training step is recorded yet."
    last, method = summary.steps[-1], summary.config.get("attention", {}).get("method", "")
    model = summary.config.get("model", {}).get("name", "model")
    return (
        f"A {model} Llama with {METHODS.get(method, 'attention')}, trained for {last['step']:,} steps on {compact(last['tokens'])} tokens"
        f" in {duration(summary.seconds)}."
    )


def _tiles(summary: RunSummary) -> str:
    """Returns the tiles: perplexities, captured mass, speed."""
    values = [
        (f"{summary.final[mode]['perplexity']:.1f}", f"held-out perplexity, {mode} attention")
        for mode in summary.final
        if summary.final[mode].get("perplexity") is not None
    ]
    if summary.unigram:
        values.append((f"{perplexity(summary.unigram):,.0f}", "perplexity of token frequencies only"))
    mass = summary.series("captured_mass")
    if mass:
        values.append((f"{mass[-1][1]:.1%}", "attention mass inside the chosen blocks, last step"))
    if summary.tokens_per_second:
        values.append((compact(summary.tokens_per_second), "tokens per second"))
    if summary.goodput:
        values.append((f"{summary.goodput.share:.1%}", "goodput: share of the time that trained"))
    return tiles(values)


def _cross_entropy(summary: RunSummary) -> str:
    """Returns the chart of cross entropy: training, held-out text in both modes, and the unigram entropy."""
    steps = summary.series("cross_entropy")
    lines = [Line("training", steps, "f", faint=True), Line("training (smoothed)", smooth(steps), "f")]
    for mode, records in summary.evaluations.items():
        points = [(r["tokens"], r["cross_entropy"]) for r in records if r["cross_entropy"] is not None]
        marks = 5.5 if mode == "full" else 3
        lines.append(Line(f"held-out, {mode}", points, MODE_COLOURS.get(mode, "c"), marks=marks))
    ends = [x for line in lines if line.points for x in (line.points[0][0], line.points[-1][0])]
    if summary.unigram and ends:
        level = [(min(ends), summary.unigram), (max(ends), summary.unigram)]
        lines.append(Line("unigram entropy", level, "c", dashed=True))
    chart = line_chart(lines, title="Cross entropy over training", y_name="nats per token", width=WIDE, height=360)
    text = "Nats per token. Below the dashed line, the model knows more than how frequent each token is."
    return card("Cross entropy", text, chart and legend(lines) + chart, wide=True)


def _held_out(summary: RunSummary) -> str:
    """Returns the table of final metrics by mode."""
    if not summary.final:
        return ""
    columns = dict(summary.final)
    if summary.unigram:
        columns["unigram"] = {"cross_entropy": summary.unigram, "perplexity": perplexity(summary.unigram)}
    rows = []
    for key, name, form in (
        ("cross_entropy", "cross entropy", ".3f"),
        ("perplexity", "perplexity", ".1f"),
        ("captured_mass", "captured mass", ".3f"),
    ):
        values = [column.get(key) for column in columns.values()]
        if any(value is not None for value in values):
            rows.append([name, *("" if value is None else format(value, form) for value in values)])
    text = f"One set of weights, evaluated with each kind of attention. {summary.evaluation()}."
    return card("Full and sparse attention on held-out text", text, number_table(["", *columns], rows))


def _captured_mass(summary: RunSummary) -> str:
    """Returns the heat map of captured mass by layer over training."""
    rows, where = summary.mass_by_layer()
    values = [value for row in rows for _, value in row]
    if not values:
        return ""
    low = min(0.9, min(values) // 0.05 * 0.05)
    text = (
        f"The share of full attention inside the blocks that sparse attention chooses, by layer, {where}. The colour runs from {low:.2f}"
        " (faint) to 1 (strong). At 1, reading only those blocks loses nothing."
    )
    chart = heat_map(rows, title="Captured attention mass by layer over training", low=low)
    return card("Captured attention mass", text, chart)


def _alignment(summary: RunSummary) -> str:
    """Returns the chart of the alignment loss."""
    steps = summary.series("alignment_loss")
    lines = [Line("every step", steps, "c", faint=True), Line("alignment loss", smooth(steps), "c")]
    chart = line_chart(lines, title="Alignment loss over training", y_name="loss", log=True, y_text="{:g}".format)
    return card("Alignment loss", "Distance between each layer's full and sparse outputs, before its weight.", chart)


def _single(summary: RunSummary, key: str, heading: str, text: str, unit: str, log: bool = False) -> str:
    """Returns the chart of one metric."""
    form = compact if key == "tokens_per_second" else "{:g}".format
    chart = line_chart([Line(heading, summary.series(key), "a")], title=heading, y_name=unit, log=log, y_text=form)
    return card(heading, text, chart)


def _samples(summary: RunSummary) -> str:
    """Returns the sampled continuations, one block per prompt with the modes side by side."""
    prompts: dict[str, list[dict[str, str]]] = {}
    for sample in summary.samples:
        prompts.setdefault(sample["prompt"], []).append(sample)
    blocks = []
    for prompt, samples in prompts.items():
        texts = "".join(
            f'<div><span class="mode">{escape(s["mode"])} attention</span><pre><b>{escape(prompt)}</b>{escape(s["text"])}</pre></div>'
            for s in samples
        )
        blocks.append(f'<div class="sample"><div class="columns">{texts}</div></div>')
    weights = "the weights" + (f" of step {summary.samples_step:,}" if summary.samples_step is not None else "")
    text = f"Drawn from {weights} by ssa_pretrain.evaluate; the prompt is bold."
    return card("Continuations", text, "".join(blocks), wide=True)
