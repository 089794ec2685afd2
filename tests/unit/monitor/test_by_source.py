"""Values and tables of a run's data by source."""

import pytest

from ssa_pretrain.monitor.by_source import RECENT, recent_losses, source_lines, source_rows, step_values
from ssa_pretrain.monitor.names import METRICS, names
from ssa_pretrain.monitor.tracking_rows import flatten

READ = {"web": (7000, 0.25), "code": (3000, 1.5), "maths": (0, 0.0)}


def test_record_has_the_sources_of_the_step_and_all_that_was_read() -> None:
    found = step_values(["web", "code", "maths"], [(30.0, 10), (8.0, 4), (0.0, 0)], READ)
    assert found == {
        "cross_entropy_by_source": {"web": 3.0, "code": 2.0},
        "labels_by_source": {"web": 10, "code": 4},
        "tokens_by_source": {"web": 7000, "code": 3000, "maths": 0},
        "epochs_by_source": {"web": 0.25, "code": 1.5, "maths": 0.0},
    }


def record(step: int, loss: float | None, labels: int) -> dict:
    return {
        "step": step,
        "tokens": 100 * step,
        "cross_entropy_by_source": {"web": loss},
        "labels_by_source": {"web": labels},
        "tokens_by_source": {"web": 10 * step, "code": step},
        "epochs_by_source": {"web": 0.5, "code": 0.25},
    }


def test_loss_of_the_table_is_a_mean_over_the_labels_of_recent_steps() -> None:
    steps = [record(1, 99.0, 10**6), *(record(i, 2.0, 1) for i in range(RECENT - 3))]
    steps += [record(60, 5.0, RECENT - 3), record(61, None, 7), {"step": 62, "cross_entropy": None}]
    assert recent_losses(steps[1:]) == {"web": 3.5}
    assert source_rows(steps[1:]) == [["web", "610", "90.9%", "0.5", "3.500"], ["code", "61", "9.1%", "0.25", ""]]
    assert recent_losses(steps) == {"web": 3.5}, "the first step is no longer recent"


def test_console_has_a_table_of_several_sources_only() -> None:
    assert source_lines([record(1, 2.0, 1)]).splitlines() == [
        "source  tokens  share  epochs   loss",
        "web         10  90.9%     0.5  2.000",
        "code         1   9.1%    0.25",
    ]
    assert source_lines([]) == ""
    assert source_lines([record(1, 2.0, 1) | {"tokens_by_source": {"web": 10}}]) == ""


def test_trackers_have_a_name_per_source() -> None:
    flat = flatten({"kind": "train", **record(1, 2.0, 1)})
    by_source = [metric for metric in METRICS if metric.by_source]
    assert len(by_source) == 4
    for metric in by_source:
        (name,) = names(metric, "train")
        assert f"{name}/source_web" in flat and metric.pattern == "/source_.+"
    assert flat["train/cross_entropy/source_web"] == 2.0 and flat["train/tokens/source_code"] == 1


@pytest.mark.parametrize("value", [None, float("nan")])
def test_missing_losses_have_no_name(value: float | None) -> None:
    names_of = flatten({"kind": "train", **record(1, value, 1)})
    assert ("train/cross_entropy/source_web" in names_of) == (value is not None)
