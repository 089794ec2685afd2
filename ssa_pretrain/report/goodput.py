"""Goodput: the share of a run's time in which it trained steps that it kept, across restarts.

Computed from timeline.jsonl (monitor/timeline.py). The time from the start of the first process to the last line is split into

    training     steps that are part of the result
    repeated     steps that were trained and then lost: after the checkpoint that a later start, or a rollback, went back to
    evaluating   held-out rows and tasks
    saving       training stood still for a checkpoint
    starting     from the start of a process to its first step: importing, building the model, loading the checkpoint
    stopped      between the last line of one process and the start of the next: the detection of a failure, a queue, a pause

Goodput is training over all of it. The last three and `repeated` are what failures cost. The time of a checkpoint's step within a segment is interpolated
between the two lines around it; a save writes a line, so it is exact for a checkpoint's own step.

What it does not do: a slow step counts as training (see MFU for that), and so does the compilation within the first step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ssa_pretrain.monitor.timeline import EVALUATING, SAVING, STARTING, TRAINING, Segment

REPEATED, STOPPED = "repeated", "stopped"
RUNNING = "running"
PARTS: tuple[str, ...] = (TRAINING, REPEATED, EVALUATING, SAVING, STARTING, STOPPED)
MEANINGS = {
    TRAINING: "steps that were kept",
    REPEATED: "steps that were lost and trained again",
    EVALUATING: "held-out rows and tasks",
    SAVING: "training stood still for a checkpoint",
    STARTING: "from a process's start to its first step",
    STOPPED: "between two processes",
}


@dataclass(frozen=True, slots=True)
class Goodput:
    """Where the time of a run went.

    Attributes:
        seconds: by part, in the order of PARTS.
        starts: processes that trained it, one after the other.
        rollbacks: returns to a checkpoint within a process.
        began, last: first and last moment, in seconds since the epoch.
        how: how the last segment ended; RUNNING if it has not; empty: it was killed.
    """

    seconds: dict[str, float]
    starts: int
    rollbacks: int
    began: float
    last: float
    how: str

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """Goodput, from 0 to 1."""
        return self.seconds[TRAINING] / self.total if self.total else 0.0


def goodput(segments: Sequence[Segment], *, running: bool = False) -> Goodput | None:
    """Returns the goodput of a run; None without segments.

    Args:
        segments: of its timeline.
        running: whether a process trains it now.
    """
    if not segments:
        return None
    seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for index, segment in enumerate(segments):
        later = segments[index + 1 :]
        times = segment.marks[-1][1]
        for phase in (EVALUATING, SAVING, STARTING):
            seconds[phase] += times.get(phase, 0.0)
        trained = times.get(TRAINING, 0.0)
        kept = training_until(segment, min(one.step for one in later)) if later else trained
        seconds[TRAINING] += kept
        seconds[REPEATED] += trained - kept
        if later:
            seconds[STOPPED] += max(0.0, later[0].began - segment.last)
    starts = sum(segment.event == "start" for segment in segments)
    last = segments[-1]
    how = last.how or (RUNNING if running else "")
    return Goodput(seconds, starts, len(segments) - starts, segments[0].began, last.last, how)


def training_until(segment: Segment, step: int) -> float:
    """Returns the seconds that a segment trained up to a step, interpolated between its marks."""
    before_step, before = segment.step, 0.0
    for mark_step, times in segment.marks:
        seconds = times.get(TRAINING, 0.0)
        if mark_step > step:
            if step <= before_step:
                return before
            return before + (seconds - before) * (step - before_step) / (mark_step - before_step)
        before_step, before = mark_step, seconds
    return before
