"""A run's output folder: can it be written, has it room, and does no other run use it.

Rank 0 of a run holds `.lock` in it for the run's life. The lock is the kernel's (flock): it goes when the process does, however that dies, so a
run that was killed resumes at once. The file stays; its content names the holder, and is empty after a run that ended by itself. What killed runs left
half written is removed under the lock. `require_free` only looks, before anything is imported or started. On storage without such locks a run
goes on unprotected and prints that. Stdlib only.
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
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from ssa_pretrain.settings.problems import ConfigError, Problem

LOCK = ".lock"
LEFTOVERS = (
    *("checkpoints/.step_*.tmp", "checkpoints/.step_*.universal"),
    *("metrics.jsonl.*.tmp", "wandb.*.tmp", ".seen_*"),
)
ELSEWHERE = "try another output_dir"
PATIENCE_SECONDS = 5.0  # for a holder that may be dying
ALIVE_SECONDS = 1.0  # for one that is seen to run on this host
PF_EXITING = 0x4  # Linux: in the flags of a process that is about to end
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


def require_free(folder: Path, *, patience: float = PATIENCE_SECONDS) -> None:
    """Return if no process holds a folder's lock, as far as is known; nothing is created or changed.

    Args:
        folder: the run's output folder, which may not exist yet.
        patience: seconds to wait for a holder that is just dying.

    Raises:
        ConfigError: another process holds it.
    """
    try:
        file = (folder / LOCK).open(encoding="utf-8")
    except OSError:
        return
    with file, suppress(OSError):  # storage that fails here will fail `claim` too, which reports it
        _lock(file, folder, fcntl.LOCK_SH, patience)


def claim(folder: Path, say: Callable[[str], None] = print, *, patience: float = PATIENCE_SECONDS) -> TextIO | None:
    """Make the folder, take its lock and remove what killed runs left half written.

    Args:
        folder: the run's output folder.
        say: takes a line for the user.
        patience: seconds to wait for a holder that is just dying.

    Returns:
        The open file that holds the lock until `release` or the end of the process; None on storage without locks.

    Raises:
        ConfigError: another process holds the folder, or it cannot be written.
    """
    lock = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a+", encoding="utf-8")
        locked = _lock(lock, folder, fcntl.LOCK_EX, patience)
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


def release(lock: TextIO) -> None:
    """Give up a folder's lock and remove the holder's name from it."""
    with lock, suppress(OSError):
        lock.truncate(0)


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


def _lock(file: TextIO, folder: Path, kind: int, patience: float) -> bool:
    """Take a file's lock, shared or exclusive; False on storage that has none."""
    begin = time.monotonic()
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            held = _holder(file)
            if time.monotonic() - begin < (min(patience, ALIVE_SECONDS) if _runs_here(held) else patience):
                time.sleep(0.1)
                continue
            who = f"process {held['pid']} on {held['host']}, started {held['started']}" if held else "another process"
            advice = f"stop that run or {ELSEWHERE}"
            raise ConfigError([Problem("output_dir", str(folder), f"is in use by {who}", advice)]) from None
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                return False
            raise
        return True


def _me() -> dict[str, str | int]:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": started}


def _holder(file: TextIO) -> dict[str, Any]:
    """Returns pid, host and start of the process that wrote a lock's file; empty where it does not have them."""
    file.seek(0)
    try:
        held = json.loads(file.read())
        return {name: held[name] for name in ("pid", "host", "started")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _runs_here(held: dict[str, Any]) -> bool:
    """Returns whether a holder is seen to run on this host and is not about to end."""
    if held.get("host") != socket.gethostname():
        return False
    try:
        # After the name, which may hold anything: state, parent, group, session, terminal, its group, flags.
        state, *_, flags = Path(f"/proc/{held['pid']}/stat").read_text().rpartition(")")[2].split()[:7]
    except (OSError, ValueError):
        return False
    return state not in "ZX" and not int(flags) & PF_EXITING
