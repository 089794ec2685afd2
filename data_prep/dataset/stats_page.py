"""The page of a dataset: tiles, histograms and tables of the statistics that `data_prep.dataset.stats` collected."""

from collections.abc import Sequence
from html import escape
from typing import Any

from data_prep.readers import format_skipped
from ssa_pretrain.settings.quantities import compact
from ssa_pretrain.webpage.charts import colour_legend, histogram
from ssa_pretrain.webpage.layout import card, document, fact_table, grid, number_table, tiles

BINS_PER_OCTAVE = 4  # of document lengths, which are counted in bins of equal ratio
SOURCE_COLUMNS = (
    "name",
    "origin",
    "kind",
    "files",
    "documents",
    "text_bytes",
    "duplicates",
    "repeated",
    "repeated_bytes",
)


def page(stats: dict[str, Any]) -> str:
    """Returns the whole page as HTML.

    Args:
        stats: what `data_prep.dataset.stats.collect` returned.
    """
    lengths = {name: part["histogram"] for name, part in stats["splits"]["train"].items()}
    cards = [
        _histogram_card(
            "Documents by length",
            "Train split, one colour per part. Length is the number of tokens, EOS included.",
            lengths,
        ),
        _histogram_card(
            "Tokens by length of their document",
            "Where the tokens are: what a context of a given length can use.",
            {name: _by_tokens(counts) for name, counts in lengths.items()},
        ),
        _bytes_per_token_card(stats["bytes_per_token_histograms"]),
        card("Parts", "Epochs are passes over a part within the token budget.", _parts_table(stats), wide=True),
        card("Sources", "What each origin contributed.", _sources_table(stats["sources"]), wide=True),
        card("The plan of a full run", _plan_text(stats), _plan_table(stats["plan"]), wide=True),
    ]
    skipped = f" · left out by on_error=skip: {format_skipped(stats['skipped'])}" if stats["skipped"] else ""
    heading = f"<h1>{escape(stats['dataset'])}</h1><p>{escape('tokenizer ' + stats['tokenizer'] + skipped)}</p>"
    return document(f"{stats['dataset']}: data", heading + _tiles(stats) + grid(cards))


def _histogram_card(heading: str, text: str, series: dict[str, Sequence[float]]) -> str:
    """Returns a histogram over document lengths."""
    chart = histogram(series, _length_text, title=heading, every=BINS_PER_OCTAVE)
    return card(heading, text, colour_legend(series) + chart if chart else "<p>no documents</p>", wide=True)


def _bytes_per_token_card(series: dict[str, Sequence[float]]) -> str:
    """Returns the histogram of bytes per token, whose bins are tenths of a byte."""
    heading = "Bytes per token"
    chart = histogram(series, lambda i: f"{i / 10:.1f}", title=heading, every=10)
    text = "UTF-8 bytes of a document over its tokens. Low values mean code, tables or scripts that the tokenizer does not know."
    return card(heading, text, colour_legend(series) + chart if chart else "<p>no documents</p>", wide=True)


def _length_text(i: int) -> str:
    return f"{round(2 ** (i / BINS_PER_OCTAVE)):,}"


def _by_tokens(documents: Sequence[int]) -> list[float]:
    """Returns tokens instead of documents in each bin. A document counts with the middle of its bin as its length."""
    return [count * 2 ** ((i + 0.5) / BINS_PER_OCTAVE) for i, count in enumerate(documents)]


def _tiles(stats: dict[str, Any]) -> str:
    train, held_out = (stats["splits"][split] for split in ("train", "heldout"))
    return tiles(
        [
            (compact(sum(part["tokens"] for part in train.values())), "train tokens"),
            (compact(sum(part["tokens"] for part in held_out.values())), "held-out tokens"),
            (compact(stats["source_documents"]), "documents"),
            (f"{stats['bytes_per_token']:.2f}", "bytes per token"),
            (compact(stats["bytes_on_disk"]) + "B", "on disk"),
            *((f"{share:.1%}", f"fill as {name}") for name, share in stats["fill"].items()),
        ]
    )


def _parts_table(stats: dict[str, Any]) -> str:
    row = stats["key"]["sequence_length"]
    head = ("split", "part", "documents", "tokens", "mean", "longest", f"tokens in documents ≥ {row}", "epochs")
    rows = []
    for split, parts in stats["splits"].items():
        for name, part in parts.items():
            share = f"{part['tokens_in_those'] / max(1, part['tokens']):.0%}"
            epochs = f"{stats['budget']['epochs'].get(name, 0):,.2f}" if split == "train" else ""
            counts = (f"{part['documents']:,}", f"{part['tokens']:,}", f"{part['mean']:,.0f}", f"{part['longest']:,}")
            rows.append((split, name, *counts, share, epochs))
    return number_table(head, rows, labels=2)


def _sources_table(sources: list[dict[str, Any]]) -> str:
    head = [key for key in SOURCE_COLUMNS if any(key in source for source in sources)]
    rows = [[_text(source.get(key, "")) for key in head] for source in sources]
    return number_table(head, rows, labels=sum(key in ("name", "origin", "kind") for key in head))


def _plan_text(stats: dict[str, Any]) -> str:
    return f"What {compact(stats['budget']['tokens'])} tokens of such text take, at the rate measured while this dataset was built."


def _plan_table(plan: dict[str, Any]) -> str:
    facts = [
        (key.replace("_", " "), _text(value)) for key, value in plan.items() if key != "hours" and value is not None
    ]
    facts += [(f"hours on {nodes} nodes", f"{hours:.2f}") for nodes, hours in plan["hours"].items()]
    return fact_table(facts)


def _text(value: object) -> str:
    return f"{value:,}" if isinstance(value, int | float) else str(value)
