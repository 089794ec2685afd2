"""Makes an error on one rank end all ranks, so that no rank continues and none waits for a peer that has exited.

If a rank simply raised, the others would wait in their next collective until it times out. Instead all ranks exchange their errors at the
end of a piece of work (`on_all_ranks`), or the error of rank 0 is raised on every rank (`on_rank_0`). A library may run collectives of its
own inside that work, and after a failure the other ranks would wait in them. For this case `exits_with_peers` runs a thread that reads the
failure from the process group's store and ends the process.

After a failure on which all ranks have agreed they are in step, and a program may go on. `agree` and `Attempts` make a piece of work with collectives of
ours fail in that way. Torch's checkpoint writers do it themselves.
"""

import hashlib
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from ssa_pretrain.process import exit_now, report_exit, shortened

FAILURES = (
    OSError,
    RuntimeError,
    SafetensorError,
    CheckpointException,
)  # torch's writers turn a full disk into RuntimeError
POLL_SECONDS = 1.0
GRACE_SECONDS = 10.0  # from the failure of a rank until the ranks that still wait for it are ended

T = TypeVar("T")


class AgreedFailure(RuntimeError):
    """Some rank has failed; all ranks raise this out of the same exchange, with the same text. So they are in step."""


AGREED = (AgreedFailure, CheckpointException)  # raised on all ranks or on none


class Attempts:
    """Runs pieces of local work until one fails, and keeps the failure until all ranks meet (`agree`).

    For work between collectives, which every rank must reach whatever has failed on it.
    """

    def __init__(self) -> None:
        self._error: BaseException | None = None

    def run(self, act: Callable[[], object]) -> None:
        """Runs a piece of work, without collectives, unless one before it has failed."""
        if self._error is None:
            try:
                act()
            except FAILURES as error:
                self._error = error

    def agree(self, group: dist.ProcessGroup | None = None) -> None:
        """Meets the other ranks; every rank calls it.

        Raises:
            AgreedFailure: on every rank, if a piece of work of any rank has failed.
        """
        agree(self._raise, group)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


def agree(act: Callable[[], object], group: dist.ProcessGroup | None = None) -> None:
    """Runs local work, without collectives, on every rank. Every rank calls this, and it is a barrier.

    Raises:
        AgreedFailure: on every rank, if any rank has failed.
    """
    if reason := on_all_ranks(act, None, group=group):
        raise AgreedFailure(reason)


def on_all_ranks(
    act: Callable[[], object],
    key: str | None,
    describe: Callable[[str], str] = str,
    group: dist.ProcessGroup | None = None,
) -> str | None:
    """Runs a piece of work on every rank. Every rank calls this, and it is a barrier.

    Args:
        act: this rank's part.
        key: the key under which `exits_with_peers` sees a failure that other ranks may not know of; None: `act` has no collectives.
        describe: turns a reason, such as "rank 3: OSError: [Errno 28] No space left on device", into the message.
        group: of all ranks; a thread other than the main one needs one that only it uses. None: the default group.

    Returns:
        None if all ranks succeeded, else the same message on every rank.
    """
    message = None
    try:
        act()
    except FAILURES as error:
        message = describe(_reason(error))
        if key is not None and not isinstance(error, AGREED):
            dist.distributed_c10d._get_default_store().set(key, message)
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message, group=group)
    found = [text for text in messages if text]
    # If a write failed on one rank, the others may only have been told about it.
    return next((text for text in found if "Errno" in text), found[0] if found else None)


def on_rank_0(act: Callable[[], T], *, is_rank_0: bool, errors: tuple[type[Exception], ...]) -> T | None:
    """Returns the result of `act` on rank 0, None on the others. Every rank calls this.

    Args:
        act: called on rank 0 only.
        is_rank_0: whether this is rank 0.
        errors: exceptions of `act` that are raised on every rank; they must be picklable.
    """
    value, failure = None, [None]
    if is_rank_0:
        try:
            value = act()
        except errors as error:
            failure = [error]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise failure[0]
    return value


def differences_from_rank_0(values: Mapping[str, Any]) -> list[tuple[str, Any, str]]:
    """Returns the values that differ from those of rank 0, the same list on every rank. Every rank calls this, and it is a barrier.

    Args:
        values: plain values by name.

    Returns:
        (name, value, where) of each difference, by rank. `where` is such as "rank 3 (node2), and 0.001 on rank 0 (node1)".
    """
    digests: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest())
    if len(set(digests)) == 1:
        return []
    here = f"rank {dist.get_rank()} ({socket.gethostname()})"
    rank_0: list[Any] = [(dict(values), here)]
    dist.broadcast_object_list(rank_0, src=0)
    wanted, there = rank_0[0]
    mine = [
        (name, values.get(name), f"{here}, and {wanted.get(name)} on {there}")
        for name in sorted(values.keys() | wanted.keys())
        if values.get(name) != wanted.get(name)
    ]
    found: list[list[tuple[str, Any, str]]] = [[]] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return [difference for differences in found for difference in differences]


def ranks_without(condition: Callable[[], bool]) -> list[str]:
    """Returns the ranks on which a condition is false, as "rank 3 (node2)", the same list on every rank. Every rank calls this."""
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, None if condition() else f"rank {dist.get_rank()} ({socket.gethostname()})")
    return [name for name in found if name]


@contextmanager
def exits_with_peers(key: str, *, exit_code: int) -> Iterator[None]:
    """Ends this process if a rank has failed under `key` and the block does not end within GRACE_SECONDS.

    Rank 0 reports the failure before the others exit, because a launcher ends all ranks when one has exited.
    """
    if dist.get_world_size() == 1:
        yield
        return
    ended, store, rank = threading.Event(), dist.distributed_c10d._get_default_store(), dist.get_rank()

    def watch() -> None:
        try:
            while not ended.wait(POLL_SECONDS):
                if store.check([key]):
                    break
            else:
                return
            if ended.wait(GRACE_SECONDS if rank == 0 else GRACE_SECONDS + 3 * POLL_SECONDS):
                return
            if rank == 0:
                report_exit(store.get(key).decode(), code=exit_code)
        except dist.DistError:
            if ended.wait(GRACE_SECONDS):
                return  # the run has already finished, and its store is gone
        exit_now(exit_code)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _reason(error: BaseException) -> str:
    """Returns the rank that failed and its error, as one line; for an error of torch's checkpoints, the cause on the first rank that failed."""
    if isinstance(error, AgreedFailure):
        return str(error)
    rank = dist.get_rank()
    if isinstance(error, CheckpointException) and error.failures:
        rank, (error, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {type(error).__name__}: {shortened(str(error))}"
