"""The picture of a report: its panels in two columns at most, a curve per setting with a band of one standard error, and the parts of benchmarks as bars.

Drawn with matplotlib's own canvas, without its global state. A panel without curves is left out.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssa_pretrain.experiments.sizes import METHODS

SIZE = (5.4, 3.8)  # inches of a panel
FEW_POINTS = 24  # a curve of so few is drawn with marks


def draw(content: Mapping[str, Any], path: Path) -> bool:
    """Writes the picture of a report's content; returns whether there was anything to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = [panel for panel in content["panels"] if panel["curves"]]
    bars = [bench for bench in content["benches"] if any(row["parts"] for row in bench["rows"])]
    count = len(curves) + len(bars)
    if not count:
        return False
    columns = min(2, count) if curves else 1
    rows = -(-count // columns)
    width = SIZE[0] * columns if curves else 2 * SIZE[0]
    figure = Figure(figsize=(width, SIZE[1] * rows), layout="constrained")
    figure.suptitle(content["title"], fontsize=11)
    cells = figure.add_gridspec(rows, columns)
    settings = list(dict.fromkeys([*METHODS, *(name for panel in curves for name in panel["curves"])]))
    for number, item in enumerate([*curves, *bars]):
        axes = figure.add_subplot(cells[number // columns, number % columns])
        if "curves" in item:
            _curves(axes, item, settings)
        else:
            _parts(axes, item)
    FigureCanvasAgg(figure).print_png(path)
    return True


def _curves(axes: Any, panel: Mapping[str, Any], settings: list[str]) -> None:
    """Draws a chart; a setting has the same colour in all charts, and a method in all pictures."""
    from matplotlib.ticker import EngFormatter

    for name, points in panel["curves"].items():
        x, mean, error = (list(values) for values in zip(*points, strict=True))
        colour = f"C{settings.index(name) % 10}"
        style = "-" if settings.index(name) < 10 else "--"
        marker = "o" if len(points) <= FEW_POINTS else None
        axes.plot(x, mean, style, color=colour, label=name, marker=marker, markersize=3)
        low, high = ([m + sign * e for m, e in zip(mean, error, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    if panel["log_x"]:
        axes.set_xscale("log", base=2)
    if panel["log_y"]:
        axes.set_yscale("log")
    if panel["x_name"] == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if panel["x_name"] == "layer":
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(panel["title"], fontsize=10)
    axes.set_xlabel(panel["x_name"])
    axes.set_ylabel(panel["y_name"])
    axes.legend(fontsize=7)


def _parts(axes: Any, bench: Mapping[str, Any]) -> None:
    """Draws a stacked bar per variant, the first at the top."""
    rows = bench["rows"]
    parts = list(dict.fromkeys(part for row in rows for part in row["parts"]))
    left = [0.0] * len(rows)
    places = [len(rows) - 1 - i for i in range(len(rows))]
    for number, part in enumerate(parts):
        widths = [row["parts"].get(part, 0.0) for row in rows]
        colour, hatch = f"C{number % 10}", "" if number < 10 else "//"
        axes.barh(places, widths, left=left, label=part, color=colour, hatch=hatch, edgecolor="white", linewidth=0.3)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(places, [row["variant"] for row in rows], fontsize=7)
    axes.set_xlabel("ms on the device")
    axes.set_title(f"Benchmark {bench['name']}", fontsize=10)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
