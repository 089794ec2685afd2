"""ssa_pretrain/monitor/metrics.py and metrics_file.py: after kills and resumes the file has no gaps, duplicates or incomplete lines; speed by a given clock."""

import io
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ssa_pretrain.monitor.alerts import Alert
from ssa_pretrain.monitor.console import Console
from ssa_pretrain.monitor.metrics import MetricsLogger, Speed, perplexity
from ssa_pretrain.monitor.metrics_file import (
    FILE_NAME,
    drop_records_after,
    evaluations,
    read_records,
    replace_damaged_file,
)


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make_step(step: int) -> dict:
    return {
        "step": step,
        "tokens": 100 * step,
        "loss": 5.0 / step,
        "cross_entropy": 5.0,
        "learning_rate": 1e-3,
        "stream": "full",
    }


def make_evaluation(step: int, mode: str) -> dict:
    return {
        "step": step,
        "tokens": 100 * step,
        "split": "heldout",
        "mode": mode,
        "cross_entropy": 2.0,
        "captured_mass": None,
        "rows": 4,
    }


def logger(folder: Path, **options: object) -> MetricsLogger:
    options = {
        "total_steps": 10,
        "tokens_per_step": 100,
        "console": Console(total_steps=10, stream=io.StringIO()),
    } | options
    return MetricsLogger(folder, **options)  # type: ignore[arg-type]


def test_flops_may_differ_by_step(tmp_path: Path) -> None:
    """FLOPs per token depend on document lengths."""
    with logger(tmp_path, flops_per_token=1e9, peak_flops=1e12) as metrics:
        metrics.log_step(make_step(1))
        metrics.log_step(make_step(2), 5e8)
    first, second = read_records(tmp_path / "metrics.jsonl")
    for record, flops_per_token in ((first, 1e9), (second, 5e8)):
        assert record["tflops_per_second"] == pytest.approx(record["tokens_per_second"] * flops_per_token / 1e12)
        assert record["mfu"] == pytest.approx(record["tflops_per_second"])


def test_every_record_is_one_line_with_its_keys(tmp_path: Path) -> None:
    clock = Clock()
    with logger(tmp_path, clock=clock, flops_per_token=1e9, peak_flops=1e12) as metrics:
        clock.now += 2
        metrics.log_step(make_step(1))
        metrics.log_evaluation(make_evaluation(1, "sparse"))
    train, evaluation = (json.loads(line) for line in (tmp_path / FILE_NAME).read_text().splitlines())
    assert train == {
        "kind": "train",
        **make_step(1),
        "tokens_per_second": 50.0,
        "tflops_per_second": 0.05,
        "mfu": 0.05,
        "seconds": 2.0,
        "eta_seconds": 18.0,
    }
    assert evaluation == {"kind": "evaluation", **make_evaluation(1, "sparse"), "perplexity": pytest.approx(math.e**2)}


def test_record_is_on_disk_before_the_next_step(tmp_path: Path) -> None:
    metrics = logger(tmp_path)
    metrics.log_step(make_step(1))
    assert [record["step"] for record in read_records(tmp_path / FILE_NAME)] == [1]
    metrics.close()
    metrics.close()


def test_resume_leaves_no_gap_and_no_duplicate(tmp_path: Path) -> None:
    with logger(tmp_path) as metrics:
        metrics.log_evaluation(make_evaluation(0, "full"))
        for step in range(1, 8):
            metrics.log_step(make_step(step))
            if step in (4, 6):
                metrics.log_evaluation(make_evaluation(step, "full"))
    with logger(tmp_path, resume_step=4) as metrics:
        for step in range(5, 11):
            metrics.log_step(make_step(step))
    records = list(read_records(tmp_path / FILE_NAME))
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 11))
    assert [r["step"] for r in records if r["kind"] == "evaluation"] == [0, 4]


def test_new_run_starts_a_new_file(tmp_path: Path) -> None:
    with logger(tmp_path) as metrics:
        metrics.log_evaluation(make_evaluation(0, "full"))
        metrics.log_step(make_step(1))
    with logger(tmp_path) as metrics:
        metrics.log_evaluation(make_evaluation(0, "full"))
    assert [r["step"] for r in read_records(tmp_path / FILE_NAME)] == [0]


@pytest.mark.parametrize("kept", [0, 1, 20, -1])
def test_incomplete_last_line_is_dropped(tmp_path: Path, kept: int) -> None:
    """The last of three lines is truncated at any byte: the first two stay, and the next record starts on a new line."""
    with logger(tmp_path) as metrics:
        for step in (1, 2, 3):
            metrics.log_step(make_step(step))
    path = tmp_path / FILE_NAME
    whole = path.read_bytes().splitlines(keepends=True)
    cut = whole[2][:-1] if kept == -1 else whole[2][:kept]
    path.write_bytes(whole[0] + whole[1] + cut)
    complete = [1, 2, 3] if kept == -1 else [1, 2]  # without its newline only, a record is complete
    assert [r["step"] for r in read_records(path)] == complete
    with logger(tmp_path, resume_step=2) as metrics:
        metrics.log_step(make_step(3))
    assert [r["step"] for r in read_records(path)] == [1, 2, 3]
    assert path.read_bytes().count(b"\n") == 3


def test_bad_line_elsewhere_is_an_error_with_its_line_number(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(
        ValueError, match=r"metrics\.jsonl:2 is not a JSON object; remove the line or start a new output_dir"
    ):
        list(read_records(path))
    path.write_text('{"step": 1}\n[1]\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not a record of a step"):
        list(read_records(path))


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (b"nonsense\n", "is not a JSON object"),
        (bytes(40) + b"\n", "is not a JSON object"),
        (b"\xff\xfe{\n", "is not a JSON object"),
        (b"[1]\n", "is not a record of a step"),
        (b'{"step": "2"}\n', "is not a record of a step"),
        (b'{"step": null}\n', "is not a record of a step"),
    ],
)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_file_with_a_bad_line_is_renamed_and_the_run_continues(
    tmp_path: Path, bad: bytes, problem: str, place: int
) -> None:
    with logger(tmp_path) as metrics:
        for step in (1, 2, 3):
            metrics.log_step(make_step(step))
    path = tmp_path / FILE_NAME
    lines = path.read_bytes().splitlines(keepends=True)
    lines.insert(place, bad)
    path.write_bytes(b"".join(lines))
    printed = io.StringIO()
    with logger(tmp_path, resume_step=2, console=Console(total_steps=10, stream=printed)) as metrics:
        metrics.log_step(make_step(3))
    assert [r["step"] for r in read_records(path)] == [1, 2, 3]
    assert f"{path}:{place + 1} {problem}: the file was kept as metrics.jsonl.damaged-1, and the run continues" in (
        printed.getvalue()
    )
    assert (tmp_path / "metrics.jsonl.damaged-1").read_bytes() == b"".join(lines)
    assert len(list(tmp_path.iterdir())) == 2


def test_second_damaged_file_does_not_replace_the_first(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    message: str | None = ""
    for text in ("a\n", "b\nc\n"):
        path.write_text(text)
        message = replace_damaged_file(path)
    assert message is not None
    assert (
        "metrics.jsonl:1 is not a JSON object (2 such lines): the file was kept as metrics.jsonl.damaged-2" in message
    )
    assert (tmp_path / "metrics.jsonl.damaged-1").read_text() == "a\n"
    assert replace_damaged_file(path) is None


def test_dropped_records_are_counted_and_no_temporary_file_is_left(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    assert drop_records_after(path, 5) == 0
    with logger(tmp_path) as metrics:
        for step in (1, 2, 3):
            metrics.log_step(make_step(step))
    assert drop_records_after(path, 2) == 1
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME]


def test_non_finite_values_become_null(tmp_path: Path) -> None:
    with logger(tmp_path) as metrics:
        metrics.log_step(make_step(1) | {"loss": float("nan"), "captured_mass_by_layer": [0.5, float("inf")]})
    record = json.loads(
        (tmp_path / FILE_NAME).read_text(), parse_constant=lambda text: pytest.fail(f"{text} in the file")
    )
    assert record["loss"] is None and record["captured_mass_by_layer"] == [0.5, None]


def test_disabled_logger_writes_nothing(tmp_path: Path) -> None:
    with logger(tmp_path / "run", enabled=False) as metrics:
        metrics.log_step(make_step(1))
        metrics.log_evaluation(make_evaluation(1, "full"))
    assert not (tmp_path / "run").exists()


def test_console_prints_the_first_the_last_and_every_interval_step(tmp_path: Path) -> None:
    stream = io.StringIO()
    with logger(tmp_path, interval=4, console=Console(total_steps=10, stream=stream)) as metrics:
        for step in range(1, 11):
            metrics.log_step(make_step(step))
    assert [int(line.split()[1].split("/")[0]) for line in stream.getvalue().splitlines()] == [1, 4, 8, 10]


def test_speed_excludes_the_first_step_old_steps_and_pauses() -> None:
    clock = Clock()
    speed = Speed(window=2, clock=clock)
    assert speed.tokens_per_second == 0.0 and speed.eta(5) == 0.0

    def step(seconds: float) -> float:
        clock.now += seconds
        return speed.step(10)

    assert step(100) == 100 and speed.tokens_per_second == pytest.approx(0.1)
    step(1)
    assert speed.tokens_per_second == pytest.approx(10), (
        "the first step compiles; it does not count once there is a second"
    )
    step(3)
    step(1)
    assert speed.tokens_per_second == pytest.approx(20 / 4), "the window holds two steps"
    clock.now += 500
    speed.pause()
    assert step(1) == pytest.approx(1) and speed.eta(3) == pytest.approx(3)


def test_perplexity_overflows_to_infinity() -> None:
    assert perplexity(math.log(50)) == pytest.approx(50) and perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan)), "a diverged run has no perplexity, not an infinite one"


WRITER = """
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from ssa_pretrain.monitor.metrics import MetricsLogger
metrics = MetricsLogger(Path(sys.argv[1]), total_steps=10**9, tokens_per_step=1, resume_step=int(sys.argv[2]), interval=10**9)
print("ready", flush=True)
for step in range(int(sys.argv[2]) + 1, 10**9):
    metrics.log_step({"step": step, "tokens": step, "loss": 1.0, "cross_entropy": 1.0, "learning_rate": 1.0, "pad": "x" * 3000})
"""


def test_resume_after_a_kill_during_a_write_has_no_gap(tmp_path: Path) -> None:
    """kill -9 at any byte, three times, each followed by a resume from an earlier step."""
    resume = 0
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, tmp_path, str(resume)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        path = tmp_path / FILE_NAME
        while path.stat().st_size < (resume + 200) * 3000:
            pass
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        resume = max(record["step"] for record in read_records(path)) - 50
    drop_records_after(tmp_path / FILE_NAME, resume)
    assert [record["step"] for record in read_records(tmp_path / FILE_NAME)] == list(range(1, resume + 1))


class Full:
    """A file on a disk with `room` bytes left."""

    def __init__(self, file: io.RawIOBase, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        written = self.file.write(data[: self.room])
        assert written is not None
        self.room -= written
        return written

    def close(self) -> None:
        self.file.close()


def test_full_disk_neither_stops_the_run_nor_loses_a_record(tmp_path: Path) -> None:
    stream = io.StringIO()
    log = logger(tmp_path, console=Console(total_steps=10, stream=stream), interval=100)
    disk = Full(log._file, room=300)  # type: ignore[arg-type]
    log._file = disk  # type: ignore[assignment]
    for step in range(1, 9):
        log.log_step(make_step(step))
    assert stream.getvalue().count("metrics.jsonl cannot be written (No space left on device)") == 1
    disk.room = 1_000_000
    log.log_step(make_step(9))
    log.close()
    assert stream.getvalue().count("metrics.jsonl can be written again and has all records") == 1
    assert [record["step"] for record in read_records(tmp_path / FILE_NAME)] == list(range(1, 10))


def test_logger_knows_evaluations_before_and_after_a_resume(tmp_path: Path) -> None:
    with logger(tmp_path) as log:
        log.log_step(make_step(1))
        log.log_evaluation(make_evaluation(1, "full"))
        assert log.evaluated == {(1, "full")}
    with logger(tmp_path, resume_step=1) as log:
        log.log_evaluation(make_evaluation(1, "sparse"))
        assert log.evaluated == {(1, "full"), (1, "sparse")}


def test_evaluations_are_read_without_a_logger(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert evaluations(path) == set()
    with logger(tmp_path) as metrics:
        metrics.log_step(make_step(1))
        metrics.log_evaluation(make_evaluation(1, "full"))
        metrics.log_evaluation(make_evaluation(1, "sparse"))
    path.write_bytes(b"no record\n" + path.read_bytes() + b'{"kind": "evalu')
    before = path.read_bytes()
    assert evaluations(path) == {(1, "full"), (1, "sparse")}
    assert path.read_bytes() == before


def test_tasks_are_known_by_their_series_before_and_after_a_resume(tmp_path: Path) -> None:
    record = {"step": 1, "tokens": 100, "task": "arc", "mode": "full", "acc": 0.5}
    with logger(tmp_path) as log:
        log.log_task(record)
        log.log_evaluation(make_evaluation(1, "full"))
        log.log_task(record | {"step": 2})
        assert log.evaluated == {(1, "task/arc/full"), (1, "full"), (2, "task/arc/full")}
    first = json.loads((tmp_path / FILE_NAME).read_text().splitlines()[0])
    assert first == {"kind": "task", **record}
    with logger(tmp_path, resume_step=1) as log:
        assert log.evaluated == {(1, "task/arc/full"), (1, "full")}
    assert evaluations(tmp_path / FILE_NAME) == {(1, "task/arc/full"), (1, "full")}


def test_record_of_a_checkpoint_comes_after_later_steps_survives_a_resume_and_reaches_no_tracker(
    tmp_path: Path,
) -> None:
    seen: list[str] = []

    class Tracker:
        def log(self, record: Mapping[str, Any]) -> None:
            seen.append(f"{record['kind']} {record['step']}")

        def alert(self, alert: Alert) -> None:
            raise AssertionError(alert)

        def finish(self) -> None:
            pass

    with logger(tmp_path, trackers=[Tracker()]) as log:
        for step in (1, 2, 3):
            log.log_step(make_step(step))
        log.log_checkpoint({"step": 2, "stall_seconds": 0.1, "write_seconds": 2.0, "bytes": 10})
        log.log_failed_save({"step": 2, "reason": "full", "failed_in_a_row": 1, "next_step": 3})
        log.log_checkpoint({"step": 3, "stall_seconds": 0.1, "write_seconds": 2.0, "bytes": 10})
    with logger(tmp_path, resume_step=2, trackers=[Tracker()]):
        pass
    kept = [(record["kind"], record["step"]) for record in read_records(tmp_path / FILE_NAME)]
    assert kept == [("train", 1), ("train", 2), ("checkpoint", 2), ("failed_save", 2)]
    assert seen == ["train 1", "train 2", "train 3", "train 1", "train 2"]
