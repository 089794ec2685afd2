"""ssa_pretrain/monitor/names.py: the one list of metrics against docs/metrics.md and against the names that trackers get."""

import io
import re

import numpy as np
import pytest
from matplotlib.image import imread

from ssa_pretrain.monitor.mass_map import LOW, MassMaps, draw
from ssa_pretrain.monitor.names import ALL, AXES, GROUPS, HELDOUT, METRICS, TASK, TRAIN, metric_of, names, summaries
from ssa_pretrain.monitor.tracking_rows import flatten
from support.processes import ROOT

SECTIONS = {TRAIN: "train", HELDOUT: "evaluation", TASK: "task"}  # headings of docs/metrics.md


def documented(kind: str) -> set[str]:
    """Returns the keys in the table of a kind of record."""
    text = (ROOT / "docs" / "metrics.md").read_text()
    section = text.partition(f'## `"kind": "{SECTIONS[kind]}"`')[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {key for cell in cells for key in re.findall(r"`(\w+)(?:<\w+>)?`", cell)}


@pytest.mark.parametrize("kind", ALL)
def test_list_and_documentation_have_the_same_keys(kind: str) -> None:
    position = {"step", "tokens", "split", "task", "mode", "accuracy_"}
    assert documented(kind) - position == {metric.key for metric in METRICS if kind in metric.kinds}


def test_names_are_those_of_flatten() -> None:
    values = {metric.key: [0.5] if metric.by_layer else 0.5 for metric in METRICS if HELDOUT in metric.kinds}
    flat = flatten({"kind": "evaluation", "step": 1, "tokens": 10, "split": "heldout", "mode": "sparse", **values})
    found = {re.sub(r"/layer_\d\d$", "", name) for name in flat if "/" in name}
    assert found == {name for m in METRICS if HELDOUT in m.kinds for name in names(m, HELDOUT) if "/sparse/" in name}
    assert AXES[HELDOUT] in flat


def test_every_metric_has_a_group_and_unknown_keys_are_refused() -> None:
    assert {metric.group for metric in METRICS} == set(GROUPS)
    assert metric_of("step") is None and metric_of("accuracy_4096") is metric_of("accuracy")
    with pytest.raises(KeyError):
        metric_of("unknown")


def test_best_values_are_summaries_of_train_and_heldout() -> None:
    found = {name: (axis, best) for name, axis, best in summaries()}
    assert found["heldout/full/perplexity"] == ("heldout_tokens", "min") and found["train/mfu"] == ("tokens", "max")
    assert "train/loss" not in found


def evaluation(step: int, mode: str, values: list[float | None]) -> dict:
    return {
        "kind": "evaluation",
        "step": step,
        "tokens": 10 * step,
        "split": "heldout",
        "mode": mode,
        "captured_mass_by_layer": values,
    }


def test_picture_has_a_row_per_layer_and_a_column_per_evaluation() -> None:
    """The colours of the pixels: a high value is bright, a low one dark, a missing one white."""
    maps = MassMaps()
    assert maps.pictures({"heldout/full/captured_mass/layer_00": 0.5}) == {}
    for step, values in ((0, [LOW, 1.0]), (1, [LOW, None])):
        maps.add(evaluation(step, "full", values))
    maps.add({"kind": "train", "step": 1, "captured_mass_by_layer": [0.0]})
    assert maps.pictures({"heldout/sparse/captured_mass/layer_00": 0.5}) == {}
    (name,) = pictures = maps.pictures({"heldout/full/captured_mass/layer_00": 0.5})
    assert name == "heldout/full/captured_mass_map"
    pixels = imread(io.BytesIO(pictures[name]))[:, :, :3]
    dark, bright = np.array([0.267, 0.005, 0.329]), np.array([0.993, 0.906, 0.144])
    is_dark, is_bright = (np.abs(pixels - colour).max(axis=2) < 0.02 for colour in (dark, bright))
    width = pixels.shape[1]
    dark_area, bright_area = is_dark[:, : width * 3 // 4].mean(), is_bright[:, : width * 3 // 4].mean()
    assert dark_area > 1.5 * bright_area > 0.05, (
        "the upper row is dark in both columns, the lower one bright in the first"
    )
    assert np.argwhere(is_dark)[:, 0].mean() < np.argwhere(is_bright[:, : width // 2])[:, 0].mean(), "layer 0 is above"


def test_many_evaluations_keep_the_newest() -> None:
    columns = [(step, [step / 1000]) for step in range(1001)]
    assert draw(columns, "x")[:4] == b"\x89PNG"
