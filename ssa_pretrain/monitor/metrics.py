"""A run's numbers: `metrics.jsonl` (one JSON object a line, every step), the console's lines, and W&B.

The file is the record; console and W&B are views of it. Every line is flushed, so that a killed run loses at most the line it was writing.
Step is the only clock: a run that resumes from step s first drops the records past s (in a new file, renamed over the old one), so that the
file of a run killed ten times equals that of a run never killed, but for the times in it. Only one process writes. A resumed run that finds a
line which is no record keeps the file as `metrics.jsonl.damaged-1` and goes on with the other lines: the file is a log, the checkpoint decides.

Speed is tokens over seconds in a window of recent steps, by the monotonic clock, so that neither the first step nor a pause for an
evaluation bends it for long. Numbers that JSON does not have (nan, inf) are written as null: every line stays readable by any reader.

Records: {"kind": "train", "step", "tokens", "loss", "cross_entropy", ...} and {"kind": "evaluation", "step", "split", "mode", ...};
docs/metrics.md lists every key.
"""

import itertools
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ssa_pretrain.monitor.console import Console, evaluation_line, train_line
from ssa_pretrain.monitor.tracking import Tracker

FILE_NAME = "metrics.jsonl"


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics file in order, without a last line that a killed run left unfinished.

    Args:
        path: metrics.jsonl.

    Raises:
        ValueError: a line other than the last is no JSON object.
    """
    for number, _, record in _parsed(path):
        if isinstance(record, str):
            raise ValueError(f"{path}:{number} {record}; remove the line or start a new output_dir")
        yield record


def evaluations(path: Path) -> set[tuple[int, str]]:
    """Returns step and mode of every evaluation in a metrics file, which need not exist; lines that are not records are passed over."""
    records = [record for _, _, record in _parsed(path) if isinstance(record, dict)] if path.exists() else []
    return {(record["step"], record.get("mode", "")) for record in records if record.get("kind") == "evaluation"}


def set_aside_damage(path: Path) -> str | None:
    """Moves a metrics file that holds lines which are no records aside, whole, and puts the records of it in its place.

    Args:
        path: metrics.jsonl; need not exist.

    Returns:
        What happened, in a sentence; None where every line but an unfinished last one is a record.
    """
    if not path.exists():
        return None
    lines = list(_parsed(path))
    bad = [(number, record) for number, _, record in lines if isinstance(record, str)]
    if not bad:
        return None
    numbers = itertools.count(1)
    aside = next(p for p in (path.with_name(f"{path.name}.damaged-{n}") for n in numbers) if not p.exists())
    fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with fresh.open("wb") as file:
        file.writelines(line.rstrip(b"\n") + b"\n" for _, line, record in lines if not isinstance(record, str))
        file.flush()
        os.fsync(file.fileno())
    os.replace(path, aside)
    os.replace(fresh, path)
    number, what = bad[0]
    count = f" ({len(bad)} such lines)" if len(bad) > 1 else ""
    return f"{path}:{number} {what}{count}: the file was kept as {aside.name}, and the run goes on with the records of the other lines"


def _parsed(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any] | str]]:
    """A metrics file's lines, counted from 1, each with its record or with what is wrong with it; an unfinished last line is left out."""
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            if number < len(lines) or line.endswith(b"\n"):
                yield number, line, "is not a JSON object"
            continue
        whole = isinstance(record, dict) and type(record.get("step")) is int
        yield number, line, record if whole else "is no record of a step"


def keep_until(path: Path, step: int) -> int:
    """Drops the records past a step, atomically.

    Args:
        path: metrics.jsonl; need not exist.
        step: last step that stays, the one the run resumes from; 0 (a run that starts anew) drops everything.

    Returns:
        How many records were dropped.
    """
    if not path.exists():
        return 0
    dropped = 0
    fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with fresh.open("w", encoding="utf-8") as file:
        for record in read_records(path):
            if 0 < step >= record["step"]:
                file.write(_line(record))
            else:
                dropped += 1
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
    return dropped


class Speed:
    """Tokens a second over the last steps, and the time that the rest will take.

    Args:
        window: steps that count.
        clock: seconds that never go back.
    """

    def __init__(self, window: int = 20, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._marks: deque[tuple[float, int]] = deque(maxlen=window)
        self._steps = 0
        self._last = clock()

    def step(self, tokens: int) -> float:
        """Counts a step and returns the seconds it took since the last one or the last `pause`.

        Args:
            tokens: tokens of this step.
        """
        now = self._clock()
        seconds, self._last = now - self._last, now
        self._steps += 1
        if self._steps == 2:
            self._marks.clear()  # the first step compiles and allocates; it stands in only until there is a second
        self._marks.append((seconds, tokens))
        return seconds

    def pause(self) -> None:
        """Leaves out of the count the time since the last step (an evaluation, a checkpoint)."""
        self._last = self._clock()

    @property
    def tokens_per_second(self) -> float:
        """Over the window; 0 before the first step."""
        seconds = sum(mark[0] for mark in self._marks)
        return sum(mark[1] for mark in self._marks) / seconds if seconds > 0 else 0.0

    def eta(self, steps_left: int) -> float:
        """Seconds that `steps_left` more steps take at the window's mean."""
        if not self._marks:
            return 0.0
        return steps_left * sum(mark[0] for mark in self._marks) / len(self._marks)


class MetricsLogger:
    """Writes a run's records to metrics.jsonl, the console and the tracker.

    Args:
        folder: the run's output folder.
        total_steps: the run's last step.
        tokens_per_step: the global batch.
        resume_step: step the run starts after; records past it are dropped.
        interval: steps between console lines.
        flops_per_token: model FLOPs of a token, forward and backward; None leaves TFLOP/s and MFU unknown.
        peak_flops: FLOP/s of all devices together; None leaves MFU unknown.
        console: where lines go; None makes one.
        tracker: W&B, or None; it is shown the records of before a restart first.
        enabled: True on the one process that writes.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int,
        tokens_per_step: int,
        resume_step: int = 0,
        interval: int = 10,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        console: Console | None = None,
        tracker: Tracker | None = None,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.enabled = enabled
        self.total_steps = total_steps
        self.tokens_per_step = tokens_per_step
        self.interval = interval
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.console = console or Console(total_steps=total_steps, first_step=resume_step, enabled=enabled)
        self.speed = Speed(clock=clock)
        self._tracker = tracker
        self._file = None
        self._waiting = b""  # lines that a full disk has not taken
        self.evaluated: set[tuple[int, str]] = set()  # (step, mode) of every record of an evaluation
        if enabled:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / FILE_NAME
            if damage := set_aside_damage(path):
                self.console.print(damage)
            keep_until(path, resume_step)
            for record in read_records(path) if path.exists() else ():
                self._note(record)
            self._file = path.open("ab", buffering=0)

    def log_step(self, record: Mapping[str, Any], flops_per_token: float | None = None) -> None:
        """Completes a training record with its times and speeds and writes it.

        Args:
            flops_per_token: model FLOPs of a token of this step, whose documents decide them; None: the logger's own.
            record: at least step, tokens (since the run's beginning), loss, cross_entropy and learning_rate; plain numbers, lists, strings.
        """
        if self._file is None:
            return
        seconds = self.speed.step(self.tokens_per_step)
        rate = self.speed.tokens_per_second
        a_token = flops_per_token or self.flops_per_token
        flops = rate * a_token if a_token else None
        full = {
            "kind": "train",
            **record,
            "tokens_per_second": rate,
            "tflops_per_second": flops / 1e12 if flops is not None else None,
            "mfu": flops / self.peak_flops if flops is not None and self.peak_flops else None,
            "seconds": seconds,
            "eta_seconds": self.speed.eta(self.total_steps - record["step"]),
        }
        self._write(full)
        step = full["step"]
        if step % self.interval == 0 or step in (1, self.total_steps):
            self.console.print(train_line(full, self.total_steps))
        self.console.advance(step)

    def log_evaluation(self, record: Mapping[str, Any]) -> None:
        """Writes an evaluation's record; its time does not count in the speed of the steps.

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

    def pause(self) -> None:
        """Says that what happened since the last step (a checkpoint, a wait) is no part of the next one's time."""
        self.speed.pause()

    def close(self) -> None:
        """Ends the file, the bar and the tracker; safe to call twice."""
        self.console.close()
        if self._file is not None:
            if self._waiting:
                self._append("")
            self._file.close()
            self._file = None
        if self._tracker is not None:
            self._tracker.finish()
            self._tracker = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, record: dict[str, Any]) -> None:
        """Appends one line, whole, and shows the record to the tracker."""
        assert self._file is not None
        self._append(_line(record))
        self._note(record)

    def _append(self, line: str) -> None:
        """Writes to the file. What a full disk does not take waits in memory for the next line."""
        assert self._file is not None
        late, self._waiting = bool(self._waiting), self._waiting + line.encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not late:
                self.console.print(
                    f"{FILE_NAME} cannot be written ({error.strerror}); training goes on, and its records wait in memory"
                )
            return
        if late:
            self.console.print(f"{FILE_NAME} can be written again, and has all records")

    def _note(self, record: Mapping[str, Any]) -> None:
        """Shows a record of the file to what else wants to know of it."""
        if record.get("kind") == "evaluation":
            self.evaluated.add((record["step"], record.get("mode", "")))
        if self._tracker is not None:
            self._tracker.log(record)


def perplexity(cross_entropy: float) -> float:
    """Exp of a cross entropy in nats; infinity where that is too large to hold, NaN of NaN."""
    return math.inf if cross_entropy >= 700 else math.exp(cross_entropy)


def _line(record: Mapping[str, Any]) -> str:
    """A record as one line of JSON."""
    return json.dumps(_finite(record), allow_nan=False, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    """The value with null for what JSON cannot say."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
