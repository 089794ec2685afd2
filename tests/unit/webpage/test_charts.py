"""ssa_pretrain/webpage/charts.py: ticks enclose the values, means do not shift, and drawings place values correctly."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from ssa_pretrain.webpage.charts import (
    Axis,
    Line,
    colour_legend,
    heat_map,
    histogram,
    legend,
    line_chart,
    log_ticks,
    nice_ticks,
    smooth,
    thin,
)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (4.6, 9.1, [4, 5, 6, 7, 8, 9, 10]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (5, 5, [5, 5.1, 5.2, 5.3, 5.4, 5.5]),
    ],
)
def test_nice_ticks(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.003, 0.04, [0.002, 0.005, 0.01, 0.02, 0.05]), (1, 1e5, [1, 10, 100, 1000, 1e4, 1e5]), (2, 2, [2, 5])],
)
def test_log_ticks(low: float, high: float, ticks: list[float]) -> None:
    assert log_ticks(low, high) == pytest.approx(ticks)


def test_axis_maps_its_ends_and_middle() -> None:
    assert [Axis(0, 10, 100, 200).at(v) for v in (0, 5, 10)] == [100, 150, 200]
    assert [Axis(1, 100, 200, 0, log=True).at(v) for v in (1, 10, 100)] == pytest.approx([200, 100, 0])


def test_smooth_keeps_a_straight_line_unchanged() -> None:
    line = [(i, 3.0 * i + 1) for i in range(50)]
    assert [y for _, y in smooth(line, 0.2)] == pytest.approx([y for _, y in line])
    assert smooth([(0, 0), (1, 3), (2, 0)], 0.9)[1] == (1, pytest.approx(1.0))
    assert smooth([]) == []


def test_thin_keeps_the_last_point() -> None:
    points = [(i, i) for i in range(1001)]
    kept = thin(points, 100)
    assert len(kept) <= 102 and kept[0] == (0, 0) and kept[-1] == (1000, 1000)
    assert thin(points[:5], 100) == points[:5]


def test_line_chart_places_lines_at_their_values() -> None:
    svg = line_chart([Line("a <b>", [(0, 0), (100, 10)], "a"), Line("none", [], "b")], title='x "y"', y_name="&")
    root = ElementTree.fromstring(svg)  # well-formed, so every text was escaped
    (path,) = [element.get("d") for element in root.iter("path") if element.get("class") == "a"]
    (x0, y0), (x1, y1) = (map(float, pair) for pair in re.findall(r"([\d.]+) ([\d.]+)", path or ""))
    assert x0 < x1 and y0 > y1, "time runs to the right, values upwards"
    assert [t.text for t in root.iter("title")] == ["a <b>: 0 at 0 tokens", "a <b>: 10 at 100 tokens"]


def test_charts_without_points_are_empty() -> None:
    assert line_chart([Line("a", [], "a")], title="", y_name="") == ""
    assert line_chart([Line("a", [(0, 0.0)], "a")], title="", y_name="", log=True) == ""
    assert heat_map([[], []], title="") == "" and legend([Line("a", [], "a")]) == ""
    assert histogram({"a": [0, 0]}, str, title="", every=1) == "" == histogram({}, str, title="", every=1)


def test_single_point_is_drawn() -> None:
    ElementTree.fromstring(line_chart([Line("a", [(5, 5)], "a", marks=3)], title="", y_name=""))
    ElementTree.fromstring(heat_map([[(5, 0.5)]], title=""))


def test_heat_map_cell_strength_is_the_mean_of_its_values() -> None:
    svg = heat_map([[(0, 0.0), (1, 0.5), (9, 1.0), (10, 1.0)]], title="", columns=2)
    root = ElementTree.fromstring(svg)
    cells = root.iter("rect")
    assert [cell.get("fill-opacity") for cell in cells] == [f"{0.06 + 0.94 * 0.25:.2f}", "1.00"]
    assert [title.text for title in root.iter("title")] == ["layer 0: 0.250", "layer 0: 1.000"]
    assert "1.000" in [text.text for text in root.iter("text")]


def test_legend_names_lines_but_not_their_background() -> None:
    html = legend([Line("one & two", [(0, 0)], "a", dashed=True), Line("faint", [(0, 0)], "a", faint=True)])
    assert "one &amp; two" in html and "dashed" in html and "faint" not in html


def test_histogram_stacks_the_series_of_a_bin_and_escapes_names() -> None:
    series = {"<b>": [0, 2, 1], "c": [0, 0, 3]}
    root = ElementTree.fromstring(histogram(series, str, title="", every=1))
    bars = list(root.iter("rect"))
    assert [bar.get("class") for bar in bars] == ["a", "a", "b"]
    assert [bar[0].text for bar in bars] == ["<b>, 1 to 2: 2", "<b>, 2 to 3: 1", "c, 2 to 3: 3"]
    top, height = ([float(bar.get(key, 0)) for bar in bars] for key in ("y", "height"))
    assert height == pytest.approx([2 * height[1], height[1], 3 * height[1]], abs=0.02)
    assert top[2] + height[2] == pytest.approx(top[1], abs=0.02), "the second series stands on the first"
    legend_html = colour_legend(series)
    assert "&lt;b&gt;" in legend_html and legend_html.count("<rect") == 2
