"""Child processes: how they are started, and that none outlives its parent."""

import multiprocessing
import multiprocessing.connection
import os
import threading

FORK = multiprocessing.get_context("fork")  # a child has what its parent has loaded, and starts in milliseconds


def end_with_parent() -> None:
    """Lets this process end as soon as its parent does, however that ends."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
