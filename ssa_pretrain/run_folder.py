"""The output folder of a run: checks that it can be written and has free space, and locks it against other runs.

Rank 0 holds a lock on the folder's `.lock` for the life of the run. The kernel frees the lock when the process ends, even by kill -9, so
a killed run can resume at once. The file stays. It names the owner, and is empty after a run that ended by itself. Once a run holds the
lock, it removes unfinished files of killed runs. `require_free` only checks the lock, before torch is imported. On storage without locks
a run continues unprotected and prints a line about it. Stdlib only.
"""

import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from ssa_pretrain.settings.files import PATIENCE_SECONDS, LockedError, lock, remove_unfinished, require_unlocked
from ssa_pretrain.settings.problems import ConfigError, Problem

LOCK = ".lock"
# Removed in addition to temporary files: unfinished checkpoints, reshaped ones, and markers.
LEFTOVERS = ("checkpoints/.step_*.tmp", ".*.universal", ".seen_*")
ELSEWHERE = "try another output_dir"
GIB = 2**30


def named_folder(named: str) -> Path:
    """Returns the folder that a text names: RUN@STEP is the checkpoint of a run after that step, unless a folder has that name."""
    if Path(named).is_dir():
        return Path(named)
    folder, _, step = named.rpartition("@")
    return Path(folder) / "checkpoints" / f"step_{int(step):08d}" if folder and step.isdecimal() else Path(named)


def unwritable(folder: Path) -> str | None:
    """Returns why a run cannot write into a folder, which may not exist yet. None if no reason is known. Creates nothing."""
    existing = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    checkpoints = folder / "checkpoints"
    for place in (existing, checkpoints if checkpoints.exists() else existing):
        if not place.is_dir():
            where = "contains" if place == checkpoints else "lies below"
            return "is a file, not a folder" if place == folder else f"{where} {place}, which is a file"
        if not os.access(place, os.W_OK | os.X_OK):
            return f"cannot be written: no permission to write into {place}"
    return None


def require_free(folder: Path, *, patience: float = PATIENCE_SECONDS) -> None:
    """Checks that no other process holds the lock of a folder. Creates and changes nothing.

    Args:
        folder: the output folder, which may not exist yet.
        patience: seconds to wait for the previous owner to exit.

    Raises:
        ConfigError: another process holds it.
    """
    try:
        require_unlocked(folder / LOCK, patience=patience)
    except LockedError as owner:
        raise _in_use(folder, owner) from None


def lock_folder(
    folder: Path, report: Callable[[str], None] = print, *, patience: float = PATIENCE_SECONDS
) -> TextIO | None:
    """Creates a run's folder, takes its lock and removes unfinished files of killed runs.

    Args:
        folder: the output folder.
        report: prints a line for the user.
        patience: seconds to wait for the previous owner to exit.

    Returns:
        The lock, for `settings.files.unlock`; None on storage without locks.

    Raises:
        ConfigError: another process holds the folder, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = lock(folder / LOCK, patience=patience)
    except OSError as error:
        rule = f"cannot be written: {error.strerror}"
        raise ConfigError([Problem("output_dir", str(folder), rule, ELSEWHERE)]) from error
    except LockedError as owner:
        raise _in_use(folder, owner) from None
    if taken is None:
        report(f"{folder} lies on storage without file locks: do not start a second run in it")
        return None
    removed = remove_unfinished(folder)
    for path in (path for pattern in LEFTOVERS for path in folder.glob(pattern)):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        removed.append(path)
    for path in removed:
        report(f"removed {path}, which a killed run left unfinished")
    return taken


def write_marker(folder: Path) -> str:
    """Creates an empty file with a random name in a folder and returns the name; other nodes look for it."""
    name = f".seen_{secrets.token_hex(8)}"
    (folder / name).touch()
    return name


def marker_is_visible(folder: Path, name: str, *, patience: float = 10.0) -> bool:
    """Returns whether this process sees rank 0's marker within `patience` seconds."""
    deadline = time.monotonic() + patience
    while not (folder / name).exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def space_warning(folder: Path, needed: int) -> str | None:
    """Returns a warning if the storage of an existing folder has fewer free bytes than one checkpoint needs, else None."""
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return None
    return (
        f"warning: {folder} has {free / GIB:.1f} GiB free, and one checkpoint needs about {needed / GIB:.1f} GiB; "
        "free space before the first one is due"
    )


def _in_use(folder: Path, owner: LockedError) -> ConfigError:
    return ConfigError([Problem("output_dir", str(folder), f"is in use by {owner}", f"stop that run or {ELSEWHERE}")])
