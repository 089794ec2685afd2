"""JSON files, digests and the lock of a dataset's folder."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.errors import InputError
from ssa_pretrain.settings.files import LockedError, lock, remove_unfinished, unlock, write_atomically


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

    Removes the temporary files of a killed run from it.

    Raises:
        InputError: the folder cannot be written, or another run holds the lock.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = lock(folder / ".lock", patience=0.0)
    except OSError as error:
        raise InputError(f"out={folder} cannot be written ({error.strerror}); choose a folder of your own") from None
    except LockedError:
        raise InputError(
            f"out={folder} is being written by another data_prep; wait for it or choose another out="
        ) from None
    try:
        remove_unfinished(folder)  # those in other folders are removed when the next run tokenizes
        yield
    finally:
        if held:
            unlock(held)
