"""Files that appear atomically, and locks of files. Stdlib only.

A file is written as `NAME.PID.tmp` in the same folder, flushed to the disk and renamed. So a reader sees the old content or the new one, even
if the machine stops in between. A killed process leaves its temporary file behind; `remove_unfinished` removes such files.

The lock is the kernel's (flock), which frees it when the process ends, even by kill -9. The package filelock does not fit for two reasons. It
empties the file that it locks, but the file must name the owner for a process that is refused. And it has no shared locks, but checking a lock
takes one. On NFS, flock works between nodes (Linux turns it into a lock on the whole file). On storage without locks, `lock` returns None.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, TextIO

UNFINISHED = re.compile(r".\.\d+\.tmp$")
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # flock's errors on storage without locks
PATIENCE_SECONDS = 5.0  # for an owner that may be exiting
ALIVE_SECONDS = 1.0  # for an owner that is known to run on this host
PF_EXITING = 0x4  # Linux, among the flags of a process: it is about to end


class LockedError(Exception):
    """Another process holds a lock; str() names it."""


def temporary_path(path: Path) -> Path:
    """Returns the name under which this process writes a file before it renames it."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yields a file that replaces `path` when the block ends. After an error `path` is unchanged. Creates the folder if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = temporary_path(path)
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes a file atomically; text as UTF-8."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Waits until the content of a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unfinished(folder: Path) -> list[Path]:
    """Removes the temporary files that killed processes left in a folder, which the caller has locked; returns them."""
    found = [path for path in sorted(folder.glob("*.tmp")) if UNFINISHED.search(path.name) and path.is_file()]
    for path in found:
        path.unlink(missing_ok=True)
    return found


def file_sha256(path: Path) -> str:
    """Returns the sha256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def leads_outside(folder: Path, name: str) -> bool:
    """Returns whether a name from a list of files means something outside its folder: an absolute path, a path with `..`, or a link that leads out."""
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        return True
    return not (folder / name).resolve().is_relative_to(folder.resolve())


def lock(path: Path, *, patience: float = PATIENCE_SECONDS, patience_if_alive: float = ALIVE_SECONDS) -> TextIO | None:
    """Takes the lock of a file and writes this process into it as its owner.

    Args:
        path: the file; it is created if it is missing, and never removed.
        patience: seconds to wait for the owner to exit.
        patience_if_alive: seconds to wait for an owner that is known to run on this host, at most `patience`.

    Returns:
        The open file, which holds the lock until `unlock` or the end of the process; None on storage without locks.

    Raises:
        LockedError: another process holds it.
        OSError: the file cannot be written.
    """
    file = path.open("a+", encoding="utf-8")
    try:
        if not _flock(file, fcntl.LOCK_EX, patience, patience_if_alive):
            file.close()
            return None
        started = datetime.now(UTC).isoformat(timespec="seconds")
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started}) + "\n")
        file.flush()
    except BaseException:
        file.close()
        raise
    return file


def unlock(file: TextIO) -> None:
    """Releases a lock and removes the owner's name from its file."""
    with file, suppress(OSError):
        file.truncate(0)


def require_unlocked(path: Path, *, patience: float = PATIENCE_SECONDS) -> None:
    """Raises LockedError if another process is known to hold the lock of a file, which may be missing. Changes nothing."""
    with suppress(OSError), path.open(encoding="utf-8") as file:
        _flock(file, fcntl.LOCK_SH, patience, ALIVE_SECONDS)


def _flock(file: TextIO, kind: int, patience: float, patience_if_alive: float) -> bool:
    """Takes a file's lock, shared or exclusive; returns False on storage without locks, raises LockedError."""
    begin = time.monotonic()
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            owner = _owner(file)
            if time.monotonic() - begin >= (min(patience, patience_if_alive) if _runs_here(owner) else patience):
                text = "process {pid} on {host}, started {started}".format(**owner) if owner else "another process"
                raise LockedError(text) from None
            time.sleep(0.1)
        except OSError as error:
            if error.errno in WITHOUT_LOCKS:
                return False
            raise


def _owner(file: TextIO) -> dict[str, Any]:
    """Returns pid, host and start of the process that a lock's file names; empty if it names none."""
    file.seek(0)
    try:
        owner = json.loads(file.read())
        return {name: owner[name] for name in ("pid", "host", "started")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _runs_here(owner: dict[str, Any]) -> bool:
    """Returns whether an owner is known to run on this host and is not exiting."""
    if owner.get("host") != socket.gethostname():
        return False
    try:
        # The fields after the name, which may contain anything: state, parent, group, session, terminal, its group, flags.
        state, *_, flags = Path(f"/proc/{owner['pid']}/stat").read_text().rpartition(")")[2].split()[:7]
    except (OSError, ValueError):
        return False
    return state not in "ZX" and not int(flags) & PF_EXITING
