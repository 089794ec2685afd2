"""The HTML shell that every page of this project shares: one file with its style sheet and its charts inside.

A page loads nothing and runs no script. Texts are escaped here; only arguments called `content` are HTML.
"""

from collections.abc import Sequence
from html import escape
from importlib.resources import files


def document(title: str, content: str) -> str:
    """Returns a whole page.

    Args:
        title: shown in the browser's tab.
        content: HTML of the page's body.
    """
    style = files("ssa_pretrain.webpage").joinpath("style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>\n{style}</style></head><body><main>{content}</main></body></html>\n"
    )


def card(heading: str, text: str, content: str, *, wide: bool = False) -> str:
    """Returns a section; empty if its content is.

    Args:
        heading: its title.
        text: a sentence that explains it; may be empty.
        content: HTML.
        wide: takes both columns of the grid.
    """
    if not content:
        return ""
    note = f"<p>{escape(text)}</p>" if text else ""
    return f'<section class="card{" wide" if wide else ""}"><h2>{escape(heading)}</h2>{note}{content}</section>'


def grid(cards: Sequence[str]) -> str:
    """Returns cards in two columns."""
    return f'<div class="grid">{"".join(cards)}</div>'


def tiles(values: Sequence[tuple[str, str]]) -> str:
    """Returns the numbers that a reader looks for first, each a value over its name."""
    inner = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in values
    )
    return f'<div class="tiles">{inner}</div>'


def number_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, labels: int = 1) -> str:
    """Returns a table of numbers.

    Args:
        head: names of the columns.
        rows: cells as text, in the order of the columns.
        labels: leading columns that hold text; numbers stand to the right, text to the left.
    """

    def line(tag: str, cells: Sequence[str]) -> str:
        opened = [f'<{tag} class="label">' if i < labels else f"<{tag}>" for i in range(len(cells))]
        return (
            "<tr>"
            + "".join(f"{tag_}{escape(cell)}</{tag}>" for tag_, cell in zip(opened, cells, strict=True))
            + "</tr>"
        )

    return f'<table class="numbers">{line("th", head)}{"".join(line("td", row) for row in rows)}</table>'


def fact_table(facts: Sequence[tuple[str, str]]) -> str:
    """Returns a table of names and values."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts)
    return f"<table>{rows}</table>"
