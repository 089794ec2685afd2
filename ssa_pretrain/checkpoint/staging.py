"""Copies of a training state in host memory, from which a checkpoint is written while training goes on.

On a GPU the copies go into page-locked memory (locked_memory.py), which the device fills at the full speed of its link. They are queued on the current
stream. So whatever is queued afterwards, such as the next optimizer step, comes after them, and the host does not wait. `wait` blocks until
the copies are done; the thread that writes the checkpoint calls it. On a CPU a copy is done at once.

The buffers are kept and used again by the next save, because locking memory costs more than filling it. There is one set of buffers, so the
next snapshot must not begin before the last one is written. torch's `StateDictStager` is not used: it copies whole storages, which includes other
ranks' shards of a flat buffer, and it follows the attributes of parameters to their gradients.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ssa_pretrain.checkpoint.locked_memory import LockedMemory


class HostCopies:
    """The host copies of one rank's state.

    Args:
        device: of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._locked = LockedMemory()
        self._buffers: dict[str, Tensor] = {}
        self._begin: torch.cuda.Event | None = None
        self._end: torch.cuda.Event | None = None

    @contextmanager
    def taking(self) -> Iterator[None]:
        """The time in which copies are queued."""
        if self._on_gpu:
            self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._begin.record()
        yield
        if self._end is not None:
            self._end.record()

    def wait(self) -> None:
        """Waits until the copies of the last snapshot are complete."""
        if self._end is not None:
            self._end.synchronize()

    def device_seconds(self) -> float:
        """Returns how long the device was busy copying; call it after `wait`."""
        if self._begin is None or self._end is None:
            return 0.0
        return self._begin.elapsed_time(self._end) / 1000

    @torch.no_grad()
    def tensor(self, name: str, live: Tensor) -> Tensor:
        """Returns a contiguous host tensor with the values of `live` after `wait`.

        Args:
            name: of the buffer; unique within a snapshot, and the same for the same tensor in the next one.
            live: a tensor that training goes on to change.
        """
        found = self._buffers.get(name)
        if found is None or found.shape != live.shape or found.dtype != live.dtype:
            found = self._buffers[name] = self._new_buffer(live)
        found.copy_(live.detach(), non_blocking=True)
        return found

    def tree(self, name: str, live: Any) -> Any:
        """Returns a copy of nested dicts, lists and tuples, with copies of the tensors and other values in them; of a tensor that occurs twice, one."""
        return self._tree(name, live, {})

    def _tree(self, name: str, live: Any, copied: dict[int, Tensor]) -> Any:
        """Returns `tree`'s copy; `copied` has the copies of tensors by their identity."""
        if isinstance(live, Tensor):
            if id(live) not in copied:
                copied[id(live)] = self.tensor(name, live)
            return copied[id(live)]
        if isinstance(live, dict):
            found = copy.copy(live)  # keeps the type and its attributes
            for key, value in live.items():
                found[key] = self._tree(f"{name}.{key}", value, copied)
            return found
        if type(live) in (list, tuple):
            return type(live)(self._tree(f"{name}.{i}", value, copied) for i, value in enumerate(live))
        return copy.deepcopy(live)

    def _new_buffer(self, live: Tensor) -> Tensor:
        """Returns an empty host tensor, page-locked if the copies come from a GPU."""
        if self._on_gpu and live.is_cuda:
            return self._locked.like(live)
        return torch.empty(live.shape, dtype=live.dtype, device="cpu")
