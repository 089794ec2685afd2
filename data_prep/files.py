"""Files that are either absent or whole: written under a temporary name, flushed to the disk, renamed into place."""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.errors import InputError

UNFINISHED = re.compile(
    r"\.(bin|idx|sums|json|npy|html|txt|blend)\.\d+\.tmp$"
)  # our own temporary names, with a process id


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `content` to `path` so that a reader sees the old file or the new one, whenever the machine stops."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as JSON, atomically."""
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """Returns the JSON content of one of our own files, or None where it is absent or damaged: it is then made anew."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def digest(content: Any) -> str:
    """Returns the sha256 of plain data in its canonical JSON form."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextmanager
def dataset_lock(folder: Path) -> Iterator[None]:
    """Holds a lock on a folder: two runs that write one dataset would mix their files.

    The kernel drops the lock when the process ends, however it ends, so no stale lock is left behind.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    except OSError as error:
        raise InputError(f"out={folder} cannot be written ({error.strerror}); choose a folder of your own") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"out={folder} is being written by another data_prep; wait for it or choose another out="
            ) from None
        remove_unfinished([folder])  # a killed writer's; in the other folders the next one that tokenizes removes them
        yield


def remove_unfinished(folders: Iterable[Path]) -> None:
    """Removes files that a killed run of ours left under temporary names."""
    for folder in folders:
        for path in folder.glob("*.tmp"):
            if UNFINISHED.search(path.name):
                path.unlink(missing_ok=True)
