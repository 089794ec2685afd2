"""SIGTERM, as schedulers and launchers send it before they kill: all ranks stop after the same step, and the run saves.

A rank that was signalled writes into the launcher's store after which step all shall stop: some steps ahead, since ranks may be a step or two apart
when they look. Every rank looks once a step; one in a world of one looks at its own flag alone. Further SIGTERMs change nothing: a launcher and its
processes are often signalled together, and then the launcher passes its own on. Kills that give no time lose the steps since the last checkpoint,
as ever.
"""

import signal
from types import FrameType, TracebackType
from typing import Self

import torch.distributed as dist

from ssa_pretrain.parallel.state import Placement

KEY = "ssa_pretrain/stop_after"
# A rank reads a step's figures when it has queued the next, so none is more than two steps further than the one that was signalled: each of them
# looks again after the third.
STEPS_AHEAD = 3


class Interrupted(Exception):
    """The run was asked to stop, has saved, and goes on with the same command."""


class Interruption:
    """Watches for SIGTERM while it is entered."""

    def __init__(self, placement: Placement) -> None:
        self._alone = placement.world_size == 1
        self._asked = self._told = False
        self._last: int | None = None
        self._before = signal.SIG_DFL

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def ends(self, step: int) -> bool:
        """Return whether the run ends after this step; every rank calls it after each step, and gets the same answer.

        Args:
            step: steps done.
        """
        if self._alone:
            return self._asked
        store = dist.distributed_c10d._get_default_store()
        if self._asked and not self._told:
            store.compare_set(KEY, "", str(step + STEPS_AHEAD))  # the first that was signalled decides
            self._told = True
        if self._last is None and store.check([KEY]):
            self._last = int(store.get(KEY))
        return self._last is not None and step >= self._last

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
