"""A stop on request in training: after SIGTERM, Ctrl-C or SIGHUP all ranks stop after the same step, and the run saves.

A rank that was signalled writes into the launcher's store after which step all shall stop: some steps ahead, since ranks may be a step or two apart
when they look. Every rank looks once per step; one in a world of one looks only at its own flag. Further signals change nothing, since a launcher and
its ranks are often signalled together, and then the launcher passes its own on; only a second Ctrl-C ends the process at once. Kills that give no time
lose the steps since the last checkpoint.
"""

import signal
import sys
import time
from types import TracebackType
from typing import Self

import torch.distributed as dist

from ssa_pretrain.endings import end_process, last_words, signal_name
from ssa_pretrain.parallel.state import Placement
from ssa_pretrain.signals import INTERRUPTED, SECOND_SECONDS, on_signals

KEY = "ssa_pretrain/stop_after"
# A rank reads a step's metrics when it has queued the next, so none is more than two steps further than the one that was signalled: each of them
# looks again after the third.
STEPS_AHEAD = 3


class Interrupted(Exception):
    """The run was asked to stop, has saved, and goes on with the same command."""


class Interruption:
    """Watches for signals while it is entered.

    Attributes:
        reason: the signal that stops the run, such as "SIGTERM"; empty while there is none.
    """

    def __init__(self, placement: Placement) -> None:
        self._alone, self._is_first = placement.world_size == 1, placement.is_first
        self.reason = ""
        self._told = False
        self._asked_at = 0.0
        self._last: int | None = None
        self._signals = on_signals(self._ask)

    def __enter__(self) -> Self:
        self._signals.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._signals.__exit__(kind, error, trace)

    def ends(self, step: int) -> bool:
        """Returns whether the run ends after this step; every rank calls it after each step, and gets the same answer.

        Args:
            step: steps done.
        """
        if self._alone:
            return bool(self.reason)
        store = dist.distributed_c10d._get_default_store()
        if self.reason and not self._told and self._last is None:
            store.compare_set(KEY, "", f"{step + STEPS_AHEAD} {self.reason}")  # the first that was signalled decides
            self._told = True
        if self._last is None and store.check([KEY]):
            last, self.reason = store.get(KEY).decode().split()
            self._last = int(last)
        return self._last is not None and step >= self._last

    def _ask(self, number: signal.Signals) -> None:
        """Asks for the end; called from a thread for each signal."""
        now = time.monotonic()
        if not self._asked_at:
            self._asked_at = now
            self.reason = self.reason or signal_name(number)
            if number is signal.SIGINT and self._is_first and sys.stderr.isatty():
                print("\nstopping; Ctrl-C again leaves at once, without saving", file=sys.stderr, flush=True)
        elif number is signal.SIGINT and now - self._asked_at > SECOND_SECONDS:
            last_words("SIGINT again: left at once, without the steps since the last checkpoint", code=INTERRUPTED)
            end_process(INTERRUPTED)
