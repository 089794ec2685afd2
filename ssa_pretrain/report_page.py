"""The report's page: one HTML file with its style sheet and its charts inside, light or dark as the reader's system is.

`page` lays out what report.py read. Every text from a file is escaped: prompts and continuations are whatever a model wrote. Nothing is
loaded from anywhere and no script runs.
"""

from html import escape
from typing import TYPE_CHECKING

from ssa_pretrain.charts import WIDE, Line, heat_map, legend, line_chart, smooth
from ssa_pretrain.log import compact, duration
from ssa_pretrain.metrics import perplexity

if TYPE_CHECKING:
    from ssa_pretrain.report import Figures

STYLE = """
:root{color-scheme:light dark;--page:#f9f9f7;--card:#fff;--ink:#16181d;--soft:#5b6069;--rule:#e4e4df;
--a:#2463c4;--b:#c2571a;--c:#6b7280;--d:#13806b}
@media(prefers-color-scheme:dark){:root{--page:#14161a;--card:#1c1f25;--ink:#eceef2;--soft:#a2a8b4;--rule:#31353d;
--a:#6ea8ff;--b:#f0935a;--c:#9aa1ad;--d:#4fc3a8}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:30px;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em}
h2{font-size:19px;margin:0 0 2px}
p{margin:0 0 12px;color:var(--soft);max-width:92ch}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:14px;margin:26px 0}
.tile,.card{background:var(--card);border:1px solid var(--rule);border-radius:10px}
.tile{padding:14px 16px}
.tile b{display:block;font-size:27px;line-height:1.25;font-weight:600;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:14px}
.grid{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:14px}
.card{padding:18px 20px 14px;min-width:0}
.wide{grid-column:1/-1}
@media(max-width:820px){.grid{grid-template-columns:minmax(0,1fr)}}
.chart{display:block;width:100%;height:auto}
.chart path,.key path{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.chart .rule{stroke:var(--rule);stroke-width:1}
.chart text{fill:var(--soft);font-size:12.5px;font-variant-numeric:tabular-nums}
.chart .value{fill:var(--ink)}
.chart .cell{fill:var(--a);shape-rendering:crispEdges}
.chart .target{fill:transparent;stroke:none}
.chart .target:hover{fill:var(--soft);fill-opacity:.35}
.chart .faint{stroke-width:1;opacity:.35}
.dashed{stroke-dasharray:5 5}
path.a{stroke:var(--a)}path.b{stroke:var(--b)}path.c{stroke:var(--c)}path.d{stroke:var(--d)}
circle.a{fill:var(--a)}circle.b{fill:var(--b)}circle.d{fill:var(--d)}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:14px;color:var(--soft);margin:0 0 6px}
.key{display:inline-flex;align-items:center;gap:7px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:6px 12px 6px 0;border-bottom:1px solid var(--rule);vertical-align:top;font-weight:400}
th{color:var(--soft);white-space:nowrap}
tr:last-child>*{border-bottom:0}
.num td,.num th{text-align:right}.num td:first-child,.num th:first-child{text-align:left}
.sample{border-top:1px solid var(--rule);padding:12px 0}
.sample:first-of-type{border-top:0}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:6px 24px}
.mode{font-size:13px;color:var(--soft)}
pre{margin:2px 0 8px;white-space:pre-wrap;overflow-wrap:anywhere;font:14px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre b{font-weight:650}
"""


def page(figures: "Figures") -> str:
    """The whole page as HTML.

    Args:
        figures: what report.read_figures returned.
    """
    cards = [
        _loss(figures),
        _held_out(figures),
        _mass(figures),
        _alignment(figures),
        _small(figures, "grad_norm", "Gradient norm", "Global norm before clipping.", "norm", log=True),
        _small(figures, "learning_rate", "Learning rate", "Of every step.", "rate"),
        _small(
            figures,
            "tokens_per_second",
            "Speed",
            "Over the last 20 steps, evaluations and checkpoints apart.",
            "tokens/s",
        ),
        _samples(figures),
        _run(figures),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(figures.name)}: report</title><style>{STYLE}</style></head><body><main>"
        f"<h1>{escape(figures.name)}</h1>{_lead(figures)}{_tiles(figures)}"
        f'<div class="grid">{"".join(cards)}</div></main></body></html>\n'
    )


def _card(heading: str, words: str, body: str, wide: bool = False) -> str:
    """A section with a heading, a sentence that explains it, and its content; nothing if the content is empty."""
    if not body:
        return ""
    note = f"<p>{words}</p>" if words else ""
    return f'<section class="card{" wide" if wide else ""}"><h2>{heading}</h2>{note}{body}</section>'


def _lead(figures: "Figures") -> str:
    """One sentence on what ran."""
    if not figures.steps:
        return "<p>No training step is recorded yet.</p>"
    last, method = figures.steps[-1], figures.config.get("attention", {}).get("method", "")
    named = {"ssa": "SSA (Sparse Sparse Attention)", "full": "full attention", "moba": "MoBA"}.get(method, "attention")
    model = figures.config.get("model", {}).get("name", "model")
    return (
        f"<p>A {escape(str(model))} Llama with {named}, trained for {last['step']:,} steps on {compact(last['tokens'])} tokens"
        f" in {duration(figures.seconds)}.</p>"
    )


def _tiles(figures: "Figures") -> str:
    """The figures that one looks for first."""
    tiles = [
        (f"{figures.final[mode]['perplexity']:.1f}", f"held-out perplexity, {mode} attention")
        for mode in figures.final
        if figures.final[mode].get("perplexity") is not None
    ]
    if figures.unigram:
        tiles.append((f"{perplexity(figures.unigram):,.0f}", "perplexity of token frequencies alone"))
    mass = figures.series("captured_mass")
    if mass:
        tiles.append((f"{mass[-1][1]:.1%}", "attention mass inside the chosen blocks, last step"))
    if figures.tokens_per_second:
        tiles.append((compact(figures.tokens_per_second), "tokens a second"))
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{b}</b><span>{escape(s)}</span></div>' for b, s in tiles)
        + "</div>"
    )


def _loss(figures: "Figures") -> str:
    """Cross entropy of training and of held-out text in both modes, and what frequencies alone would reach."""
    steps = figures.series("cross_entropy")
    colours = {"full": "a", "sparse": "b"}
    lines = [Line("training", steps, "c", faint=True), Line("training (smoothed)", smooth(steps), "c")]
    for mode, records in figures.evaluations.items():
        points = [(r["tokens"], r["cross_entropy"]) for r in records if r["cross_entropy"] is not None]
        lines.append(Line(f"held-out, {mode}", points, colours.get(mode, "d"), marks=5.5 if mode == "full" else 3))
    ends = [x for line in lines if line.points for x in (line.points[0][0], line.points[-1][0])]
    if figures.unigram and ends:
        level = [(min(ends), figures.unigram), (max(ends), figures.unigram)]
        lines.append(Line("unigram entropy", level, "d", dashed=True))
    chart = line_chart(lines, title="Cross entropy over training", y_name="nats a token", width=WIDE, height=360)
    words = "Nats a token. Below the dashed line the model knows more than how frequent each token is."
    return _card("Cross entropy", words, chart and legend(lines) + chart, wide=True)


def _held_out(figures: "Figures") -> str:
    """The table of final figures by mode."""
    if not figures.final:
        return ""
    head = "".join(f"<th>{escape(mode)}</th>" for mode in figures.final) + (
        "<th>unigram</th>" if figures.unigram else ""
    )
    unigram = {"cross_entropy": figures.unigram, "perplexity": perplexity(figures.unigram) if figures.unigram else None}
    rows = []
    for key, name, form in (
        ("cross_entropy", "cross entropy", ".3f"),
        ("perplexity", "perplexity", ".1f"),
        ("captured_mass", "captured mass", ".3f"),
    ):
        values = [figures.final[mode].get(key) for mode in figures.final] + (
            [unigram.get(key)] if figures.unigram else []
        )
        if any(value is not None for value in values):
            cells = "".join("<td></td>" if value is None else f"<td>{value:{form}}</td>" for value in values)
            rows.append(f"<tr><td>{name}</td>{cells}</tr>")
    body = f'<table class="num"><tr><th></th>{head}</tr>{"".join(rows)}</table>'
    words = f"One set of weights, read with each kind of attention. {escape(figures.evaluation())}."
    return _card("Full and sparse attention on held-out text", words, body)


def _mass(figures: "Figures") -> str:
    """Captured mass by layer over training."""
    rows = figures.layers("captured_mass_by_layer")
    values = [value for row in rows for _, value in row]
    if not values:
        return ""
    low = min(0.9, min(values) // 0.05 * 0.05)
    words = (
        f"The share of full attention that falls inside the blocks which sparse attention chooses, by layer; the colour runs from {low:.2f}"
        " (faint) to 1 (strong). At 1 nothing is lost by reading only those blocks."
    )
    chart = heat_map(rows, title="Captured attention mass by layer over training", low=low)
    return _card("Captured attention mass", words, chart)


def _alignment(figures: "Figures") -> str:
    """Alignment loss over training."""
    steps = figures.series("alignment_loss")
    lines = [Line("every step", steps, "d", faint=True), Line("alignment loss", smooth(steps), "d")]
    chart = line_chart(lines, title="Alignment loss over training", y_name="loss", log=True, y_text="{:g}".format)
    return _card("Alignment loss", "How far each layer's full and sparse outputs are apart, before its weight.", chart)


def _small(figures: "Figures", key: str, heading: str, words: str, unit: str, log: bool = False) -> str:
    """A chart of one number."""
    form = compact if key == "tokens_per_second" else "{:g}".format
    chart = line_chart([Line(heading, figures.series(key), "a")], title=heading, y_name=unit, log=log, y_text=form)
    return _card(heading, words, chart)


def _samples(figures: "Figures") -> str:
    """Continuations, each prompt once with every mode beside it."""
    prompts: dict[str, list[dict[str, str]]] = {}
    for sample in figures.samples:
        prompts.setdefault(sample["prompt"], []).append(sample)
    blocks = []
    for prompt, samples in prompts.items():
        texts = "".join(
            f'<div><span class="mode">{escape(s["mode"])} attention</span><pre><b>{escape(prompt)}</b>{escape(s["text"])}</pre></div>'
            for s in samples
        )
        blocks.append(f'<div class="sample"><div class="two">{texts}</div></div>')
    words = "Drawn from the weights" + (f" of step {figures.sampled:,}" if figures.sampled is not None else "")
    words += " by ssa_pretrain.evaluate; the prompt is bold."
    return _card("Continuations", words, "".join(blocks), wide=True)


def _run(figures: "Figures") -> str:
    """The table of facts."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in figures.facts())
    return _card("The run", "", f"<table>{rows}</table>", wide=True)
