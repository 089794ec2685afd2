"""Atomic file writes: to a temporary name, flushed to the disk, renamed into place. Also JSON, digests and the dataset's lock."""

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
)  # our temporary names, with a process id


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `content` to `path` so that a reader sees either the old or the new file, even after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as JSON, atomically."""
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """Returns the JSON content of one of our own files, or None if it is missing or damaged and has to be written again."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def digest(content: Any) -> str:
    """Returns the sha256 of plain data in its canonical JSON form."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextmanager
def dataset_lock(folder: Path) -> Iterator[None]:
    """Locks a dataset's folder, since two runs that write one dataset would mix their files.

    The kernel releases the lock when the process ends, in whatever way, so no stale lock remains.

    Raises:
        InputError: the folder cannot be written, or another run holds the lock.
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
        remove_unfinished([folder])  # of a killed run; those in other folders are removed when the next run tokenizes
        yield


def remove_unfinished(folders: Iterable[Path]) -> None:
    """Removes files that a killed run left under temporary names."""
    for folder in folders:
        for path in folder.glob("*.tmp"):
            if UNFINISHED.search(path.name):
                path.unlink(missing_ok=True)
