"""A save on a thread of its own, and how all ranks stop after the same step if it fails.

The thread of each rank writes and publishes (publish.py) over a gloo group that only these threads use, because collectives of two threads on one group
would mix. It is a daemon: a rank that must end does not wait for it, and an unfinished checkpoint is a hidden folder that no run reads.

A failure reaches the threads of all ranks, which agree on it, but their main threads may be a few steps apart. If each raised as soon as it noticed, the
others would wait for it in a collective. So the first one that notices writes into the store of the process group after which step all of them raise, as
`Interruption` does for a signal. Training may go on then (saving.py): the threads have ended, and their group is in step.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

import torch
import torch.distributed as dist

from ssa_pretrain.errors import CheckpointError
from ssa_pretrain.parallel.interruption import STEPS_AHEAD

T = TypeVar("T")


class BackgroundSave(Generic[T]):
    """A save that runs on a thread.

    Args:
        step: optimizer steps done when the state was copied.
        act: writes and publishes; returns the result.
    """

    def __init__(self, step: int, act: Callable[[], T]) -> None:
        self.step = step
        self._act = act
        self._future: Future[T] = Future()
        self._gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._has_peers = dist.get_world_size() > 1
        self._announced = False
        self._last_step: int | None = None
        threading.Thread(target=self._run, name=f"save {step}", daemon=True).start()

    def poll(self, step: int) -> T | None:
        """Returns the result once there is one; every rank calls this after each step.

        Args:
            step: steps done.

        Raises:
            CheckpointError: the save has failed; on all ranks after the same step.
        """
        if not self._future.done():
            error = None
        elif (error := self._future.exception()) is None:
            return self._future.result()
        elif not (isinstance(error, CheckpointError) and self._has_peers):
            raise error
        if self._has_peers and self._must_raise(step, failed=error is not None):
            self._future.result()
        return None

    def wait(self) -> T:
        """Returns the result; blocks until the save is done on this rank, which is when it is done on all.

        Raises:
            CheckpointError: the save has failed.
        """
        return self._future.result()

    @torch.no_grad()
    def _run(self) -> None:
        try:
            if self._gpu is not None:
                torch.cuda.set_device(self._gpu)
            self._future.set_result(self._act())
        except BaseException as error:  # noqa: BLE001 - it belongs to the main thread, which raises it
            self._future.set_exception(error)

    def _must_raise(self, step: int, *, failed: bool) -> bool:
        """Returns whether the main thread raises the failure after this step; False while no rank has announced one."""
        # A rollback may save a step again after a failure: then all ranks wait here for that save, in step.
        store, key = dist.distributed_c10d._get_default_store(), f"ssa_pretrain/save_failed/{self.step}"
        if failed and not self._announced and self._last_step is None:
            store.compare_set(key, "", str(step + STEPS_AHEAD))  # the first rank that notices decides
            self._announced = True
        if self._last_step is None and store.check([key]):
            self._last_step = int(store.get(key).decode())
        return self._last_step is not None and step >= self._last_step
