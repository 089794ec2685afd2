"""ssa_pretrain/monitor/timeline.py and the goodput that the report computes from it: kills, rollbacks, pauses, damaged lines."""

import json
import os
from pathlib import Path

import psutil
import pytest

from ssa_pretrain.monitor.timeline import FILE_NAME, INTERVAL, Timeline, read_timeline
from ssa_pretrain.report.goodput import goodput, training_until


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


def spend(timeline: Timeline, clock: Clock, phase: str, step: int, seconds: float) -> None:
    timeline.enter(phase, step)
    clock.time += seconds


def train(timeline: Timeline, clock: Clock, steps: range, seconds: float = 1.0) -> None:
    """Trains the steps after `steps.start` up to `steps.stop`."""
    for step in steps:
        spend(timeline, clock, "training", step, seconds)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / FILE_NAME).read_text().splitlines()]


def test_killed_run_loses_the_steps_after_its_checkpoint(tmp_path: Path) -> None:
    clock = Clock()
    first = Timeline(tmp_path, processes=2, clock=clock, now=clock)
    first.begin(0, began=990.0)  # 10 s until here
    clock.time += 5
    spend(first, clock, "evaluating", 0, 7)
    train(first, clock, range(10))
    spend(first, clock, "saving", 10, 3)
    train(first, clock, range(10, 14))
    spend(first, clock, "evaluating", 14, 2)  # the last line; killed within the evaluation
    clock.time += 100
    second = Timeline(tmp_path, clock=clock, now=clock)
    second.begin(10, began=clock.time)
    clock.time += 20
    train(second, clock, range(10, 20))
    second.end("finished", 20)
    found = goodput(read_timeline(tmp_path))
    assert found is not None
    # The evaluation that was under way left no time; it counts as stopped.
    expected = {"training": 20, "repeated": 4, "evaluating": 7, "saving": 3, "starting": 35, "stopped": 102}
    assert found.seconds == pytest.approx(expected)
    assert (found.starts, found.rollbacks, found.how) == (2, 0, "finished")
    assert found.total == pytest.approx(clock.time - 990) and found.share == pytest.approx(20 / found.total)


def test_rollback_within_a_process(tmp_path: Path) -> None:
    clock = Clock()
    timeline = Timeline(tmp_path, clock=clock, now=clock)
    timeline.begin(0, began=clock.time)
    train(timeline, clock, range(8))
    timeline.end("rolled back", 8)
    timeline.begin(4, began=0.0)  # the process's start no longer counts
    clock.time += 3
    train(timeline, clock, range(4, 12), 2.0)
    timeline.end("finished", 12)
    found = goodput(read_timeline(tmp_path))
    assert found is not None and (found.starts, found.rollbacks) == (1, 1)
    assert found.seconds["training"] == pytest.approx(4 + 16) and found.seconds["repeated"] == pytest.approx(4)
    assert found.seconds["starting"] == pytest.approx(3) and found.seconds["stopped"] == 0


def test_later_start_before_an_earlier_one_takes_its_steps_too(tmp_path: Path) -> None:
    """The second start lost its checkpoint; the third goes back to before it."""
    clock = Clock()
    for step, last in ((0, 10), (8, 12), (2, 12)):
        timeline = Timeline(tmp_path, clock=clock, now=clock)
        timeline.begin(step, began=clock.time)
        train(timeline, clock, range(step, last))
        timeline.end("RuntimeError", last)
    found = goodput(read_timeline(tmp_path))
    assert found is not None and found.seconds["training"] == pytest.approx(2 + 0 + 10)
    assert found.seconds["repeated"] == pytest.approx(8 + 4)


def test_long_phases_write_a_line_per_interval(tmp_path: Path) -> None:
    clock = Clock()
    timeline = Timeline(tmp_path, clock=clock, now=clock)
    timeline.begin(0, began=clock.time)
    train(timeline, clock, range(100), INTERVAL / 10)
    assert 8 <= len(lines(tmp_path)) <= 12, "not one per step"
    (segment,) = read_timeline(tmp_path)
    assert training_until(segment, 50) == pytest.approx(5 * INTERVAL)
    assert training_until(segment, 55) == pytest.approx(5.5 * INTERVAL), "between two lines"
    assert training_until(segment, 0) == 0


def test_only_the_first_reason_counts_and_phases_of_other_names_are_training(tmp_path: Path) -> None:
    clock = Clock()
    timeline = Timeline(tmp_path, clock=clock, now=clock)
    timeline.begin(0, began=clock.time)
    spend(timeline, clock, "profiling", 0, 5)
    timeline.end("hung")
    timeline.end("failed")
    assert [line["event"] for line in lines(tmp_path)] == ["start", "times", "end"]
    assert lines(tmp_path)[-1]["how"] == "hung" and lines(tmp_path)[-1]["seconds"]["training"] == 5


def test_damaged_lines_are_left_out(tmp_path: Path) -> None:
    clock = Clock()
    timeline = Timeline(tmp_path, clock=clock, now=clock)
    timeline.begin(0, began=clock.time)
    train(timeline, clock, range(3))
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('null\n{"event": "times"}\n{"event": "end", "time": 1, "step": "x", "seconds": {}}\n[1]\n')
    timeline.end("finished", 3)
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('{"event": "start", "ti')
    found = goodput(read_timeline(tmp_path))
    assert found is not None and found.seconds["training"] == pytest.approx(3) and found.starts == 1


def test_no_file_without_rank_0_and_no_goodput_without_a_file(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path, enabled=False)
    timeline.begin(0)
    timeline.enter("training", 0)
    timeline.end("finished")
    assert not list(tmp_path.iterdir()) and read_timeline(tmp_path) == [] and goodput([]) is None


def test_a_disk_that_cannot_be_written_does_not_stop_training(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()
    timeline = Timeline(tmp_path)
    timeline.begin(0)
    timeline.enter("training", 0)
    timeline.end("finished")


def test_the_first_segment_begins_with_its_process(tmp_path: Path) -> None:
    Timeline(tmp_path).begin(0)
    (line,) = lines(tmp_path)
    assert line["began"] == pytest.approx(psutil.Process(os.getpid()).create_time()) and line["time"] > line["began"]
