"""An evaluation's results as one PNG: cross entropy by context position, captured mass and entropy by layer and head, needles found.

Drawn with matplotlib's own canvas, without its global state. A panel that has no values is left out.
"""

from pathlib import Path
from typing import Any

from ssa_pretrain.evaluation import MODES

SIZE = (5.2, 3.8)  # inches of a panel


def plot(result: dict[str, Any], path: Path) -> None:
    """Writes the figure of a result, as results.py writes it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(result)
    rows = 1 + -(-len(panels) // 2)
    figure = Figure(figsize=(2 * SIZE[0], SIZE[1] * rows), layout="constrained")
    figure.suptitle(result["name"], fontsize=9)
    cells = figure.add_gridspec(rows, 2)
    _by_position(figure.add_subplot(cells[0, :]), result)
    for number, (draw, *values) in enumerate(panels):
        draw(figure, figure.add_subplot(cells[1 + number // 2, number % 2]), *values)
    FigureCanvasAgg(figure).print_png(path)


def buckets(metrics: dict[str, Any]) -> list[tuple[int, float]]:
    """Returns (last position of a bucket, mean cross entropy) of the buckets that have labels; positions count from 1."""
    sums, labels = metrics["cross_entropy_by_position"], metrics["labels_by_position"]
    return [(2**i, total / count) for i, (total, count) in enumerate(zip(sums, labels, strict=True)) if count]


def _panels(result: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Returns the panels that have values, those of the two modes side by side: a function, and what it draws."""
    panels: list[tuple[Any, ...]] = []
    for name, title, top in (
        ("captured_mass_by_head", "captured mass", 1.0),
        ("entropy_by_head", "entropy (nats)", None),
    ):
        panels += [
            (_by_head, values[name], f"{title}, {mode}", top) for mode, values in result["heads"].items() if values
        ]
    for task, by_mode in result["tasks"].items():
        for mode, values in by_mode.items():
            if cells := values["details"].get("cells"):
                panels.append((_needles, cells, f"{task}, {mode}"))
    return panels


def _by_position(axes: Any, result: dict[str, Any]) -> None:
    for mode in MODES:
        points = buckets(result["modes"][mode])
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=mode)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("position in the document, up to")
    axes.set_ylabel("cross entropy (nats)")
    axes.legend()


def _by_head(figure: Any, axes: Any, values: list[list[float]], title: str, top: float | None) -> None:
    image = axes.imshow(values, aspect="auto", vmin=0.0, vmax=top, origin="lower", interpolation="nearest")
    figure.colorbar(image, ax=axes)
    axes.locator_params(integer=True)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")


def _needles(figure: Any, axes: Any, cells: list[dict[str, Any]], title: str) -> None:
    lengths = list(dict.fromkeys(cell["length"] for cell in cells))
    depths = list(dict.fromkeys(cell["depth"] for cell in cells))
    found = {(cell["length"], cell["depth"]): cell["accuracy"] for cell in cells}
    grid = [[found[length, depth] for length in lengths] for depth in depths]
    image = axes.imshow(grid, aspect="auto", vmin=0.0, vmax=1.0, interpolation="nearest", cmap="RdYlGn")
    figure.colorbar(image, ax=axes)
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:g}%" for depth in depths])
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("tokens")
    axes.set_ylabel("depth")
