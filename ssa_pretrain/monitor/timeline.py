"""The times of a run on disk, across restarts: `timeline.jsonl` in the run's folder, from which a report computes the goodput.

metrics.jsonl does not show where the time of a run went: a restart drops the records after its checkpoint, and with them the time that was lost. So rank 0
appends to this file, and nothing is ever removed from it:

    {"event": "start", "time": 1796000000.0, "began": 1795999990.0, "step": 0, "host": "node0", "processes": 8}
    {"event": "times", "time": …, "step": 500, "phase": "saving", "seconds": {"starting": 21.4, "training": 903.2, "evaluating": 40.1, "saving": 2.2}}
    {"event": "end", "time": …, "step": 500, "how": "stopped", "seconds": {…}}

A `start` begins a segment; "began" is when its process began. After a rollback the same process begins another one ("event": "rollback"). `times` has the
seconds of each phase since then. It is written when the phase changes, and once per INTERVAL within a long one, so a killed run loses the last INTERVAL at
most. A segment without an `end` was killed, or still runs. Seconds are monotonic; `time` and `began` are seconds since the epoch. A line is short and is
appended by one write, without a sync. If the disk is full, lines are missing and training continues.

What it does not do: it does not see the time before Python starts and after it ends (a scheduler's queue, a launcher's checks). A report counts it as
time between two segments.
"""

import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ssa_pretrain.errors import Interrupted

FILE_NAME = "timeline.jsonl"
INTERVAL = 30.0  # seconds between lines within a phase
STARTING, TRAINING, EVALUATING, SAVING = PHASES = ("starting", "training", "evaluating", "saving")
FINISHED, STOPPED, ROLLED_BACK, HUNG = "finished", "stopped", "rolled back", "hung"


@dataclass(slots=True)
class Segment:
    """The time of a run from a start, or from a rollback, on.

    Attributes:
        event: "start" or "rollback".
        began: when, in seconds since the epoch.
        step: steps done before it.
        host: of rank 0.
        processes: their number.
        marks: step and seconds of each phase since `began`, in order.
        last: time of its last line, in seconds since the epoch.
        how: how it ended; empty if it was killed or still runs.
    """

    event: str
    began: float
    step: int
    host: str = ""
    processes: int = 1
    marks: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    last: float = 0.0
    how: str = ""


class Timeline:
    """Writes the times of a run; only rank 0's writes.

    Args:
        folder: the run's output folder.
        processes: their number.
        enabled: True on the one process that writes.
        clock: monotonic, in seconds.
        now: seconds since the epoch.
    """

    def __init__(
        self,
        folder: Path,
        *,
        processes: int = 1,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._path, self._enabled, self._processes = folder / FILE_NAME, enabled, processes
        self._clock, self._now = clock, now
        self._phase, self._since, self._step = STARTING, clock(), 0
        self._written = self._since
        self._seconds: dict[str, float] = {}
        self._open = False  # whether a segment has begun and not ended
        self._segments = 0  # of this process

    @contextmanager
    def segment(self, step: int) -> Iterator[None]:
        """Yields within a segment that begins after `step` steps. An error within it ends it."""
        self.begin(step)
        try:
            yield
        except BaseException as error:
            self.end(STOPPED if isinstance(error, Interrupted) else type(error).__name__)
            raise

    def begin(self, step: int, began: float | None = None) -> None:
        """Begins a segment, a rollback if this process has begun one before.

        Args:
            step: optimizer steps done.
            began: when this process began, in seconds since the epoch; None: as the system knows it. Ignored after a rollback.
        """
        first, now = self._segments == 0, self._now()
        self._segments, self._open = self._segments + 1, True
        began = (psutil.Process().create_time() if began is None else began) if first else now
        self._seconds = {STARTING: max(0.0, now - began)}
        self._phase, self._step, self._since = STARTING, step, self._clock()
        event = {"event": "start" if first else "rollback", "time": now, "began": began, "step": step}
        self._append(event | {"host": socket.gethostname(), "processes": self._processes})

    def enter(self, phase: str, step: int) -> None:
        """Begins a phase and ends the one before.

        Args:
            phase: one of PHASES; any other counts as training.
            step: optimizer steps done before it.
        """
        phase = phase if phase in PHASES else TRAINING
        changed = phase != self._phase
        now = self._count(step)
        if changed or now - self._written > INTERVAL:
            self._append(
                {"event": "times", "time": self._now(), "step": step, "phase": phase, "seconds": self._rounded()}
            )
            self._written = now
        self._phase = phase

    def end(self, how: str, step: int | None = None) -> None:
        """Ends the segment. Does nothing without one, so the first reason counts.

        Args:
            how: FINISHED, STOPPED, ROLLED_BACK, HUNG, or the name of an error.
            step: optimizer steps done; None: those of the last phase.
        """
        if not self._open:
            return
        self._open = False
        self._count(self._step if step is None else step)
        line = {"event": "end", "time": self._now(), "step": self._step, "how": how, "seconds": self._rounded()}
        self._append(line)

    def _count(self, step: int) -> float:
        """Adds the time since the last call to the phase; returns the clock."""
        now = self._clock()
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
        self._since, self._step = now, step
        return now

    def _rounded(self) -> dict[str, float]:
        return {phase: round(seconds, 3) for phase, seconds in self._seconds.items()}

    def _append(self, line: Mapping[str, Any]) -> None:
        if self._enabled:
            with suppress(OSError), self._path.open("ab", buffering=0) as file:
                file.write(json.dumps(line).encode() + b"\n")


def read_timeline(folder: Path) -> list[Segment]:
    """Returns the segments of a run in order, empty without the file. Lines that a kill or a full disk has damaged are left out."""
    path, segments = folder / FILE_NAME, []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            _add(segments, json.loads(text))
    return segments


def _add(segments: list[Segment], line: dict[str, Any]) -> None:
    """Adds a line of the file to the segments; raises if it is not one."""
    if line["event"] in ("start", "rollback"):
        began, moment, step = float(line["began"]), float(line["time"]), int(line["step"])
        starting = {STARTING: max(0.0, moment - began)}
        host, processes = str(line.get("host", "")), int(line.get("processes", 1))
        segments.append(Segment(line["event"], began, step, host, processes, [(step, starting)], moment))
    elif segments:
        seconds = {str(phase): float(value) for phase, value in line["seconds"].items()}
        moment, step = float(line["time"]), int(line["step"])
        segments[-1].marks.append((step, seconds))
        segments[-1].last = moment
        segments[-1].how = str(line["how"]) if line["event"] == "end" else segments[-1].how
