"""A run's metrics: `metrics.jsonl` (one JSON object per line, one line per step), the console's lines, and trackers such as W&B.

The file is the record; console and trackers are views of it. Every line is flushed, so a killed run loses at most the line it was writing. Step is
the only clock: a run that resumes from step s first drops the records past s (in a new file that replaces the old one). So the file of a run
that was killed ten times equals the file of a run that was never killed, except for its times. Only one process writes. metrics_file.py reads and
repairs the file.

Speed is tokens over seconds in a window of recent steps, by the monotonic clock. The first step and pauses for evaluations do not distort it.

Records: {"kind": "train", "step", "tokens", "loss", "cross_entropy", ...}, {"kind": "evaluation", "step", "split", "mode", ...} and
{"kind": "task", "step", "task", "mode", ...}; {"kind": "checkpoint", "step", ...}, which is written when the checkpoint is published, a few
steps later, and may be missing after a kill; {"kind": "failed_save", "step", ...}, likewise. docs/metrics.md lists every key.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from ssa_pretrain.monitor.alerts import Alert, StepAlerts, failed
from ssa_pretrain.monitor.by_source import RECENT
from ssa_pretrain.monitor.console import Console, evaluation_line, task_line, train_line
from ssa_pretrain.monitor.metrics_file import (
    FILE_NAME,
    drop_records_after,
    evaluation_name,
    json_line,
    read_records,
    replace_damaged_file,
)


class Speed:
    """Tokens per second over recent steps, and the time left.

    Args:
        window: number of steps.
        clock: monotonic, in seconds.
    """

    def __init__(self, window: int = 20, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._window: deque[tuple[float, int]] = deque(maxlen=window)
        self._steps = 0
        self._last = clock()

    def step(self, tokens: int) -> float:
        """Counts a step and returns its seconds since the last step or the last `pause`.

        Args:
            tokens: tokens of this step.
        """
        now = self._clock()
        seconds, self._last = now - self._last, now
        self._steps += 1
        if self._steps == 2:
            self._window.clear()  # the first step compiles and allocates; it counts only until there is a second
        self._window.append((seconds, tokens))
        return seconds

    def pause(self) -> None:
        """Excludes the time since the last step (an evaluation, a checkpoint)."""
        self._last = self._clock()

    @property
    def tokens_per_second(self) -> float:
        """Mean over the window; 0 before the first step."""
        seconds = sum(entry[0] for entry in self._window)
        return sum(entry[1] for entry in self._window) / seconds if seconds > 0 else 0.0

    def eta(self, steps_left: int) -> float:
        """Returns the seconds that `steps_left` more steps take at the window's mean."""
        if not self._window:
            return 0.0
        return steps_left * sum(entry[0] for entry in self._window) / len(self._window)


class Tracker(Protocol):
    """A further view of a run's records, such as W&B.

    It must not stop training. If it fails, it prints one line and does nothing more.
    """

    def log(self, record: Mapping[str, Any]) -> None:
        """Takes a record of metrics.jsonl, except those of checkpoints and failed saves; after a restart, again from the first one on."""
        ...

    def alert(self, alert: Alert) -> None:
        """Tells people of an event, once: it is not repeated after a restart. After a hang, a thread beside the main one calls it."""
        ...

    def finish(self) -> None:
        """Ends the tracking; called once, after the last record."""
        ...


class MetricsLogger:
    """Writes a run's records to metrics.jsonl, the console and the trackers.

    Args:
        folder: the run's output folder.
        total_steps: the run's last step.
        tokens_per_step: the global batch, unless a record has another one (`batch_tokens`).
        total_tokens: of the run, for the time left if the batch changes.
        resume_step: step that the run continues after; records past it are dropped.
        interval: steps between console lines.
        flops_per_token: model FLOPs per token, forward and backward; None leaves TFLOP/s and MFU unknown.
        peak_flops: FLOP/s of all devices together; None leaves MFU unknown.
        console: for the lines; None builds one.
        trackers: they receive the records from before a restart first.
        enabled: True on the one process that writes.
        clock: monotonic, in seconds.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int,
        tokens_per_step: int,
        total_tokens: int = 0,
        resume_step: int = 0,
        interval: int = 10,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        console: Console | None = None,
        trackers: Sequence[Tracker] = (),
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.enabled = enabled
        self.total_steps = total_steps
        self.tokens_per_step, self.total_tokens = tokens_per_step, total_tokens
        self.interval = interval
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.console = console or Console(total_steps=total_steps, first_step=resume_step, enabled=enabled)
        self.speed = Speed(clock=clock)
        self._trackers = trackers
        self._step_alerts = StepAlerts()
        self.recent: deque[dict[str, Any]] = deque(maxlen=RECENT)  # the newest training records of this process
        self._file = None
        self._waiting = b""  # lines that could not be written yet: the disk was full
        self.evaluated: set[tuple[int, str]] = set()  # step and name of every evaluation (`evaluations`)
        if enabled:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / FILE_NAME
            if damage := replace_damaged_file(path):
                self.console.print(damage)
            drop_records_after(path, resume_step)
            for record in read_records(path) if path.exists() else ():
                self._forward(record)
            self._file = path.open("ab", buffering=0)

    def log_step(
        self, record: Mapping[str, Any], flops_per_token: float | None = None, num_tokens: int | None = None
    ) -> None:
        """Adds times and speeds to a training record and writes it.

        Args:
            record: at least step, tokens (since the start of the run), loss, cross_entropy (None: the step's data was left out) and
                learning_rate; plain numbers, lists, strings.
            flops_per_token: model FLOPs per token of this step, which depend on its documents; None: the logger's own.
            num_tokens: tokens of this step without padding, of which speeds are counted; None: all of the global batch.
        """
        if self._file is None:
            return
        batch = record.get("batch_tokens", self.tokens_per_step)
        trained = batch if num_tokens is None else num_tokens
        seconds = self.speed.step(trained if record["cross_entropy"] is not None else 0)
        rate = self.speed.tokens_per_second
        flops_per_token = flops_per_token or self.flops_per_token
        flops = rate * flops_per_token if flops_per_token else None
        full = {
            "kind": "train",
            **record,
            "tokens_per_second": rate,
            "tflops_per_second": flops / 1e12 if flops is not None else None,
            "mfu": flops / self.peak_flops if flops is not None and self.peak_flops else None,
            "seconds": seconds,
            "eta_seconds": self._seconds_left(record),
        }
        self._write(full)
        self.recent.append(full)
        if alert := self._step_alerts.judge(full):
            self.alert(alert)
        step = full["step"]
        if step % self.interval == 0 or step in (1, self.total_steps):
            self.console.print(train_line(full, self.total_steps))
        self.console.advance(step)

    def _seconds_left(self, record: Mapping[str, Any]) -> float:
        """Returns the time that the rest of the run takes at the recent speed: by steps, or by tokens if their number per step changes."""
        if "batch_tokens" in record and (rate := self.speed.tokens_per_second):
            return (self.total_tokens - record["tokens"]) / rate
        return self.speed.eta(self.total_steps - record["step"])

    def log_evaluation(self, record: Mapping[str, Any]) -> None:
        """Writes an evaluation's record. Its time does not count towards the speed.

        Args:
            record: step, tokens, split, mode, cross_entropy, captured_mass, captured_mass_by_layer, rows; perplexity is added.
        """
        if self._file is None:
            return
        full = {"kind": "evaluation", **record}
        full.setdefault("perplexity", perplexity(full["cross_entropy"]))
        self._write(full)
        self.console.print(evaluation_line(full))
        self.speed.pause()

    def log_task(self, record: Mapping[str, Any]) -> None:
        """Writes a task's record: step, tokens, task, mode, and the task's metrics. Its time does not count towards the speed."""
        if self._file is None:
            return
        full = {"kind": "task", **record}
        self._write(full)
        self.console.print(task_line(full))
        self.speed.pause()

    def log_checkpoint(self, record: Mapping[str, Any]) -> None:
        """Writes the record of a published checkpoint; trackers do not get it.

        Args:
            record: step, stall_seconds, write_seconds, bytes.
        """
        if self._file is not None:
            self._append(json_line({"kind": "checkpoint", **record}))

    def log_failed_save(self, record: Mapping[str, Any]) -> None:
        """Writes the record of a save that failed while training goes on; trackers do not get it.

        Args:
            record: step, reason, failed_in_a_row, next_step.
        """
        if self._file is not None:
            self._append(json_line({"kind": "failed_save", **record}))

    def alert(self, alert: Alert) -> None:
        """Passes an alert on to the trackers."""
        for tracker in self._trackers:
            tracker.alert(alert)

    def pause(self) -> None:
        """Excludes the time since the last step (a checkpoint, a wait) from the next step's time."""
        self.speed.pause()

    def close(self) -> None:
        """Closes the file, the bar and the trackers. May be called twice."""
        self.console.close()
        if self._file is not None:
            if self._waiting:
                self._append("")
            self._file.close()
            self._file = None
        trackers, self._trackers = self._trackers, ()
        for tracker in trackers:
            tracker.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.alert(failed(error))
        self.close()

    def _write(self, record: dict[str, Any]) -> None:
        """Appends a record to the file and forwards it."""
        assert self._file is not None
        self._append(json_line(record))
        self._forward(record)

    def _append(self, line: str) -> None:
        """Writes to the file. If the disk is full, the rest waits in memory until the next line."""
        assert self._file is not None
        late, self._waiting = bool(self._waiting), self._waiting + line.encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not late:
                self.console.print(
                    f"{FILE_NAME} cannot be written ({error.strerror}); training continues, and its records wait in memory"
                )
            return
        if late:
            self.console.print(f"{FILE_NAME} can be written again and has all records")

    def _forward(self, record: Mapping[str, Any]) -> None:
        """Forwards a record to the trackers and remembers which evaluations exist. A save's record comes after later steps, so it stays here."""
        if record.get("kind") in ("checkpoint", "failed_save"):
            return
        if name := evaluation_name(record):
            self.evaluated.add((record["step"], name))
        for tracker in self._trackers:
            tracker.log(record)


def perplexity(cross_entropy: float) -> float:
    """Returns exp of a cross entropy in nats: infinity if that overflows, NaN for NaN."""
    return math.inf if cross_entropy >= 700 else math.exp(cross_entropy)
