"""Copies DeepSpeed's training state to host memory, and writes it from a thread while training continues.

DeepSpeed hands each file of a checkpoint, as a state and a path, to its checkpoint engine. Here an engine that writes nothing takes these calls
between two steps and copies the states. Later the thread writes the same files with the same function. DeepSpeed's own asynchronous engine is not used:
it starts a process per rank, which outlives a killed rank, and it does not report a failed write.

`deferring` is for a synchronous save: a rank whose write fails still comes to the end of DeepSpeed's save, where the other ranks wait.

A tensor that is a view into a flat buffer is copied by itself, so a file can be smaller than DeepSpeed's own. Its tensors are the same.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ssa_pretrain.checkpoint.staging import HostCopies
from ssa_pretrain.parallel.agreement import Attempts, agree

NOWHERE = "checkpoint"  # stands for the folder, which exists only when the thread writes


class _Capture:
    """A checkpoint engine that copies the states that it is given.

    Args:
        copies: receive the tensors.
    """

    def __init__(self, copies: HostCopies) -> None:
        self.files: dict[str, Any] = {}
        self._copies = copies

    def save(self, state_dict: Any, path: str) -> None:
        """Takes a file's state."""
        name = str(Path(path).relative_to(NOWHERE))
        self.files[name] = self._copies.tree(name, state_dict)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Creates nothing."""

    def create(self, info: Any) -> None:
        """Begins nothing."""

    def commit(self, info: Any) -> bool:
        """Ends nothing."""
        return True

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        """Returns whether a data rank writes what all of them hold."""
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        """Returns whether DeepSpeed would have to commit later."""
        return False

    def preserves_storage_sharing(self) -> bool:
        """Returns whether a file keeps tensors that share memory as they are."""
        return False


class _Deferring:
    """A checkpoint engine that writes as another one does, and keeps a failure: DeepSpeed's other ranks wait for this one until the end of its save.

    Args:
        engine: the other one.
        parts: keeps the failure.
    """

    def __init__(self, engine: Any, parts: Attempts) -> None:
        self._engine, self._parts = engine, parts

    def save(self, state_dict: Any, path: str) -> None:
        """Writes a file."""
        self._parts.run(lambda: self._engine.save(state_dict, path))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Creates a folder."""
        self._parts.run(lambda: self._engine.makedirs(path, exist_ok=exist_ok))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@contextmanager
def deferring(ds, parts: Attempts) -> Iterator[None]:
    """The context in which DeepSpeed's saves keep their failures in `parts`, so that every rank comes to the end of a save."""
    copy_script = ds._copy_recovery_script
    with _saving_by(ds, _Deferring(ds.checkpoint_engine, parts), lambda folder: parts.run(lambda: copy_script(folder))):
        yield


@contextmanager
def _saving_by(ds, engine: Any, copy_script: Callable[[str], object]) -> Iterator[None]:
    """The context in which DeepSpeed's saves use another checkpoint engine, and another function for its recovery script."""
    own = ds.checkpoint_engine
    ds.checkpoint_engine, ds._copy_recovery_script = engine, copy_script
    try:
        yield
    finally:
        ds.checkpoint_engine = own
        del ds._copy_recovery_script


def write_notes(folder: Path, notes: dict[str, Any]) -> None:
    """Writes further files by name; text as it is, anything else as JSON."""
    for name, content in notes.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content, indent=1))


def take(
    ds, copies: HostCopies, *, tag: str, client_state: dict[str, Any], notes: dict[str, Any]
) -> Callable[[Path, dist.ProcessGroup], None]:
    """Queues the copies of a rank's state and returns the function that writes them; every rank calls both.

    Args:
        ds: DeepSpeed's engine.
        copies: receive the tensors; the caller waits for them before it writes.
        tag: of DeepSpeed's folder within the checkpoint.
        client_state: DeepSpeed adds it to the state of the model.
        notes: further files by name (`write_notes`), which rank 0 writes when all ranks are done.
    """
    capture, engine = _Capture(copies), ds.checkpoint_engine
    scripts: list[str] = []
    with _saving_by(ds, capture, scripts.append):
        ds.save_checkpoint(NOWHERE, tag=tag, client_state=client_state, save_latest=False)

    def write_files(folder: Path) -> None:
        for name, state in capture.files.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            engine.save(state, str(path))
        if scripts:
            ds._copy_recovery_script(str(folder))

    def write(folder: Path, group: dist.ProcessGroup) -> None:
        agree(lambda: write_files(folder), group)
        agree(lambda: write_notes(folder, notes) if dist.get_rank() == 0 else None, group)

    return write
