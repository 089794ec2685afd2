"""The statistics page of a dataset: one HTML file that contains its style sheet and histograms, in light or dark mode like the reader's system.

These are pure functions of the statistics from data_prep/dataset/stats.py. The page loads nothing and runs no script. Every text from a
dataset is escaped. Each bar shows its values on hover.
"""

from collections.abc import Sequence
from html import escape
from typing import Any

from data_prep.readers import format_skipped

STYLE = """
:root{color-scheme:light dark;--page:#f9f9f7;--card:#fff;--ink:#16181d;--soft:#5b6069;--rule:#e4e4df;
--a:#2463c4;--b:#c2571a;--c:#13806b;--d:#8a4fbf;--e:#a8820c;--f:#6b7280}
@media(prefers-color-scheme:dark){:root{--page:#14161a;--card:#1c1f25;--ink:#eceef2;--soft:#a2a8b4;--rule:#31353d;
--a:#6ea8ff;--b:#f0935a;--c:#4fc3a8;--d:#c39bf0;--e:#e0bd55;--f:#9aa1ad}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:30px;line-height:1.2;margin:0 0 4px}
h2{font-size:19px;margin:0 0 2px}
p{margin:0 0 12px;color:var(--soft);max-width:92ch}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:14px;margin:26px 0}
.tile,.card{background:var(--card);border:1px solid var(--rule);border-radius:10px}
.tile{padding:14px 16px}
.tile b{display:block;font-size:25px;line-height:1.25;font-weight:600;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:14px}
.card{padding:18px 20px 14px;margin:0 0 14px;overflow-x:auto}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:12.5px;font-variant-numeric:tabular-nums}
svg .rule{stroke:var(--rule)}
.a{fill:var(--a)}.b{fill:var(--b)}.c{fill:var(--c)}.d{fill:var(--d)}.e{fill:var(--e)}.f{fill:var(--f)}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:14px;color:var(--soft);margin:0 0 6px}
.key{display:inline-flex;align-items:center;gap:7px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:6px 12px 6px 0;border-bottom:1px solid var(--rule);font-weight:400}
th:first-child,td:first-child,th:nth-child(2),td:nth-child(2){text-align:left}
th{color:var(--soft)}
tr:last-child>*{border-bottom:0}
"""

COLOURS = "abcdef"
WIDE, HIGH, LEFT, BOTTOM = 1060, 240, 64, 26


def page(stats: dict[str, Any]) -> str:
    """Returns the whole page as HTML.

    Args:
        stats: the result of `data_prep.dataset.stats.collect`.
    """
    train = stats["splits"]["train"]
    body = [
        f"<h1>{escape(stats['dataset'])}</h1>",
        f"<p>tokenizer {escape(stats['tokenizer'])}{_left_out(stats['skipped'])}</p>",
        _tiles(stats),
        _card("Documents by length", "Train split, one colour per part; tokens per document, EOS included.")(
            histogram({name: own["histogram"] for name, own in train.items()}, _length_label, every=4)
        ),
        _card("Tokens by length of their document", "Where the tokens are: which context lengths they can use.")(
            histogram({name: _by_tokens(own["histogram"]) for name, own in train.items()}, _length_label, every=4)
        ),
        _card(
            "Bytes per token",
            "UTF-8 bytes of a document over its tokens; low values mean code, tables or foreign scripts.",
        )(histogram(stats["bytes_per_token_histograms"], lambda i: f"{i / 10:.1f}", every=10)),
        _card("Parts", "Epochs are how often the token budget reads a part.")(_parts_table(stats)),
        _card("Sources", "What each origin contributed.")(_sources_table(stats["sources"])),
        _card("A full-size dataset", _plan_text(stats))(_plan_table(stats["plan"])),
    ]
    title = escape(stats["dataset"])
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}: data</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _left_out(skipped: dict[str, int]) -> str:
    return f" · left out by on_error=skip: {escape(format_skipped(skipped))}" if skipped else ""


def histogram(series: dict[str, Sequence[float]], label, *, every: int) -> str:
    """Returns stacked bars over common bins as SVG, with a legend.

    Args:
        series: for each name, the height of each bin.
        label: returns the text of a bin's lower border.
        every: bins between two axis marks.
    """
    bins = max((len(values) for values in series.values()), default=0)
    totals = [sum(values[i] for values in series.values()) for i in range(bins)]
    filled = [i for i, total in enumerate(totals) if total]
    if not filled:
        return "<p>no documents</p>"
    first, last, top = filled[0], filled[-1] + 1, max(totals)
    step = (WIDE - LEFT) / (last - first)
    parts = [
        f'<path class="rule" d="M{LEFT} {_y(share, 1):.1f}H{WIDE}"/><text x="{LEFT - 8}" y="{_y(share, 1) + 4:.1f}" '
        f'text-anchor="end">{compact(share * top)}</text>'
        for share in (0, 0.5, 1)
    ]
    for i in range(first, last):
        x, below = LEFT + (i - first) * step, 0.0
        for colour, (name, values) in zip(_cycle(len(series)), series.items(), strict=True):
            if values[i]:
                high, low = _y(below + values[i], top), _y(below, top)
                parts.append(
                    f'<rect class="{colour}" x="{x:.1f}" y="{high:.2f}" width="{max(1, step - 1):.1f}" '
                    f'height="{low - high:.2f}"><title>{escape(name)}, {escape(label(i))} to {escape(label(i + 1))}: '
                    f"{values[i]:,.0f}</title></rect>"
                )
                below += values[i]
        if i % every == 0:
            parts.append(f'<text x="{x:.1f}" y="{HIGH - 6}" text-anchor="middle">{escape(label(i))}</text>')
    legend = "".join(
        f'<span class="key"><svg width="12" height="12" viewBox="0 0 12 12" style="width:12px" aria-hidden="true">'
        f'<rect class="{colour}" width="12" height="12" rx="3"/></svg>{escape(name)}</span>'
        for colour, name in zip(_cycle(len(series)), series, strict=True)
    )
    return f'<div class="legend">{legend}</div><svg viewBox="0 0 {WIDE} {HIGH}" role="img">{"".join(parts)}</svg>'


def compact(value: float) -> str:
    """Returns a number with at most three digits: 1.5 M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g}"


def _y(value: float, top: float) -> float:
    return HIGH - BOTTOM - value / top * (HIGH - BOTTOM - 12)


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _length_label(i: int) -> str:
    return f"{round(2 ** (i / 4)):,}"


def _by_tokens(histogram_: Sequence[int]) -> list[float]:
    """Returns the tokens of each bin, assuming that each document has the length at the middle of its bin."""
    return [count * 2 ** ((i + 0.5) / 4) for i, count in enumerate(histogram_)]


def _card(title: str, text: str):
    return lambda content: f'<div class="card"><h2>{escape(title)}</h2><p>{escape(text)}</p>{content}</div>'


def _tiles(stats: dict[str, Any]) -> str:
    train, held = (stats["splits"][split] for split in ("train", "heldout"))
    tiles = [
        (compact(sum(own["tokens"] for own in train.values())), "train tokens"),
        (compact(sum(own["tokens"] for own in held.values())), "held-out tokens"),
        (compact(stats["source_documents"]), "documents"),
        (f"{stats['bytes_per_token']:.2f}", "bytes per token"),
        (compact(stats["bytes_on_disk"]) + "B", "on disk"),
        *((f"{100 * share:.1f} %", f"fill as {name}") for name, share in stats["fill"].items()),
    ]
    inner = "".join(f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in tiles)
    return f'<div class="tiles">{inner}</div>'


def _parts_table(stats: dict[str, Any]) -> str:
    row = stats["key"]["sequence_length"]
    head = ("split", "part", "documents", "tokens", "mean", "longest", f"tokens in documents ≥ {row}", "epochs")
    rows = []
    for split, parts in stats["splits"].items():
        for name, own in parts.items():
            share = f"{100 * own['tokens_in_those'] / max(1, own['tokens']):.0f} %"
            epochs = f"{stats['budget']['epochs'].get(name, 0):,.2f}" if split == "train" else ""
            counts = (f"{own['documents']:,}", f"{own['tokens']:,}", f"{own['mean']:,.0f}", f"{own['longest']:,}")
            rows.append((split, name, *counts, share, epochs))
    return _table(head, rows)


def _sources_table(sources: list[dict[str, Any]]) -> str:
    known = ("name", "origin", "kind", "files", "documents", "text_bytes", "duplicates")
    head = [key for key in known if any(key in source for source in sources)]
    rows = [[_cell(source.get(key, "")) for key in head] for source in sources]
    return _table(head, rows)


def _plan_text(stats: dict[str, Any]) -> str:
    return f"What {compact(stats['budget']['tokens'])} tokens of such text need, at the rate measured for this dataset."


def _plan_table(plan: dict[str, Any]) -> str:
    rows = [
        (key.replace("_", " "), _cell(value)) for key, value in plan.items() if key != "hours" and value is not None
    ]
    rows += [(f"hours on {nodes} nodes", f"{hours:.2f}") for nodes, hours in plan["hours"].items()]
    return _table(("what", "how much"), rows)


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line('th', head)}{''.join(line('td', row) for row in rows)}</table>"
