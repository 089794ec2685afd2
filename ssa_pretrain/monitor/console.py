"""A run's console output: a banner, one line per logging interval, evaluation and checkpoint, a last line, and a progress bar on a terminal.

One process prints; the others get a `Console` that prints nothing. On a terminal, lines scroll above the progress bar. In a pipe they are plain
text without control characters, so a log file is readable. A training line has at most 120 columns, plus the time if `logging.timestamps` is
set. The formatting functions are pure: they turn a record of metrics.jsonl into text.
"""

import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from tqdm import tqdm

from ssa_pretrain.config import Timestamps
from ssa_pretrain.settings.quantities import compact, duration

MAX_COLUMNS = 120
FORMATS = {Timestamps.off: "", Timestamps.time: "%H:%M:%S ", Timestamps.datetime: "%Y-%m-%d %H:%M:%S "}


def train_line(record: Mapping[str, Any], total_steps: int) -> str:
    """Returns one line for a training record, at most 120 columns. Missing values are left out.

    Args:
        record: a "train" record of metrics.jsonl.
        total_steps: the run's last step.
    """
    width = len(str(total_steps))
    parts = {
        "step": f"step {record['step']:>{width}}/{total_steps}",
        "tokens": f"{compact(record['tokens']):>5} tok",
        "loss": f"loss {_number(record['loss'], '.3f')}",
    }
    if record.get("skipped"):
        parts["loss"] = "skipped, data left out" if record["cross_entropy"] is None else "skipped"
    if record.get("alignment_loss") is not None:
        parts["ce"] = f"ce {_number(record['cross_entropy'], '.3f')}"
        parts["align"] = f"align {_number(record['alignment_loss'], '#.2g')}"
    if record.get("index_loss") is not None:
        parts["index"] = f"index {_number(record['index_loss'], '#.2g')}"
    if record.get("captured_mass") is not None:
        parts["mass"] = f"mass {record['captured_mass']:.2f}"
    if record.get("grad_norm") is not None:
        parts["gnorm"] = f"gnorm {_number(record['grad_norm'], '#.2g')}"
    parts["lr"] = f"lr {_number(record['learning_rate'], '.1e')}"
    parts["speed"] = f"{compact(record['tokens_per_second'])} tok/s"
    if record.get("mfu") is not None:  # None if the device's peak is unknown; FLOP/s tell little then
        parts["flops"] = f"{_number(record['tflops_per_second'], '#.3g')} TF/s"
        parts["mfu"] = f"MFU {record['mfu']:.0%}"
    if record.get("peak_memory_gib") is not None:
        parts["memory"] = f"mem {record['peak_memory_gib']:.1f}G"
    if record.get("eta_seconds") is not None:
        parts["eta"] = f"ETA {duration(record['eta_seconds'])}"
    return _join(parts)


def evaluation_line(record: Mapping[str, Any]) -> str:
    """Returns one line for an evaluation record, at most 120 columns."""
    parts = {
        "step": f"eval {record['step']}",
        "what": f"{record['split']} {record['mode']}",
        "ce": f"ce {_number(record['cross_entropy'], '.3f')}",
        "perplexity": f"perplexity {_number(record['perplexity'], '.2f')}",
    }
    if record.get("captured_mass") is not None:
        parts["mass"] = f"mass {record['captured_mass']:.2f}"
    if record.get("rows") is not None:
        parts["rows"] = f"{record['rows']} rows"
    return _join(parts)


def task_line(record: Mapping[str, Any]) -> str:
    """Returns one line for a task's record: its metrics without standard errors and counts, as many of the first as fit into 120 columns."""
    line = f"eval {record['step']}  task {record['task']} {record['mode']}"
    for name, value in record.items():
        if isinstance(value, float) and not name.endswith("_stderr"):
            longer = f"{line}  {name} {_number(value, '.4g')}"
            line = longer if len(longer) <= MAX_COLUMNS else line
    return line


def save_line(step: int, stall_seconds: float, write_seconds: float, folder: Path) -> str:
    """Returns the line for a published checkpoint.

    Args:
        step: optimizer steps done.
        stall_seconds: for which training stood still.
        write_seconds: from the start of the save until old checkpoints were removed.
        folder: the checkpoint's.
    """
    times = f"stalled training {stall_seconds:.1f} s, written in {write_seconds:.1f} s"
    return f"saved step {step}: {times}  {folder}"


def failed_save_line(reason: str, next_step: int, left: int, most: int) -> str:
    """Returns the line for a save that failed while training goes on.

    Args:
        reason: of the failure.
        next_step: whose save is the next one.
        left: further saves in a row that may fail.
        most: `checkpoint.max_failed_saves`.
    """
    more = f"{left} more in a row may fail" if left else "if that fails too, the run ends"
    return f"{reason}; training goes on, the next save is that of step {next_step}, and {more} (checkpoint.max_failed_saves={most})"


def wait_line(step: int, seconds: float) -> str:
    """Returns the line for a save that had to wait for the one before it."""
    return (
        f"the save of step {step} waited {seconds:.1f} s until the one before it was written: raise checkpoint.interval, "
        "or write to faster storage"
    )


def end_line(step: int, first_step: int, total_steps: int, tokens: int, seconds: float) -> str:
    """Returns the last line of a run that ended without an error.

    Args:
        step: optimizer steps done.
        first_step: steps done before this process started.
        total_steps: the run's last step; `step` is smaller if training.stop_at_step stopped the run.
        tokens: trained on since the start of the run.
        seconds: training time of this process, including evaluations and checkpoints.
    """
    what = "done" if step >= total_steps else "stopped at training.stop_at_step"
    since = f", since step {first_step}" if first_step else ""
    return f"{what}: step {step}/{total_steps}, {compact(tokens)} tokens, {duration(seconds)}{since}"


def with_timestamps(text: str, timestamps: Timestamps, now: datetime | None = None) -> str:
    """Returns text with the time at the start of each line.

    Args:
        text: one line or several.
        timestamps: format of the time; off returns the text unchanged.
        now: local time; None: the current time.
    """
    if timestamps is Timestamps.off:
        return text
    prefix = (now or datetime.now()).strftime(FORMATS[timestamps])
    return "\n".join(prefix + line for line in text.split("\n"))


def banner(facts: Mapping[str, str]) -> str:
    """Returns facts as lines "name  value", with the names in one column."""
    width = max((len(name) for name in facts), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())


class Console:
    """Prints a run's lines. On a terminal they scroll above a progress bar that counts steps.

    Args:
        total_steps: the run's last step.
        first_step: steps done before this process started (a resume).
        enabled: True on one process only; the others print nothing.
        stream: standard error by default, which torchrun passes through unbuffered.
        timestamps: format of the time before each line.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        first_step: int = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
        timestamps: Timestamps = Timestamps.off,
    ) -> None:
        self.total_steps, self.timestamps = total_steps, timestamps
        self.enabled = enabled
        self.stream = stream or sys.stderr
        self._bar: tqdm | None = None
        if enabled and self.stream.isatty():
            self._bar = tqdm(
                total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, file=self.stream, leave=False
            )

    def print(self, text: str) -> None:
        """Prints text of one or more lines."""
        if not self.enabled:
            return
        text = with_timestamps(text, self.timestamps)
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
            return
        self.stream.write(text + "\n")
        self.stream.flush()

    def advance(self, step: int) -> None:
        """Moves the bar to a step. Does nothing in a pipe."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _number(value: float | None, form: str) -> str:
    """Returns a formatted number with an unpadded exponent. None stands for nan and inf."""
    if value is None:
        return "nan"
    return format(value, form).rstrip(".").replace("e-0", "e-").replace("e+0", "e+")


def _join(parts: dict[str, str]) -> str:
    """Joins parts into one line: two spaces apart if they fit, else one space, else without the least important parts."""
    for dropped in (set(), {"flops"}, {"flops", "gnorm"}, {"flops", "gnorm", "ce"}, {"flops", "gnorm", "ce", "memory"}):
        kept = [text for name, text in parts.items() if name not in dropped]
        for gap in ("  ", " "):
            if len(gap.join(kept)) <= MAX_COLUMNS:
                return gap.join(kept)
    return " ".join(kept)[:MAX_COLUMNS]
