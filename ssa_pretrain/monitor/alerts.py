"""Alerts: what a person should know at once. Each tracker passes them on in its own way, W&B by mail or Slack (`wandb.alert`).

    error     the run hung; it ended with an error, such as diverged training
    warning   a step was skipped because its numbers are not finite (the first of a row of such steps); a loss spike; a save failed and training
              goes on; the run starts again after it was killed or hung
    info      the run has finished, or has stopped on request; a save succeeds after failed ones

An alert is not a record of metrics.jsonl: it is sent once, when it happens, and not again after a restart. A rank 0 that is killed cannot send one, so
the next start reports how the one before ended. The console and metrics.jsonl have the same facts, whether or not there is a tracker.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ssa_pretrain.errors import Interrupted
from ssa_pretrain.monitor.timeline import FINISHED, HUNG, ROLLED_BACK, STOPPED, Segment
from ssa_pretrain.settings.quantities import compact, duration

LONGEST = 2000  # characters of a text; W&B's limit is higher, Slack's is 3,000


class Level(StrEnum):
    """How urgent an alert is."""

    info = "info"
    warning = "warning"
    error = "error"


@dataclass(frozen=True, slots=True)
class Alert:
    """A message for people.

    Attributes:
        title: a few words, the same for the same kind of event; trackers group by it.
        text: what happened, in a sentence or more.
        level: how urgent it is.
        step: optimizer steps done; None if unknown.
    """

    title: str
    text: str
    level: Level = Level.warning
    step: int | None = None


class StepAlerts:
    """The alerts on training steps: the first of a row of skipped steps, and loss spikes."""

    def __init__(self) -> None:
        self._skipping = False

    def judge(self, record: Mapping[str, Any]) -> Alert | None:
        """Returns the alert on a step; call it once for each training record, in order."""
        step, was_skipping = record["step"], self._skipping
        self._skipping = record.get("skip_reason") == "not finite"
        if self._skipping and not was_skipping:
            text = (
                f"step {step} is not finite (cross entropy {_number(record['cross_entropy'])}, gradient norm "
                f"{_number(record.get('grad_norm'))}) and was skipped on all ranks; the weights are unchanged"
            )
            return Alert("not finite", text, Level.warning, step)
        if record.get("spike"):
            text = (
                f"step {step}: {record['spike']} cross entropy {record['spike_cross_entropy']:.3f} is {record['spike_deviations']:.0f} deviations "
                "above the median of the steps before"
            )
            return Alert("loss spike", text, Level.warning, step)
        return None


def hung(report: str, step: int | None = None) -> Alert:
    """Returns the alert on a hang; `report` is the watchdog's."""
    return Alert(HUNG, report[:LONGEST], Level.error, step)


def save_failed(text: str, step: int) -> Alert:
    """Returns the alert on a failed save after which training goes on; `text` is the console's line."""
    return Alert("save failed", text[:LONGEST], Level.warning, step)


def saved_again(step: int, num_failed: int) -> Alert:
    """Returns the alert on the first successful save after failed ones."""
    text = f"step {step:,} is saved, after {num_failed} failed save{'s' * (num_failed > 1)}"
    return Alert("saved again", text, Level.info, step)


def finished(step: int, total_steps: int, tokens: int, seconds: float) -> Alert:
    """Returns the alert on a run that ended without an error.

    Args:
        step: optimizer steps done.
        total_steps: the run's last step; `step` is smaller if training.stop_at_step stopped the run.
        tokens: trained on since the start of the run.
        seconds: of this process.
    """
    title = FINISHED if step >= total_steps else STOPPED
    return Alert(
        title, f"step {step:,} of {total_steps:,}, {compact(tokens)} tokens, {duration(seconds)}", Level.info, step
    )


def failed(error: BaseException, step: int | None = None) -> Alert:
    """Returns the alert on a run that an error ended; a stop on request is not a failure."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, Interrupted):
        return Alert(STOPPED, text[:LONGEST], Level.info, step)
    return Alert("failed", f"{type(error).__name__}: {text}"[:LONGEST], Level.error, step)


def restarted(before: Sequence[Segment], step: int, now: float) -> Alert | None:
    """Returns the alert on a start after one that was killed or hung; None after an orderly end or without one.

    Args:
        before: the segments of the run's timeline.
        step: the step that the run continues after.
        now: seconds since the epoch.
    """
    if not before or before[-1].how in (FINISHED, STOPPED, ROLLED_BACK):
        return None
    last = before[-1]
    done = last.marks[-1][0]
    how = f"ended by {last.how}" if last.how not in ("", HUNG) else "hung" if last.how else "was killed"
    text = (
        f"the start before {how} at about step {done:,}, {duration(now - last.last)} ago; training continues after step {step:,}, and "
        f"{max(0, done - step):,} steps are trained again"
    )
    return Alert("restarted", text, Level.warning, step)


def _number(value: float | None) -> str:
    return "nan" if value is None or math.isnan(value) else f"{value:g}"
