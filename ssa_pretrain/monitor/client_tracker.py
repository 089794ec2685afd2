"""A tracker that runs in a process of its own: sends it the run's records and alerts, and never stops or delays training.

What W&B, TensorBoard and trackio have in common on training's side. An exception, an exit, a crash or a hang of the process ends the tracking and leaves
training untouched: one line reports it. Every wait has a limit. Stdlib only.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from ssa_pretrain.monitor.alerts import Alert
from ssa_pretrain.monitor.tracking_client import ClientProcess

FINISH_SECONDS = 11.0  # limit for passing on the last rows
ALERT_SECONDS = 2.0  # limit for handing over an alert while the run ends
MAX_WAITING = 2**24  # bytes in memory; with more, training waits for the process to read


class ClientTracker:
    """A tracker's process that receives the records of metrics.jsonl, again from the first one after every restart.

    Args:
        process: the process, ready.
        print_line: prints one line for the user.
        label: the tracker's name in messages.
    """

    def __init__(self, process: ClientProcess, print_line: Callable[[str], None], label: str) -> None:
        self._process: ClientProcess | None = process
        self._print_line, self._label = print_line, label
        self._stored_step: int = (process.ready or {}).get("step", -1)  # training records up to it are there
        self._pipes = threading.Lock()  # the watchdog's thread sends an alert on a hang

    def log(self, record: Mapping[str, Any]) -> None:
        """Sends a record of metrics.jsonl, unless the tracker has it from before a restart."""
        if self._process is None or (record["kind"] == "train" and record["step"] <= self._stored_step):
            return
        with self._pipes:
            self._process.send(record)
            self._process.pump()
            while self._process.waiting > MAX_WAITING and not self._process.failure():
                self._process.pump(1.0)
        self._check()

    def alert(self, alert: Alert) -> None:
        """Sends an alert. May be called beside the main thread, which a hang may have stopped in `log`: then it is not sent."""
        if self._process is None or not self._pipes.acquire(timeout=ALERT_SECONDS):
            return
        try:
            self._process.send({"alert": asdict(alert)})
            self._process.drain(ALERT_SECONDS)
        finally:
            self._pipes.release()
        self._check()

    def finish(self) -> None:
        """Ends the tracking. Records that could not be passed on in time are sent again by the next start."""
        if self._process is None:
            return
        process, self._process = self._process, None
        process.send({"finish": True})
        process.end(FINISH_SECONDS)
        if not process.finished:
            reason = process.failure() or f"still running after {FINISH_SECONDS:g} s"
            self._print_line(f"{self._label} did not finish ({reason}); {self.remedy()}")
        else:
            self.after_finish()

    def remedy(self) -> str:
        """Returns how to get the records that were not taken in time."""
        return "the next start sends the missing records"

    def after_finish(self) -> None:
        """Is called after an orderly end."""

    def _check(self) -> None:
        """Ends the tracking if the process no longer takes records."""
        if self._process is not None and (reason := self._process.failure()):
            self._process.end(0.0)
            self._process = None
            self._print_line(
                f"{self._label} stopped taking records ({reason}); training and metrics.jsonl continue, and the next start sends the missing records"
            )
