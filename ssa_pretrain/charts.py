"""Charts as SVG text: lines over a common x axis, and a heat map. Pure functions of numbers, no plotting library.

Colours are classes, not values: the page's style sheet gives them, once for light and once for dark. Each point within reach of a pointer
carries a `<title>` with its values, which browsers show on hover. Axis ticks fall on 1, 2, 2.5 or 5 times a power of ten.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

from ssa_pretrain.log import compact

WIDE, HALF = 1060, 500  # pixels that a drawing has on the page, so that its letters come out as large as the text
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 26, 28
MAX_POINTS = 400

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart.

    Attributes:
        name: what the legend calls it.
        points: (x, y) in increasing x.
        style: CSS class of its colour.
        faint: drawn thin and without a name, as the background of a smoothed line.
        marks: radius of a dot at every point, for lines of few points; 0: none. Of two lines that coincide, the lower one shows as a ring.
        dashed: broken, for a line that something is compared with.
    """

    name: str
    points: Points
    style: str
    faint: bool = False
    marks: float = 0.0
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear or logarithmic scale from values to pixels.

    Attributes:
        low, high: values at the ends.
        start, end: pixels at the ends.
        log: decades instead of differences.
        ticks: values that get a mark.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    ticks: list[float] = field(default_factory=list)

    def at(self, value: float) -> float:
        """The pixel of a value."""
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        value = math.log10(max(value, self.low)) if self.log else value
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values from at most `low` to at least `high`."""
    if high <= low:
        high = low + (abs(low) or 1.0) * 0.1
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    unit = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / unit + 1e-9), math.ceil(high / unit - 1e-9)
    return [round(i * unit, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that enclose the values; with 2 and 5 between them where there are few."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    steps = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [step * 10.0**power for power in range(first, last) for step in steps] + [10.0**last]
    start = max(i for i, tick in enumerate(ticks) if tick <= low * (1 + 1e-9))
    end = min(i for i, tick in enumerate(ticks) if tick >= high * (1 - 1e-9))
    return ticks[start : max(end, start + 1) + 1]


def smooth(points: Points, share: float = 0.05) -> list[tuple[float, float]]:
    """Means over a window around each point that shrinks towards both ends, so that a falling line is not drawn late.

    Args:
        points: (x, y) in increasing x.
        share: the window, as a part of all points.
    """
    half, sums = max(1, round(len(points) * share / 2)), [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    out = []
    for i, (x, _) in enumerate(points):
        reach = min(half, i, len(points) - 1 - i)
        out.append((x, (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)))
    return out


def thin(points: Points, most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `most` + 1 of the points, evenly, the last one always."""
    step = max(1, math.ceil(len(points) / most))
    kept = list(points[::step])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    y_name: str,
    x_name: str = "tokens",
    log: bool = False,
    y_text: Callable[[float], str] = "{:.3g}".format,
    width: int = HALF,
    height: int = 250,
) -> str:
    """An SVG of lines over a common x axis, without a legend (`legend` makes it).

    Args:
        lines: drawn in order; those without points are left out.
        title: what a screen reader says.
        y_name: unit of the y axis, written at its top.
        x_name: unit of the x axis.
        log: logarithmic y axis; values at or below zero are left out.
        y_text: how a y value is written.
        width, height: of the drawing, pixels.
    """
    drawn = [(line, [p for p in thin(line.points) if not log or p[1] > 0]) for line in lines]
    drawn = [(line, points) for line, points in drawn if points]
    if not drawn:
        return ""
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points]
    ticks = log_ticks(min(ys), max(ys)) if log else nice_ticks(min(ys), max(ys))
    y = Axis(ticks[0], ticks[-1], height - BOTTOM, TOP, log, ticks)
    low, high = min(xs), max(max(xs), min(xs) + 1)
    x = Axis(low, high, LEFT, width - RIGHT, ticks=[t for t in nice_ticks(low, high, width // 90) if low <= t <= high])
    body = [_grid(x, y, y_text, x_name, y_name)]
    body += [_line(line, points, x, y) for line, points in drawn]
    body += [_targets(line, points, x, y, y_text, x_name) for line, points in drawn if not line.faint]
    return _svg(title, width, height, body)


def heat_map(
    rows: Sequence[Points],
    *,
    title: str,
    low: float = 0.0,
    high: float = 1.0,
    x_name: str = "tokens",
    row_name: str = "layer",
    width: int = HALF,
    columns: int = 60,
) -> str:
    """An SVG with one band a row, time to the right, the value as the strength of one colour, the last value in figures.

    Args:
        rows: for each row (x, value); all over the same x range.
        title: what a screen reader says.
        low, high: values of the weakest and the strongest colour.
        x_name: unit of the x axis.
        row_name: what a row is.
        width: of the drawing, pixels.
        columns: cells a row; a cell is the mean of the values in it.
    """
    rows = [row for row in rows if row]
    if not rows:
        return ""
    band = max(12.0, min(30.0, 260 / len(rows)))
    height = round(TOP + BOTTOM + band * len(rows))
    first, last = min(row[0][0] for row in rows), max(row[-1][0] for row in rows)
    last = max(last, first + 1)
    x = Axis(
        first, last, LEFT, width - 52, ticks=[t for t in nice_ticks(first, last, width // 90) if first <= t <= last]
    )
    body, cell = [], (x.end - x.start) / columns
    for index, row in enumerate(rows):
        top = TOP + band * index
        middle = top + band / 2 + 4
        body.append(f'<text class="tick" x="{LEFT - 8}" y="{middle:.1f}" text-anchor="end">{index}</text>')
        for column, value in enumerate(_cells(row, first, last, columns)):
            strength = min(1.0, max(0.0, (value - low) / (high - low)))
            body.append(
                f'<rect class="cell" x="{x.start + column * cell:.1f}" y="{top:.1f}" width="{cell:.1f}" height="{band - 2:.1f}"'
                f' fill-opacity="{0.06 + 0.94 * strength:.2f}"><title>{escape(row_name)} {index}: {value:.3f}</title></rect>'
            )
        body.append(f'<text class="value" x="{x.end + 8}" y="{middle:.1f}">{row[-1][1]:.3f}</text>')
    bottom = height - BOTTOM + 2
    body += [_x_tick(x, tick, bottom) for tick in x.ticks if x.at(tick) < width - 90]
    body.append(f'<text class="unit" x="{width}" y="{bottom + 18:.0f}" text-anchor="end">{escape(x_name)}</text>')
    body.append(f'<text class="unit" x="{LEFT - 8}" y="12" text-anchor="end">{escape(row_name)}</text>')
    return _svg(title, width, height, body)


def legend(lines: Sequence[Line]) -> str:
    """The names of a chart's lines beside a stroke of their colour, as HTML."""
    items = [
        f'<span class="key"><svg width="22" height="10" aria-hidden="true"><path class="{line.style}'
        f'{" dashed" if line.dashed else ""}" d="M0 5H22"/></svg>{escape(line.name)}</span>'
        for line in lines
        if line.points and not line.faint
    ]
    return f'<div class="legend">{"".join(items)}</div>' if items else ""


def _svg(title: str, width: int, height: int, body: Sequence[str]) -> str:
    """A drawing that scales with the page's width."""
    inner = "".join(body)
    return f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{inner}</svg>'


def _grid(x: Axis, y: Axis, y_text: Callable[[float], str], x_name: str, y_name: str) -> str:
    """Horizontal rules, ticks of both axes, units."""
    parts = []
    for tick in y.ticks:
        at = y.at(tick)
        parts.append(f'<path class="rule" d="M{LEFT} {at:.1f}H{x.end}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{escape(y_text(tick))}</text>'
        )
    parts += [_x_tick(x, tick, y.start) for tick in x.ticks if x.at(tick) < x.end - 60]
    parts.append(f'<text class="unit" x="0" y="12">{escape(y_name)}</text>')
    parts.append(f'<text class="unit" x="{x.end}" y="{y.start + 18:.0f}" text-anchor="end">{escape(x_name)}</text>')
    return "".join(parts)


def _x_tick(x: Axis, tick: float, bottom: float) -> str:
    """A mark under the x axis."""
    at = x.at(tick)
    anchor = "start" if at < x.start + 4 else "middle"
    return f'<text class="tick" x="{at:.1f}" y="{bottom + 18:.0f}" text-anchor="{anchor}">{compact(tick)}</text>'


def _line(line: Line, points: Points, x: Axis, y: Axis) -> str:
    """The stroke of a line, and its dots if it has few points."""
    path = "L".join(f"{x.at(a):.1f} {y.at(b):.1f}" for a, b in points)
    style = line.style + (" faint" if line.faint else "") + (" dashed" if line.dashed else "")
    dots = (
        [f'<circle class="{line.style}" cx="{x.at(a):.1f}" cy="{y.at(b):.1f}" r="{line.marks}"/>' for a, b in points]
        if line.marks
        else []
    )
    return f'<path class="{style}" d="M{path}"/>' + "".join(dots)


def _targets(line: Line, points: Points, x: Axis, y: Axis, y_text: Callable[[float], str], x_name: str) -> str:
    """Invisible discs that show a point's values on hover."""
    return "".join(
        f'<circle class="target" cx="{x.at(a):.1f}" cy="{y.at(b):.1f}" r="7">'
        f"<title>{escape(line.name)}: {escape(y_text(b))} at {compact(a)} {escape(x_name)}</title></circle>"
        for a, b in thin(points, 80)
    )


def _cells(row: Points, first: float, last: float, columns: int) -> list[float]:
    """Means of a row's values over `columns` equal spans of x; an empty span takes the one before it."""
    sums, counts = [0.0] * columns, [0] * columns
    for a, b in row:
        index = min(columns - 1, int((a - first) / (last - first) * columns))
        sums[index] += b
        counts[index] += 1
    cells, value = [], row[0][1]
    for total, count in zip(sums, counts, strict=True):
        value = total / count if count else value
        cells.append(value)
    return cells
