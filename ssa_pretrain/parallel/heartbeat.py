"""What a rank says about itself while a run trains, and who is missing when the ranks no longer move.

Every rank publishes a `Beat` about once per second: where its main thread is, for how long, and how many collectives it has called in each process
group. When a run hangs, nearly all ranks wait in a collective for one or a few that have not called it. `missing` finds those few, with the first
of these rules that leaves out a rank:

    1. a rank whose beats have stopped: its process is stopped, holds Python's lock in C, or its node is gone
    2. a rank that is at an earlier step, or in an earlier phase of it
    3. a rank that has called fewer collectives than another member of a group, unless it waits in another group for a rank that has called fewer still
    4. a rank whose main thread does not wait for other ranks, judged by the line that it executes

Collectives are counted when the host calls them. If all hosts have called the same and a device does not finish, no rule applies, and every rank is
named with its line. Point-to-point messages of a pipeline are not counted, so between stages only rules 1, 2 and 4 apply. Stdlib only.
"""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Self

# A main thread that executes such a line waits for other ranks or for its device.
WAITING_FOLDERS = ("torch/distributed/", "megatron/core/pipeline_parallel/", "deepspeed/comm/")
WAITING_CALLS = (".wait(", "synchronize(")
ENDED = "ended"  # the phase of a rank that needs no more watching
SHOWN_FRAMES = 8


@dataclass(frozen=True, slots=True)
class Beat:
    """The state of a rank at one moment.

    Attributes:
        rank, host, pid: who it is.
        count: number of this beat; it grows while the process runs.
        phase: what the main thread does: "building", "training", "evaluating", "saving".
        step: optimizer steps done before this phase.
        order: number of the phase since the process started; it is the same on all ranks.
        seconds: how long the phase has made no progress.
        limit: how long it may make none, in seconds; None: as long as it wants.
        collectives: calls of collectives by the name of the process group; only groups of several ranks.
        waits: whether the main thread waits for other ranks.
        stack: the main thread's lines, innermost first.
        own_seconds: this rank's own time per step, without waits (stragglers.py); None: not measured yet.
        trained: training steps done by this process.
        saved: checkpoints that it has published.
        time: when, on this node's monotonic clock.
    """

    rank: int
    host: str = ""
    pid: int = 0
    count: int = 0
    phase: str = ""
    step: int = 0
    order: int = 0
    seconds: float = 0.0
    limit: float | None = None
    collectives: dict[str, int] = field(default_factory=dict)
    waits: bool = False
    stack: list[str] = field(default_factory=list)
    own_seconds: float | None = None
    trained: int = 0
    saved: int = 0
    time: float = 0.0

    @property
    def is_stuck(self) -> bool:
        """Whether the phase has made no progress for longer than it may."""
        return self.limit is not None and self.seconds >= self.limit

    def encode(self) -> str:
        """Returns the beat as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str | bytes) -> Self:
        """Returns the beat of a line that `encode` wrote."""
        return cls(**json.loads(text))

    @property
    def name(self) -> str:
        """Such as "rank 3 (node2, pid 4711)"."""
        return f"rank {self.rank}" + (f" ({self.host}, pid {self.pid})" if self.host else "")

    @property
    def place(self) -> str:
        """Where the phase is, for a sentence: "training step 13" is under way after 12 steps; "saving after step 12"."""
        if self.phase == "training":
            return f"training step {self.step + 1}"
        return f"{self.phase} after step {self.step}" if self.step else self.phase


def missing(beats: Sequence[Beat], silent: Collection[int] = ()) -> list[Beat]:
    """Returns the beats of the ranks that the others wait for; all of them if no rule tells them apart.

    Args:
        beats: the last beat of every rank.
        silent: ranks whose beats have stopped.
    """
    if found := [beat for beat in beats if beat.rank in silent]:
        return found
    rules: list[Callable[[list[Beat]], list[Beat]]] = [_behind, _fewer_collectives, _not_waiting]
    found = list(beats)
    for rule in rules:
        found = rule(found) or found
    return found


def _behind(beats: list[Beat]) -> list[Beat]:
    first = min((beat.order for beat in beats), default=0)
    return [beat for beat in beats if beat.order == first]


def _fewer_collectives(beats: list[Beat]) -> list[Beat]:
    """Leaves out a rank that has called a collective which another of these ranks has not."""

    def waits_for(one: Beat, other: Beat) -> bool:
        shared = one.collectives.keys() & other.collectives.keys()
        return any(one.collectives[group] > other.collectives[group] for group in shared)

    return [one for one in beats if not any(waits_for(one, other) for other in beats)]


def _not_waiting(beats: list[Beat]) -> list[Beat]:
    return [beat for beat in beats if not beat.waits]


def describe_process(pid: int) -> str:
    """Returns what this node's kernel says about a process that gives no sign of life; empty for a process elsewhere or an ordinary state."""
    try:
        state = next(
            line.split(maxsplit=1)[1]
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if line.startswith("State:")
        )
    except (OSError, StopIteration):
        return ""
    return {
        "T": "its process is stopped (SIGSTOP)",
        "t": "a debugger has stopped its process",
        "D": "its process waits in the kernel, most likely for storage or a device",
        "Z": "its process has died",
        "R": "its process is running without giving up Python's lock",
    }.get(state[0], "")


def main_stack(frame: FrameType | None) -> list[str]:
    """Returns a thread's lines, innermost first, as "rows.py:88 read_row: source line"."""
    lines: list[str] = []
    while frame is not None and len(lines) < SHOWN_FRAMES:
        path, number = Path(frame.f_code.co_filename), frame.f_lineno
        lines.append(f"{'/'.join(path.parts[-3:])}:{number} in {frame.f_code.co_name}")
        frame = frame.f_back
    return lines


def waits_for_others(frame: FrameType | None) -> bool:
    """Returns whether a thread waits for other ranks or a device, by the line that it executes."""
    import linecache

    if frame is None:
        return False
    path = frame.f_code.co_filename
    line = linecache.getline(path, frame.f_lineno or 0)  # None: an instruction that belongs to no line
    return any(folder in path for folder in WAITING_FOLDERS) or any(call in line for call in WAITING_CALLS)
