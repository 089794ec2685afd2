"""A stop on request during training: after SIGTERM, Ctrl-C or SIGHUP all ranks stop after the same step, and the run saves.

The rank that receives the signal writes into the store of the process group after which step all ranks stop. That step is a few steps ahead, because
ranks may be a step or two apart. Every rank reads the store once per step; a single process only reads its own flag.

Further signals change nothing: a launcher and its ranks are often signalled together, and then the launcher passes on its own signal too.
Only a second Ctrl-C ends the process at once. After a kill -9 the steps since the last checkpoint are lost.
"""

import signal
import sys
import time
from types import TracebackType
from typing import Self

import torch.distributed as dist

from ssa_pretrain.errors import ExitCode
from ssa_pretrain.parallel.state import Placement
from ssa_pretrain.process import exit_now, received_signal, report_exit
from ssa_pretrain.signals import REPEAT_SECONDS, on_signals

KEY = "ssa_pretrain/stop_after"
EXITED_AT_ONCE = "SIGINT again: exited at once, without the steps since the last checkpoint"
# A rank reads the results of a step after it has queued the next one. So no rank is more than two steps ahead of the rank that received the
# signal, and every rank reads the store again by the third step.
STEPS_AHEAD = 3


class Interruption:
    """Watches for signals that ask the run to stop, as a context manager.

    Attributes:
        reason: the signal that stops the run, such as "SIGTERM"; empty before one.
    """

    def __init__(self, placement: Placement) -> None:
        self._has_peers, self._is_rank_0 = placement.world_size > 1, placement.is_rank_0
        self.reason = ""
        self._announced = False
        self._signalled_at = 0.0
        self._last_step: int | None = None
        self._signals = on_signals(self._receive)

    def __enter__(self) -> Self:
        self._signals.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._signals.__exit__(kind, error, trace)

    def stops_after(self, step: int) -> bool:
        """Returns whether the run stops after this step. Every rank calls this after each step and gets the same answer.

        Args:
            step: steps done.
        """
        if not self._has_peers:
            return bool(self.reason)
        store = dist.distributed_c10d._get_default_store()
        if self.reason and not self._announced and self._last_step is None:
            store.compare_set(
                KEY, "", f"{step + STEPS_AHEAD} {self.reason}"
            )  # the first rank that was signalled decides
            self._announced = True
        if self._last_step is None and store.check([KEY]):
            last_step, self.reason = store.get(KEY).decode().split()
            self._last_step = int(last_step)
        return self._last_step is not None and step >= self._last_step

    def _receive(self, number: signal.Signals) -> None:
        """Notes a signal; called from a thread."""
        now = time.monotonic()
        if not self._signalled_at:
            self._signalled_at = now
            self.reason = self.reason or received_signal(number)
            if number is signal.SIGINT and self._is_rank_0 and sys.stderr.isatty():
                print("\nstopping; Ctrl-C again exits at once, without saving", file=sys.stderr, flush=True)
        elif number is signal.SIGINT and now - self._signalled_at > REPEAT_SECONDS:
            report_exit(EXITED_AT_ONCE, code=ExitCode.INTERRUPTED)
            exit_now(ExitCode.INTERRUPTED)
