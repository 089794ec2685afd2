"""What fails on one rank fails on all: no rank goes on, and none waits for a peer that has left.

A rank that raises by itself leaves the others in their next collective until its timeout. Here it reports instead: at the end of a piece of work
all ranks exchange what went wrong (`together`), or the first rank's error is raised on every rank (`on_first`). A library's own collectives
inside such a piece can still be waiting when the failing rank has left them. For these `watched` keeps a thread that learns of the
failure through the processes' store and ends the process.
"""

import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from ssa_pretrain.endings import end_process, last_words

FAILURES = (
    OSError,
    RuntimeError,
    SafetensorError,
    CheckpointException,
)  # torch's writers turn a full disk into RuntimeError
POLL_SECONDS = 1.0
SPOKEN, NOTICED = "ssa_pretrain/first_has_spoken", "ssa_pretrain/first_was_heard"
NOTICE_SECONDS = 2.0
GRACE_SECONDS = 10.0  # from a rank's failure until those that still wait for it are ended

T = TypeVar("T")


def together(act: Callable[[], object], key: str, describe: Callable[[str], str] = str) -> str | None:
    """Do a piece of work on every rank; every rank calls it, and it is a barrier.

    Args:
        act: this rank's part.
        key: under which a failure is reported to `watched`.
        describe: makes the message of a reason, such as "rank 3: OSError: [Errno 28] No space left on device".

    Returns:
        None if all ranks did theirs; else on every rank the same message.
    """
    message = None
    try:
        act()
    except FAILURES as error:
        message = describe(f"rank {dist.get_rank()}: {_words(error)}")
        dist.distributed_c10d._get_default_store().set(key, message)
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    found = [text for text in messages if text]
    # Where one rank failed at writing, others may only have been told of it.
    return next((text for text in found if "Errno" in text), found[0] if found else None)


def on_first(act: Callable[[], T], *, is_first: bool, errors: tuple[type[Exception], ...]) -> T | None:
    """Return what `act` gives on the first rank, None on the others; every rank calls it.

    Args:
        act: called on the first rank alone.
        is_first: on that rank.
        errors: what of `act` is raised on every rank; must survive pickling.
    """
    value, failure = None, [None]
    if is_first:
        try:
            value = act()
        except errors as error:
            failure = [error]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise failure[0]
    return value


def unlike_first(values: Mapping[str, Any]) -> list[tuple[str, Any, str]]:
    """Return what ranks hold otherwise than the first one, the same list on every rank; every rank calls it, and it is a barrier.

    Args:
        values: plain values by name.

    Returns:
        (name, the value, where: "rank 3 (node2), and 0.001 on rank 0 (node1)") of every value that differs, by rank.
    """
    digests: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest())
    if len(set(digests)) == 1:
        return []
    here = f"rank {dist.get_rank()} ({socket.gethostname()})"
    first: list[Any] = [(dict(values), here)]
    dist.broadcast_object_list(first, src=0)
    wanted, there = first[0]
    mine = [
        (name, values.get(name), f"{here}, and {wanted.get(name)} on {there}")
        for name in sorted(values.keys() | wanted.keys())
        if values.get(name) != wanted.get(name)
    ]
    found: list[list[tuple[str, Any, str]]] = [[]] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return [line for lines in found for line in lines]


def ranks_without(act: Callable[[], bool]) -> list[str]:
    """Return the ranks on which `act` is not true, as "rank 3 (node2)", the same list on every rank; every rank calls it."""
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, None if act() else f"rank {dist.get_rank()} ({socket.gethostname()})")
    return [name for name in found if name]


@contextmanager
def watched(key: str, *, exit_code: int) -> Iterator[None]:
    """End this process if a rank has failed under `key` and the block does not end within GRACE_SECONDS of that.

    The first rank says what failed before the others leave, since a launcher ends all of them when one has left.
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
                last_words(store.get(key).decode(), code=exit_code)
        except dist.DistError:
            if ended.wait(GRACE_SECONDS):
                return  # the store went with a run that was at its end
        end_process(exit_code)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def first_has_spoken(*, is_first: bool, seconds: float) -> None:
    """On rank 0, record that its error has been reported; on other ranks, wait up to `seconds` for that.

    Rank 0 gives the others a moment to notice: it may host the store that they ask.
    """
    if not dist.is_initialized():
        return  # no rank has joined yet
    with suppress(dist.DistError, RuntimeError):  # the rank that hosted the store has exited
        store = dist.distributed_c10d._get_default_store()
        if is_first:
            store.set(SPOKEN, "")
            deadline = time.monotonic() + NOTICE_SECONDS
            while store.add(NOTICED, 0) < dist.get_world_size() - 1 and time.monotonic() < deadline:
                time.sleep(0.05)
        elif seconds:
            store.wait([SPOKEN], timedelta(seconds=seconds))
            store.add(NOTICED, 1)


def _words(error: BaseException) -> str:
    """An error as one line; of torch's checkpoint errors the first rank's cause."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    line = " ".join(str(error).split())
    return f"{type(error).__name__}: {line if len(line) <= 300 else line[:297] + '...'}"
