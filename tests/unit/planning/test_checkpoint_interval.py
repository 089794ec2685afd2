"""The interval of Young and Daly is the cheapest one, and never shorter than a save takes."""

import pytest

from ssa_pretrain.planning.checkpoint_interval import (
    SaveCost,
    best_interval,
    explain,
    hours_between_failures,
    lost_share,
)


@pytest.mark.parametrize(("gpus", "hours", "minutes"), [(8, 1011, 64), (64, 126, 22), (256, 32, 11), (1024, 7.9, 6)])
def test_known_cases_of_a_stall_of_two_seconds(gpus, hours, minutes):
    found = hours_between_failures(0.0, gpus)
    assert found == pytest.approx(hours, rel=0.02)
    cost = SaveCost(stall_seconds=2.0, write_seconds=20.0, step_seconds=1.0)
    assert best_interval(cost, found) / 60 == pytest.approx(minutes, abs=0.6)


def test_no_other_interval_loses_less():
    cost, hours = SaveCost(stall_seconds=5.0, write_seconds=1.0, step_seconds=0.7), 30.0
    chosen = best_interval(cost, hours)
    least = lost_share(cost, hours, chosen)
    assert all(lost_share(cost, hours, other) >= least - 1e-6 for other in range(1, 10 * chosen, 7))


def test_interval_is_at_least_as_long_as_the_writing():
    cost = SaveCost(stall_seconds=0.001, write_seconds=100.0, step_seconds=3.0)
    assert best_interval(cost, 1.0) == 34
    assert best_interval(SaveCost(0.0, 0.0, 1.0), 10.0) == 1
    assert best_interval(SaveCost(0.0, 0.0, 0.0), 10.0) == 1


def test_configured_time_between_failures_counts():
    assert hours_between_failures(12.0, 1024) == 12.0


def test_explanation_has_every_number_and_its_source():
    cost = SaveCost(stall_seconds=0.4, write_seconds=12.0, step_seconds=2.0)
    assert explain(340, cost, 126.4, configured=False, num_gpus=64) == (
        "checkpoint.interval=auto: a checkpoint every 340 steps (11m20s), because a save stalls training 0.4 s, takes 12 s, and a failure is "
        "expected every 126 h (the default for 64 GPUs); expected loss 0.14% of the time"
    )
    assert "every 5 h (checkpoint.mean_hours_between_failures)" in explain(9, cost, 5, configured=True, num_gpus=64)
