"""Charts as SVG text: lines over a common x axis, a heat map, and a histogram. Pure functions of numbers, no plotting library.

Colours are CSS classes. style.css defines them, once for light and once for dark. Points, cells and bars carry a `<title>` with their values,
which browsers show on hover. Axis ticks fall on 1, 2, 2.5 or 5 times a power of ten.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from ssa_pretrain.settings.quantities import compact

WIDE, HALF = 1060, 500  # a drawing's width on the page in pixels: at that scale its letters are as large as the text
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 26, 28  # margins for labels, pixels
MAX_POINTS = 400
COLOURS = "abcdef"  # classes of style.css, by the index of a series

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart.

    Attributes:
        name: shown in the legend.
        points: (x, y) in increasing x.
        style: CSS class of its colour.
        faint: drawn thin and left out of the legend, as the background of a smoothed line.
        marks: radius of a dot at every point, for lines with few points; 0: none. If two lines coincide, larger dots show as rings.
        dashed: for a reference line.
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
        log: logarithmic.
        ticks: values that get a label.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    ticks: list[float] = field(default_factory=list)

    def at(self, value: float) -> float:
        """Returns the pixel of a value."""
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        value = math.log10(max(value, self.low)) if self.log else value
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns about `count` round values. The first is at most `low`, the last at least `high`."""
    if high <= low:
        high = low + (abs(low) or 1.0) * 0.1
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    unit = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / unit + 1e-9), math.ceil(high / unit - 1e-9)
    return [round(i * unit, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Returns powers of ten that enclose the values. Over at most two decades, 2 and 5 times each power are added."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    steps = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [step * 10.0**power for power in range(first, last) for step in steps] + [10.0**last]
    start = max(i for i, tick in enumerate(ticks) if tick <= low * (1 + 1e-9))
    end = min(i for i, tick in enumerate(ticks) if tick >= high * (1 - 1e-9))
    return ticks[start : max(end, start + 1) + 1]


def smooth(points: Points, share: float = 0.05) -> list[tuple[float, float]]:
    """Returns the mean over a centred window at each point. The window shrinks towards both ends, so that a falling line is not delayed.

    Args:
        points: (x, y) in increasing x.
        share: size of the window as a fraction of all points.
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
    """Returns at most `most` + 1 evenly spaced points, always including the last one."""
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
    """Returns an SVG of lines over a common x axis, empty if no line has points. `legend` builds its legend.

    Args:
        lines: drawn in order; those without points are left out.
        title: text for screen readers.
        y_name: unit of the y axis, written at its top.
        x_name: unit of the x axis.
        log: logarithmic y axis; values at or below zero are left out.
        y_text: formats a y value.
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
    bands: Sequence[Points],
    *,
    title: str,
    low: float = 0.0,
    high: float = 1.0,
    x_name: str = "tokens",
    band_name: str = "layer",
    width: int = HALF,
    columns: int = 60,
) -> str:
    """Returns an SVG of horizontal bands. Strength of colour shows the value over x; the last value stands at a band's end as a number.

    Args:
        bands: (x, value) of each band, all over the same x range.
        title: text for screen readers.
        low, high: values of the weakest and the strongest colour.
        x_name: unit of the x axis.
        band_name: the noun for a band, such as "layer".
        width: of the drawing, pixels.
        columns: cells per band; a cell shows the mean of its values.
    """
    bands = [points for points in bands if points]
    if not bands:
        return ""
    thickness = max(12.0, min(30.0, 260 / len(bands)))
    height = round(TOP + BOTTOM + thickness * len(bands))
    first, last = min(points[0][0] for points in bands), max(points[-1][0] for points in bands)
    last = max(last, first + 1)
    x = Axis(
        first, last, LEFT, width - 52, ticks=[t for t in nice_ticks(first, last, width // 90) if first <= t <= last]
    )
    body, cell = [], (x.end - x.start) / columns
    for index, points in enumerate(bands):
        top = TOP + thickness * index
        middle = top + thickness / 2 + 4
        body.append(f'<text class="tick" x="{LEFT - 8}" y="{middle:.1f}" text-anchor="end">{index}</text>')
        for column, value in enumerate(_cells(points, first, last, columns)):
            strength = min(1.0, max(0.0, (value - low) / (high - low)))
            body.append(
                f'<rect class="cell" x="{x.start + column * cell:.1f}" y="{top:.1f}" width="{cell:.1f}" height="{thickness - 2:.1f}"'
                f' fill-opacity="{0.06 + 0.94 * strength:.2f}"><title>{escape(band_name)} {index}: {value:.3f}</title></rect>'
            )
        body.append(f'<text class="value" x="{x.end + 8}" y="{middle:.1f}">{points[-1][1]:.3f}</text>')
    bottom = height - BOTTOM + 2
    body += [_x_tick(x, tick, bottom) for tick in x.ticks if x.at(tick) < width - 90]
    body.append(f'<text class="unit" x="{width}" y="{bottom + 18:.0f}" text-anchor="end">{escape(x_name)}</text>')
    body.append(f'<text class="unit" x="{LEFT - 8}" y="12" text-anchor="end">{escape(band_name)}</text>')
    return _svg(title, width, height, body)


def histogram(
    series: Mapping[str, Sequence[float]],
    bin_text: Callable[[int], str],
    *,
    title: str,
    every: int,
    width: int = WIDE,
    height: int = 240,
) -> str:
    """Returns an SVG of stacked bars over common bins, empty if all bins are. `colour_legend` builds its legend.

    Args:
        series: height of each bin, by name of the series.
        bin_text: formats a bin's lower border.
        title: text for screen readers.
        every: bins from one label of the x axis to the next.
        width, height: of the drawing, pixels.
    """
    totals = [sum(values) for values in zip(*series.values(), strict=True)]
    filled = [i for i, total in enumerate(totals) if total]
    if not filled:
        return ""
    first, end, top = filled[0], filled[-1] + 1, max(totals)
    y = Axis(0, top, height - BOTTOM, TOP / 2, ticks=[0, top / 2, top])
    step = (width - LEFT) / (end - first)
    body = [_rule(y, tick, compact(tick), width) for tick in y.ticks]
    for i in range(first, end):
        x, below = LEFT + (i - first) * step, 0.0
        for index, (name, values) in enumerate(series.items()):
            if values[i]:
                high, low = y.at(below + values[i]), y.at(below)
                body.append(
                    f'<rect class="{_colour(index)}" x="{x:.1f}" y="{high:.2f}" width="{max(1, step - 1):.1f}" height="{low - high:.2f}">'
                    f"<title>{escape(name)}, {escape(bin_text(i))} to {escape(bin_text(i + 1))}: {values[i]:,.0f}</title></rect>"
                )
                below += values[i]
        if i % every == 0:
            body.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="middle">{escape(bin_text(i))}</text>')
    return _svg(title, width, height, body)


def stacked_bars(
    bars: Sequence[tuple[str, Sequence[float]]], names: Sequence[str], *, title: str, width: int = WIDE
) -> str:
    """Returns an SVG of horizontal bars of the same length, each cut into shares. `colour_legend(names)` builds its legend.

    Args:
        bars: name, and shares that sum to 1, of each bar.
        names: of the shares, in their order.
        title: text for screen readers.
        width: of the drawing, pixels.
    """
    thickness, gap, body = 30, 24 if any(name for name, _ in bars) else 0, []
    height = len(bars) * (thickness + gap)
    for index, (name, shares) in enumerate(bars):
        top, x = index * (thickness + gap) + gap, 0.0
        body.append(f'<text class="tick" x="0" y="{top - 6}">{escape(name)}</text>')
        for part, (label, share) in enumerate(zip(names, shares, strict=True)):
            if share <= 0:
                continue
            wide = share * width
            body.append(
                f'<rect class="{_colour(part)}" x="{x:.1f}" y="{top}" width="{max(0.5, wide - 1):.1f}" height="{thickness}">'
                f"<title>{escape(name)}, {escape(label)}: {share:.1%}</title></rect>"
            )
            if wide > 70:
                body.append(f'<text class="on-bar" x="{x + 8:.1f}" y="{top + 20}">{share:.1%}</text>')
            x += wide
    return _svg(title, width, height, body)


def legend(lines: Sequence[Line]) -> str:
    """Returns the names of a chart's lines beside a stroke of their colour, as HTML."""
    drawn = [line for line in lines if line.points and not line.faint]
    return _legend(
        (f'<path class="{line.style}{" dashed" if line.dashed else ""}" d="M0 5H22"/>', line.name) for line in drawn
    )


def colour_legend(names: Iterable[str]) -> str:
    """Returns the names of a histogram's series beside a swatch of their colour, as HTML."""
    swatch = '<rect class="{}" width="22" height="10" rx="3"/>'
    return _legend((swatch.format(_colour(index)), name) for index, name in enumerate(names))


def _legend(items: Iterable[tuple[str, str]]) -> str:
    """Returns drawings of 22 by 10 pixels with their names."""
    keys = [
        f'<span class="key"><svg width="22" height="10" aria-hidden="true">{drawing}</svg>{escape(name)}</span>'
        for drawing, name in items
    ]
    return f'<div class="legend">{"".join(keys)}</div>' if keys else ""


def _colour(index: int) -> str:
    """Returns the CSS class of a series."""
    return COLOURS[index % len(COLOURS)]


def _svg(title: str, width: int, height: int, body: Sequence[str]) -> str:
    """Returns a drawing that scales with the page's width."""
    inner = "".join(body)
    return f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{inner}</svg>'


def _grid(x: Axis, y: Axis, y_text: Callable[[float], str], x_name: str, y_name: str) -> str:
    """Returns horizontal rules, labels of both axes, units."""
    parts = [_rule(y, tick, y_text(tick), x.end) for tick in y.ticks]
    parts += [_x_tick(x, tick, y.start) for tick in x.ticks if x.at(tick) < x.end - 60]
    parts.append(f'<text class="unit" x="0" y="12">{escape(y_name)}</text>')
    parts.append(f'<text class="unit" x="{x.end}" y="{y.start + 18:.0f}" text-anchor="end">{escape(x_name)}</text>')
    return "".join(parts)


def _rule(y: Axis, value: float, text: str, right: float) -> str:
    """Returns a horizontal rule at a value with its label."""
    at = y.at(value)
    return (
        f'<path class="rule" d="M{LEFT} {at:.1f}H{right}"/>'
        f'<text class="tick" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{escape(text)}</text>'
    )


def _x_tick(x: Axis, tick: float, bottom: float) -> str:
    """Returns a label under the x axis."""
    at = x.at(tick)
    anchor = "start" if at < x.start + 4 else "middle"
    return f'<text class="tick" x="{at:.1f}" y="{bottom + 18:.0f}" text-anchor="{anchor}">{compact(tick)}</text>'


def _line(line: Line, points: Points, x: Axis, y: Axis) -> str:
    """Returns the stroke of a line, and its dots if it has marks."""
    path = "L".join(f"{x.at(a):.1f} {y.at(b):.1f}" for a, b in points)
    style = line.style + (" faint" if line.faint else "") + (" dashed" if line.dashed else "")
    dots = (
        [f'<circle class="{line.style}" cx="{x.at(a):.1f}" cy="{y.at(b):.1f}" r="{line.marks}"/>' for a, b in points]
        if line.marks
        else []
    )
    return f'<path class="{style}" d="M{path}"/>' + "".join(dots)


def _targets(line: Line, points: Points, x: Axis, y: Axis, y_text: Callable[[float], str], x_name: str) -> str:
    """Returns invisible discs that show a point's values on hover."""
    return "".join(
        f'<circle class="target" cx="{x.at(a):.1f}" cy="{y.at(b):.1f}" r="7">'
        f"<title>{escape(line.name)}: {escape(y_text(b))} at {compact(a)} {escape(x_name)}</title></circle>"
        for a, b in thin(points, 80)
    )


def _cells(points: Points, first: float, last: float, columns: int) -> list[float]:
    """Returns means of the values over `columns` equal intervals of x. An empty interval repeats the one before it."""
    sums, counts = [0.0] * columns, [0] * columns
    for a, b in points:
        index = min(columns - 1, int((a - first) / (last - first) * columns))
        sums[index] += b
        counts[index] += 1
    cells, value = [], points[0][1]
    for total, count in zip(sums, counts, strict=True):
        value = total / count if count else value
        cells.append(value)
    return cells
