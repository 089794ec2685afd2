"""ssa_pretrain/monitor/console.py: lines fit the terminal, and the console is plain in a pipe and silent if disabled."""

import io
import re
from datetime import datetime
from pathlib import Path

import pytest

from ssa_pretrain.config import Timestamps
from ssa_pretrain.monitor.console import (
    MAX_COLUMNS,
    Console,
    banner,
    end_line,
    evaluation_line,
    failed_save_line,
    save_line,
    task_line,
    train_line,
    wait_line,
    with_timestamps,
)

TRAIN = {
    "step": 10,
    "tokens": 81_920,
    "loss": 8.1234,
    "cross_entropy": 8.0,
    "alignment_loss": 0.01234,
    "captured_mass": 0.8125,
    "grad_norm": 1.25,
    "learning_rate": 0.0006,
    "tokens_per_second": 4321.0,
    "tflops_per_second": None,
    "mfu": None,
    "eta_seconds": 125.0,
}
EVALUATION = {"step": 100, "split": "heldout", "mode": "sparse", "cross_entropy": 5.5, "perplexity": 244.69, "rows": 64}


def test_train_line() -> None:
    line = "step  10/300  81.9k tok  loss 8.123  ce 8.000  align 0.012  mass 0.81  gnorm 1.2  lr 6.0e-4  4.32k tok/s  ETA 2m05s"
    assert train_line(TRAIN, 300) == line


def test_train_line_of_full_attention_has_no_sparse_columns() -> None:
    plain = {key: value for key, value in TRAIN.items() if key not in ("alignment_loss", "captured_mass")}
    line = train_line(plain, 300)
    assert "align" not in line and "mass" not in line and "ce " not in line and "loss 8.123" in line


def test_train_line_shows_the_loss_of_a_trained_scorer() -> None:
    plain = {key: value for key, value in TRAIN.items() if key != "alignment_loss"}
    assert "  index 0.35  mass 0.81  " in train_line(plain | {"index_loss": 0.3456}, 300)


def test_train_line_shows_the_memory_of_a_gpu() -> None:
    assert " mem 36.0G " in train_line(TRAIN | {"peak_memory_gib": 36.04}, 300)


def test_train_line_fits_when_every_number_is_long() -> None:
    wide = TRAIN | {"step": 123_456, "tokens": 99_949_999_999, "loss": 11.351, "tokens_per_second": 754_321.0}
    wide |= {
        "tflops_per_second": 61_935.0,
        "mfu": 0.62,
        "eta_seconds": 300_000.0,
        "alignment_loss": 1.2e-5,
        "grad_norm": 123.4,
        "peak_memory_gib": 139.9,
    }
    line = train_line(wide, 1_234_567)
    assert len(line) <= MAX_COLUMNS
    for word in ("step", "tok", "loss", "align", "mass", "lr", "tok/s", "MFU 62%", "ETA 3d11h"):
        assert word in line


def test_train_line_shows_nan() -> None:
    assert "loss nan" in train_line(TRAIN | {"loss": float("nan")}, 300)


def test_task_line_has_as_many_metrics_as_fit() -> None:
    record = {
        "kind": "task",
        "step": 100,
        "tokens": 9,
        "task": "arc",
        "mode": "full",
        "acc": 0.25,
        "acc_stderr": 0.1,
        "num": 4,
    }
    assert task_line(record) == "eval 100  task arc full  acc 0.25"
    long = task_line(record | {f"accuracy_{n}": 0.123456 for n in range(20)})
    assert len(long) <= MAX_COLUMNS and long.endswith("  accuracy_3 0.1235") and "None" not in long
    assert task_line({"step": 1, "task": "n", "mode": "full", "acc": float("nan")}) == "eval 1  task n full  acc nan"


def test_evaluation_line() -> None:
    assert evaluation_line(EVALUATION) == "eval 100  heldout sparse  ce 5.500  perplexity 244.69  64 rows"
    assert "mass 0.90" in evaluation_line(EVALUATION | {"captured_mass": 0.9})


def test_line_of_a_save_that_waited_names_what_to_do() -> None:
    assert wait_line(60, 3.21) == (
        "the save of step 60 waited 3.2 s until the one before it was written: raise checkpoint.interval, or write to faster storage"
    )


def test_line_of_a_failed_save_has_the_next_one_and_how_many_may_fail() -> None:
    line = failed_save_line("step 60 could not be saved", 65, 9, 10)
    assert line == (
        "step 60 could not be saved; training goes on, the next save is that of step 65, and 9 more in a row may fail "
        "(checkpoint.max_failed_saves=10)"
    )
    last = failed_save_line("step 60 could not be saved", 65, 0, 1)
    assert "step 65, and if that fails too, the run ends (checkpoint.max_failed_saves=1)" in last


def test_save_line_has_the_stall_and_the_whole_time() -> None:
    line = save_line(60, 0.42, 12.34, Path("outputs/x/step_60"))
    assert line == "saved step 60: stalled training 0.4 s, written in 12.3 s  outputs/x/step_60"


@pytest.mark.parametrize(
    ("steps", "line"),
    [
        ((60, 0, 60), "done: step 60/60, 491k tokens, 2m05s"),
        ((60, 40, 60), "done: step 60/60, 491k tokens, 2m05s, since step 40"),
        ((60, 0, 100), "stopped at training.stop_at_step: step 60/100, 491k tokens, 2m05s"),
    ],
)
def test_run_end_is_one_line(steps: tuple[int, int, int], line: str) -> None:
    assert end_line(*steps, tokens=491_000, seconds=125.2) == line


def test_every_line_starts_with_the_time() -> None:
    now = datetime(2026, 11, 29, 4, 5, 6)
    assert with_timestamps("a\nb", Timestamps.off, now) == "a\nb"
    assert with_timestamps("a\nb", Timestamps.time, now) == "04:05:06 a\n04:05:06 b"
    assert with_timestamps("a", Timestamps.datetime, now) == "2026-11-29 04:05:06 a"
    stream = io.StringIO()
    with Console(total_steps=3, stream=stream, timestamps=Timestamps.datetime) as console:
        console.print("one\ntwo")
    assert re.fullmatch(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (one|two)\n){2}", stream.getvalue())


def test_banner_columns_are_aligned() -> None:
    assert banner({"device": "cpu", "out": "outputs/x"}) == "device  cpu\nout     outputs/x"


def test_console_in_a_pipe_is_plain() -> None:
    stream = io.StringIO()
    with Console(total_steps=3, stream=stream) as console:
        for step in (1, 2, 3):
            console.print(f"line {step}")
            console.advance(step)
    assert stream.getvalue() == "line 1\nline 2\nline 3\n"


class Terminal(io.StringIO):
    """A text stream whose `isatty` is True."""

    def isatty(self) -> bool:
        return True


def test_console_on_a_terminal_draws_a_bar_under_the_lines() -> None:
    stream = Terminal()
    with Console(total_steps=4, first_step=2, stream=stream) as console:
        console.print("a line")
        console.advance(4)
        console.close()
    text = stream.getvalue()
    assert "2/4" in text, "the bar starts at the step that the run resumes from"
    assert "a line\n" in text and "\r" in text


def test_disabled_console_prints_nothing() -> None:
    stream = Terminal()
    with Console(total_steps=4, enabled=False, stream=stream) as console:
        console.print("a line")
        console.advance(1)
    assert stream.getvalue() == ""
