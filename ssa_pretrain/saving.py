"""When a run saves, and how: beside training (`checkpoint.asynchronous`) or while it waits.

A save beside training has two parts. Between two steps the engine copies its state to host memory; only this stalls training. A thread of each rank
then writes, hashes and publishes the copy. At most one save is under way, so the next one waits for it and reports how long. The last save of a run,
and the one of a run that is asked to stop, have nothing to run beside, so training waits for them and no copy is made.

Whichever way, a checkpoint has the same content, and no step sees a difference.

A save that fails does not end the run at once: the state in memory is sound, and the storage may recover. The next save is the regular one, or after
RETRY_SECONDS if that is sooner; rank 0 measures time, so it chooses that step and tells the others. `checkpoint.max_failed_saves` in a row may fail. This
holds for a failure on which all ranks have agreed (`SaveError`). Any other, such as a rank that fails in the middle of a collective, ends the run, and so
does a failure of the last save.

With `checkpoint.interval=auto` the interval follows from what the last save cost (planning/checkpoint_interval.py). Rank 0 chooses, at the end of a save,
and tells the others. They use it from the next save on, before which all ranks have waited for this one. So all ranks save after the same steps.
"""

import math
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from ssa_pretrain.checkpoint.background import BackgroundSave
from ssa_pretrain.checkpoint.host_memory import memory_warning
from ssa_pretrain.checkpoint.mirror import Mirror, leave_together
from ssa_pretrain.checkpoint.publish import publish
from ssa_pretrain.checkpoint.storage import patiently
from ssa_pretrain.config import Auto
from ssa_pretrain.errors import CheckpointError, CommandError, SaveError
from ssa_pretrain.health import FILE_NAME, require_finite_weights
from ssa_pretrain.monitor.alerts import save_failed, saved_again
from ssa_pretrain.monitor.console import failed_save_line, save_line, wait_line
from ssa_pretrain.monitor.metrics import MetricsLogger
from ssa_pretrain.parallel.agreement import agree
from ssa_pretrain.parallel.state import timeout
from ssa_pretrain.planning.checkpoint_interval import (
    FIRST_STEPS,
    SaveCost,
    best_interval,
    explain,
    hours_between_failures,
)
from ssa_pretrain.run import Run

NOTICEABLE_SECONDS = 0.1  # a shorter wait is not reported
RETRY_SECONDS = (
    300.0  # until a failed save is tried again, if the regular one is not due before: servers restart in minutes
)
SMALL_CHANGE = 0.2  # a chosen interval stays while the next measurement would change it by a smaller share


@dataclass(frozen=True, slots=True)
class Saved:
    """A published checkpoint.

    Attributes:
        folder: its folder.
        step: optimizer steps done.
        stall_seconds: for which training stood still, on this rank.
        write_seconds: from the start of the save until old checkpoints were removed.
        size: bytes of its files; 0 on ranks other than 0.
        interval: the steps until the next save that rank 0 chose; 0 unless `checkpoint.interval=auto`.
        explanation: of a new choice, for the user; empty if the interval stays.
    """

    folder: Path
    step: int
    stall_seconds: float
    write_seconds: float
    size: int
    interval: int = 0
    explanation: str = ""


class Saver:
    """Saves the checkpoints of a run, as a context manager around its training.

    Args:
        run: the run.
        log: receives a line and a record of each checkpoint.
        step: steps done before this process started.
        published: called on every rank when a checkpoint is published.
    """

    def __init__(self, run: Run, log: MetricsLogger, step: int, *, published: Callable[[], None]) -> None:
        self._run, self._log, self._published = run, log, published
        settings = run.config.checkpoint
        self._auto = isinstance(settings.interval, Auto)
        self._interval = FIRST_STEPS if isinstance(settings.interval, Auto) else settings.interval
        self._chosen = False  # whether the interval comes from a measurement
        self._next = self._regular_after(step)
        self._failed = 0  # saves in a row
        self._pending: BackgroundSave[Saved] | None = None
        self._group: dist.ProcessGroup | None = None
        self._mirror: Mirror | None = None
        if settings.mirror and run.placement.is_rank_0:
            in_use, report = run.verdicts.in_use, log.console.print
            self._mirror = Mirror(settings.mirror, keep=settings.keep, in_use=in_use, report=report)
        if settings.asynchronous:
            group = dist.new_group(backend="gloo", timeout=timeout(run.config.parallel))
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
            if self._interval and (shortage := memory_warning(run.plan.checkpoint_bytes)):
                run.print(shortage)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for the save that is under way, unless this rank fails by itself: then the others may never come to finish it."""
        of_all_ranks = error is None or (isinstance(error, CommandError) and not error.of_one_rank)
        if not (of_all_ranks or dist.get_world_size() == 1):
            return
        failure = None
        if self._pending is not None:
            try:
                self._finish(self._pending.wait())
            except CheckpointError as found:
                failure = found
        self._finish_mirror()
        if failure is not None and error is None:
            raise failure
        if failure is not None and failure is not error:
            self._run.print(str(failure))  # the other error ends the run

    def is_due(self, step: int) -> bool:
        """Returns whether a checkpoint is due after this step, the same on every rank."""
        return step == self._run.last_step or step >= self._next

    def after_step(self, step: int) -> None:
        """Finishes a save that has ended; every rank calls this after each step.

        Raises:
            CheckpointError: the save has failed, as one too many; on all ranks after the same step.
        """
        if self._pending is None:
            return
        try:
            saved = self._pending.poll(step)
        except SaveError as error:
            self._tolerate(error, self._pending.step, step)
        else:
            if saved is not None:
                self._finish(saved)

    def save(self, step: int, *, wait: bool) -> None:
        """Saves after a step, beside the next steps if the run continues; every rank calls it. The stall does not count towards the training speed.

        Args:
            step: steps done.
            wait: whether the run ends after this save.

        Raises:
            CheckpointError: this save has failed, or the one before it, as one too many; if the run ends after it, this one.
            DivergedError, ReplicaError: weights or moments are not finite, or data ranks hold different copies; nothing is saved.
        """
        save = _Save(step, time.monotonic(), self._step_seconds(), self._run.contract(step), self._run.health.text())
        self._next = step
        try:
            self.wait(step)
        except CheckpointError as error:
            if not wait:
                raise
            # Whatever it was may have passed, and no later step saves.
            self._pending = None
            self._report(f"{error}; step {step} is saved now")
        require_finite_weights(self._run.engine, step)
        self._run.engine.require_equal_replicas(step)
        self._next = self._regular_after(step)
        if self._group is None or wait:
            self._save_now(save, wait=wait)
        else:
            self._pending = self._begin(save, self._group)
        self._log.pause()

    def _regular_after(self, step: int) -> int:
        """Returns the step of the first regular save after this step."""
        if self._auto:
            return step + self._interval
        return (step // self._interval + 1) * self._interval if self._interval else self._run.last_step

    def _save_now(self, save: "_Save", *, wait: bool) -> None:
        """Writes the live state while training waits; the arguments are those of `save`."""
        try:
            self._finish(self._publish(save, self._write, None))
        except SaveError as error:
            if wait:
                raise
            self._tolerate(error, save.step, save.step)
        else:
            self._next = self._regular_after(save.step)  # by a new interval, if this save has changed it

    def _tolerate(self, error: SaveError, failed_step: int, step: int) -> None:
        """Takes note of a failed save; every rank calls it after the same step, and no save is under way then.

        Args:
            error: the failure.
            failed_step: the step that was not saved.
            step: steps done.

        Raises:
            SaveError: it is one too many.
        """
        self._pending = None
        self._failed += 1
        most = self._run.config.checkpoint.max_failed_saves
        if self._failed > most:
            raise SaveError(f"{error.reason}; {self._failed} saves in a row have failed") if most else error
        self._next = min(self._next, step + self._retry_steps())
        next_step = min(self._next, self._run.last_step)
        line = failed_save_line(error.reason, next_step, most - self._failed, most)
        self._log.console.print(line)
        self._log.alert(save_failed(line, step))
        record = {"step": failed_step, "reason": error.reason, "failed_in_a_row": self._failed, "next_step": next_step}
        self._log.log_failed_save(record)

    def _retry_steps(self) -> int:
        """Returns the steps until a failed save is tried again, as rank 0 measures time; every rank calls it."""
        seconds = self._step_seconds()
        told = [max(1, math.ceil(RETRY_SECONDS / seconds)) if seconds else self._interval]
        dist.broadcast_object_list(told, src=0)
        return told[0]

    def _write(self, folder: Path) -> None:
        """Writes the live state."""
        self._run.engine.save(folder)
        if self._run.config.checkpoint.weights:
            self._run.engine.save_weights(folder)

    def _begin(self, save: "_Save", group: dist.ProcessGroup) -> BackgroundSave[Saved]:
        """Copies the state and begins to write the copy beside training."""
        snapshot = self._run.engine.snapshot(weights=self._run.config.checkpoint.weights)
        stall = time.monotonic() - save.begin

        def act() -> Saved:
            return self._publish(
                save,
                lambda folder: snapshot.write(folder, group),
                group,
                stall=lambda: stall + snapshot.device_seconds(),
            )

        return BackgroundSave(save.step, act)

    def wait(self, step: int) -> None:
        """Waits until the save that is under way is done, and reports for how long; every rank calls it.

        Raises:
            CheckpointError: it has failed, as one too many.
        """
        if self._pending is None:
            return
        begin = time.monotonic()
        try:
            self._finish(self._pending.wait())
        except SaveError as error:
            self._tolerate(error, self._pending.step, step)
            return
        if (seconds := time.monotonic() - begin) > NOTICEABLE_SECONDS:
            self._log.console.print(wait_line(step, seconds))

    def _publish(
        self,
        save: "_Save",
        write: Callable[[Path], None],
        group: dist.ProcessGroup | None,
        stall: Callable[[], float] | None = None,
    ) -> Saved:
        """Writes and publishes; runs on the main thread, or with a group of its own on another.

        Args:
            save: the save.
            write: the engine's part.
            group: of all ranks; None: the default group.
            stall: returns for how long training stood still; None: as long as this takes.
        """
        run = self._run

        def write_all(folder: Path) -> None:
            def write_health() -> None:
                if run.placement.is_rank_0:
                    path = folder / FILE_NAME
                    patiently(lambda: path.write_text(save.health), f"writing {FILE_NAME}", self._report)

            write(folder)
            agree(write_health, group)

        folder = publish(
            run.folder,
            save.step,
            save.facts,
            write_all,
            keep=run.config.checkpoint.keep,
            is_rank_0=run.placement.is_rank_0,
            report=self._report,
            verdicts=run.verdicts,
            group=group,
        )
        seconds = time.monotonic() - save.begin
        cost = SaveCost(stall() if stall else seconds, seconds, save.step_seconds)
        saved = Saved(folder, save.step, cost.stall_seconds, seconds, run.verdicts.known_bytes(folder))
        return self._with_interval(saved, cost, group) if self._auto else saved

    def _with_interval(self, saved: Saved, cost: SaveCost, group: dist.ProcessGroup | None) -> Saved:
        """Returns a saved checkpoint with the interval that rank 0 chooses by what it cost. A small change is none."""
        configured, num_gpus = self._run.config.checkpoint.mean_hours_between_failures, dist.get_world_size()
        hours = hours_between_failures(configured, num_gpus)
        chosen = best_interval(cost, hours)
        keeps = self._chosen and abs(chosen - self._interval) < SMALL_CHANGE * self._interval
        told = [self._interval if keeps else chosen]
        dist.broadcast_object_list(told, src=0, group=group)
        text = explain(told[0], cost, hours, configured=bool(configured), num_gpus=num_gpus)
        return replace(saved, interval=told[0], explanation="" if keeps else text)

    def _finish(self, saved: Saved) -> None:
        """Takes note of a published checkpoint."""
        self._pending = None
        if self._failed:
            self._log.alert(saved_again(saved.step, self._failed))
            self._failed = 0
        self._published()
        self._log.console.print(save_line(saved.step, saved.stall_seconds, saved.write_seconds, saved.folder))
        if self._auto:
            self._interval, self._chosen = saved.interval, True
            if saved.explanation:
                self._log.console.print(saved.explanation)
        if self._mirror is not None:
            self._mirror.offer(saved.folder)
        if self._log.enabled:
            record = {
                "step": saved.step,
                "stall_seconds": saved.stall_seconds,
                "write_seconds": saved.write_seconds,
                "bytes": saved.size,
            }
            self._log.log_checkpoint(record)

    def _finish_mirror(self) -> None:
        """Waits on all ranks until rank 0 has uploaded the newest checkpoint."""
        if self._run.config.checkpoint.mirror:
            if self._mirror is not None:
                self._mirror.finish()
            leave_together(is_rank_0=self._run.placement.is_rank_0)

    def _step_seconds(self) -> float:
        """Returns the recent mean time of a step; only rank 0 knows it."""
        return self._log.speed.eta(1)

    def _report(self, text: str) -> None:
        """Prints a line about storage: rank 0 on its console, another rank with its name."""
        if self._run.placement.is_rank_0:
            self._log.console.print(text)
        else:
            print(f"rank {self._run.placement.rank} ({socket.gethostname()}): {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class _Save:
    """A save that has begun.

    Attributes:
        step: optimizer steps done.
        begin: by the monotonic clock, in seconds.
        step_seconds: the recent mean time of a step.
        facts: the facts that a resume must agree on.
        health: content of `health.json`.
    """

    step: int
    begin: float
    step_seconds: float
    facts: dict[str, Any]
    health: str
