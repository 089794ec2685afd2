"""Runs the jobs of a recipe: several at once on each device as memory allows, within a limit of time, each tried once.

The jobs are in order of priority. In each round every idle slot takes the first job that is ready, fits into the device's memory, and ends in time by its
estimate. A job that saves when it is stopped may also start if it is longer than the whole limit and at least half of the limit is left; otherwise it could never
run. When the time is up, or this process is asked to stop, every job gets SIGTERM: training saves and exits with code 7, and the same command resumes it.
Jobs end with this process, even after kill -9 (Linux).

A job that fails does not stop the others. Its exit code and the end of its log are kept for the report.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ssa_pretrain.errors import ExitCode
from ssa_pretrain.experiments.devices import Device
from ssa_pretrain.experiments.estimates import Estimates
from ssa_pretrain.experiments.jobs import Job
from ssa_pretrain.parallel.parent import end_with_parent
from ssa_pretrain.planning.estimate import GIB
from ssa_pretrain.signals import on_signals

STOP_SECONDS = 30.0  # before the limit, for jobs to save
GRACE_SECONDS = 90.0  # for a job to end after SIGTERM, before SIGKILL
POLL_SECONDS = 0.2
LOOK_SECONDS = 5.0  # between looks at what can start; at once when a job has ended
STOPPED = (ExitCode.STOPPED, ExitCode.INTERRUPTED, -signal.SIGTERM)


@dataclass
class Running:
    """A job's process."""

    job: Job
    device: Device
    memory: float
    process: subprocess.Popen
    began: float


def say(text: str) -> None:
    """Prints a line without buffering."""
    print(text, file=sys.stderr, flush=True)


@dataclass
class Scheduler:
    """Runs jobs.

    Attributes:
        devices: to run on.
        per_device: most jobs at once on one.
        estimates: of time and memory.
        limit: seconds that `run` may take; infinite without a limit.
        say: prints a line for the user.
        running: the jobs' processes now.
        stopped: whether the jobs were asked to stop.
        failed: names of the jobs that failed.
    """

    devices: Sequence[Device]
    per_device: int
    estimates: Estimates
    limit: float = float("inf")
    say: Callable[[str], None] = say
    running: list[Running] = field(default_factory=list)
    stopped: bool = False
    failed: list[str] = field(default_factory=list)
    _deadline: float = field(default=float("inf"), init=False)

    def run(self, jobs: Sequence[Job]) -> None:
        """Runs every job that is not done, within the limit."""
        self._deadline, next_look = time.monotonic() + self.limit, 0.0
        waiting = [job for job in jobs if not job.is_done]

        def stop(number: signal.Signals) -> None:
            self.stopped = True

        with on_signals(stop, [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]):
            try:
                while waiting or self.running:
                    if self._collect():
                        next_look = 0.0
                    if self.stopped or self._left() <= STOP_SECONDS:
                        break
                    if time.monotonic() >= next_look:
                        self._start(waiting)
                        next_look = time.monotonic() + LOOK_SECONDS
                    if not self.running:
                        break  # nothing that is left is ready, fits and ends in time
                    time.sleep(POLL_SECONDS)
            finally:
                self._stop_all()
        for job in waiting:
            if not job.is_done and job.is_ready:
                self.say(f"{job.name}: not started; {self._why_not(job)}")

    def _left(self) -> float:
        """Returns the seconds until the limit."""
        return self._deadline - time.monotonic()

    def _start(self, waiting: list[Job]) -> None:
        """Starts what can start, on the device with the fewest jobs first."""
        for job in list(waiting):
            if not job.is_ready:
                continue
            need = self.estimates.memory(job)
            for device in sorted(self.devices, key=lambda d: len(self._on(d))):
                if self._has_room(job, device, need) and not self._why_too_long(job):
                    waiting.remove(job)
                    self._launch(job, device, need)
                    break

    def _has_room(self, job: Job, device: Device, need: float) -> bool:
        """Returns whether a device can take a job now."""
        there = self._on(device)
        if there and (job.is_exclusive or any(other.job.is_exclusive for other in there)):
            return False
        return len(there) < self.per_device and sum(other.memory for other in there) + need <= device.free_bytes

    def _on(self, device: Device) -> list[Running]:
        return [one for one in self.running if one.device == device]

    def _why_too_long(self, job: Job) -> str:
        """Returns why a job would not end in time; empty if it would, or if it may run in parts."""
        if self.limit == float("inf"):
            return ""
        needed, left = self.estimates.seconds(job), self._left() - STOP_SECONDS
        whole = self.limit - STOP_SECONDS
        if needed <= left or (job.can_resume and needed > whole and left >= whole / 2):
            return ""
        return f"it takes about {needed / 60:.1f} minutes, and {max(0.0, left) / 60:.1f} are left"

    def _why_not(self, job: Job) -> str:
        """Returns why a job did not start."""
        need, most = self.estimates.memory(job), max(device.free_bytes for device in self.devices)
        if need > most:
            return f"it needs about {need / GIB:.1f} GiB, and {most / GIB:.1f} GiB are free"
        return self._why_too_long(job) or ("the command was stopped" if self.stopped else "no device was free")

    def _launch(self, job: Job, device: Device, need: float) -> None:
        """Starts a job's process."""
        own = os.getpid()
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("a", encoding="utf-8") as log:
            process = subprocess.Popen(
                job.command,
                env=os.environ | device.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process only, which asks the jobs to stop
                preexec_fn=lambda: end_with_parent(own),
            )
        self.running.append(Running(job, device, need, process, time.monotonic()))
        where = f"GPU {device.index}" if device.is_gpu else "the CPU"
        expected = self.estimates.seconds(job)
        self.say(f"{job.name}: started on {where}, about {expected / 60:.1f} minutes; log: {job.log}")

    def _collect(self) -> bool:
        """Notes the jobs that have ended; returns whether there were any."""
        before = len(self.running)
        for one in list(self.running):
            if (code := one.process.poll()) is None:
                continue
            self.running.remove(one)
            took = f"after {(time.monotonic() - one.began) / 60:.1f} minutes"
            if code in STOPPED and (self.stopped or code == ExitCode.STOPPED):
                self.say(f"{one.job.name}: stopped {took}; the same command continues")
                continue
            one.job.ended(code)
            if one.job.is_done:
                self.say(f"{one.job.name}: done {took}")
            else:
                self.failed.append(one.job.name)
                self.say(f"{one.job.name}: failed with exit code {code} {took}; see {one.job.log}")
        return len(self.running) < before

    def _stop_all(self) -> None:
        """Asks every job to stop and waits until it has."""
        if not self.running:
            return
        self.stopped = True
        self.say(f"stopping {len(self.running)} job{'s' * (len(self.running) > 1)}: they save first")
        for one in self.running:
            one.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        while self.running and time.monotonic() < deadline:
            self._collect()
            time.sleep(POLL_SECONDS)
        for one in self.running:
            one.process.kill()
            one.process.wait()
            self.say(f"{one.job.name}: killed, because it did not stop within {GRACE_SECONDS:g} s")
