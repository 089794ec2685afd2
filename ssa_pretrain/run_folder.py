"""A run's output folder: can it be written, has it room, and is it this run's alone.

One process of a run, the first, holds `.lock` in it for the run's life. The lock is the kernel's (flock): it goes when the process does, however
that dies, so a run that was killed resumes at once, and the file itself stays. What killed runs left half written is removed under the lock. On
storage without such locks a run goes on unprotected and says so. Stdlib only.
"""

import errno
import fcntl
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from ssa_pretrain.problems import ConfigError, Problem

LOCK = ".lock"
LEFTOVERS = (
    *("checkpoints/.step_*.tmp", "checkpoints/.step_*.universal"),
    *("metrics.jsonl.*.tmp", "wandb.*.tmp", ".seen_*"),
)
ELSEWHERE = "try another output_dir"
GIB = 2**30


def unwritable(folder: Path) -> str | None:
    """Return why a run cannot write into a folder that may not exist yet, None if nothing is known to hinder it; nothing is created."""
    existing = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    checkpoints = folder / "checkpoints"
    for place in (existing, checkpoints if checkpoints.exists() else existing):
        if not place.is_dir():
            beside = "contains" if place == checkpoints else "lies below"
            return "is a file, not a folder" if place == folder else f"{beside} {place}, which is a file"
        if not os.access(place, os.W_OK | os.X_OK):
            return f"cannot be written: no permission to write into {place}"
    return None


def claim(folder: Path, say: Callable[[str], None] = print, *, patience: float = 5.0) -> TextIO | None:
    """Make the folder, take its lock and remove what killed runs left half written.

    Args:
        folder: the run's output folder.
        say: takes a line for the user.
        patience: seconds to wait for a holder that is just dying.

    Returns:
        The open file that holds the lock until it is closed or the process ends; None on storage without locks.

    Raises:
        ConfigError: another process holds the folder, or it cannot be written.
    """
    lock = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a+", encoding="utf-8")
        locked = _lock(lock, folder, time.monotonic() + patience)
        if locked:
            lock.truncate(0)
            lock.write(json.dumps(_me()) + "\n")
            lock.flush()
    except OSError as error:
        rule = f"cannot be written: {error.strerror}"
        raise ConfigError([Problem("output_dir", str(folder), rule, ELSEWHERE)]) from error
    except ConfigError:
        lock.close()  # pyright: ignore[reportOptionalMemberAccess]
        raise
    if not locked:
        say(f"{folder} lies on storage without file locks: do not start a second run in it")
        lock.close()
        return None
    for pattern in LEFTOVERS:
        for path in folder.glob(pattern):
            say(f"removing {path}, which a run that was stopped has left half written")
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return lock


def leave_sign(folder: Path) -> str:
    """Put an empty file of a name that nothing had before into a folder and return the name, for other nodes to look for."""
    name = f".seen_{secrets.token_hex(8)}"
    (folder / name).touch()
    return name


def sees(folder: Path, name: str, *, patience: float = 10.0) -> bool:
    """Return whether a file that another node has just made is visible here, after waiting for at most `patience` seconds."""
    deadline = time.monotonic() + patience
    while not (folder / name).exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def shortage(folder: Path, needed: int) -> str | None:
    """Return a warning where an existing folder's storage has fewer free bytes than one checkpoint needs, else None."""
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return None
    return (
        f"warning: {folder} has {free / GIB:.1f} GiB free, and one checkpoint needs about {needed / GIB:.1f} GiB; "
        "free space before the first one is due"
    )


def _lock(file: TextIO, folder: Path, deadline: float) -> bool:
    """Take a file's lock; False on storage that has none."""
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            rule = f"is in use by {_holder(file)}"
            advice = f"stop that run or {ELSEWHERE}"
            raise ConfigError([Problem("output_dir", str(folder), rule, advice)]) from None
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                return False
            raise
        return True


def _me() -> dict[str, str | int]:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": started}


def _holder(file: TextIO) -> str:
    """The process that wrote a lock's file, in words."""
    file.seek(0)
    try:
        held = json.loads(file.read())
        return f"process {held['pid']} on {held['host']}, started {held['started']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
