"""Patience with slow or failing storage: an operation that fails with a transient error is tried again, and each new try is reported.

Network storage answers with EIO, ESTALE or ETIMEDOUT while a server restarts or moves, and the same operation succeeds seconds later. A full disk, a
missing permission or a wrong path stays, so those errors are raised at once.

Only operations that may be repeated belong here: creating a folder, listing, reading, writing a small file from its beginning, renaming. `fsync` does
not. After a failed fsync Linux marks the unwritten pages as clean, so a second fsync succeeds although the data is lost; its error fails the save.

Source: Rebello et al., "Can Applications Recover from fsync Failures?", USENIX ATC 2020.
"""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

TRANSIENT = frozenset(
    getattr(errno, name)
    for name in (
        "EIO",
        "ESTALE",
        "EAGAIN",
        "EBUSY",
        "ETIMEDOUT",
        "EINTR",
        "ENOTCONN",
        "ECONNRESET",
        "EHOSTDOWN",
        "EREMOTEIO",
    )
)
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before each new try; about a quarter of a minute in all

T = TypeVar("T")


def patiently(act: Callable[[], T], what: str, report: Callable[[str], None] = print) -> T:
    """Returns the result of `act`, which is tried again after a transient OSError, at most len(PAUSES) times.

    Args:
        act: an operation that may be repeated.
        what: the operation in words, such as "reading PATH".
        report: receives a line before each pause.

    Raises:
        OSError: the last try's, or one that is not transient.
    """
    for number, pause in enumerate(PAUSES, start=1):
        try:
            return act()
        except OSError as error:
            if not is_transient(error):
                raise
            report(f"{what} failed ({error.strerror}); trying again in {pause:g} s ({number} of {len(PAUSES)})")
            time.sleep(pause)
    return act()


def rename_patiently(old: Path, new: Path, report: Callable[[str], None] = print) -> None:
    """Renames a file or folder. If a try reports a transient error although the rename was done, the next one finds that out."""
    tried = False

    def rename() -> None:
        nonlocal tried
        try:
            os.rename(old, new)
        except FileNotFoundError:
            if not (tried and new.exists()):
                raise
        finally:
            tried = True

    patiently(rename, f"renaming {old} to {new.name}", report)


def is_transient(error: BaseException) -> bool:
    """Returns whether an error is an OSError that may pass."""
    return isinstance(error, OSError) and error.errno in TRANSIENT
