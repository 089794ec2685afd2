"""Child processes: how they are started, that none outlives its parent, and where their memory comes from."""

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

FORK = multiprocessing.get_context("fork")  # a child has what its parent has loaded, and starts in milliseconds


def end_with_parent() -> None:
    """Lets this process end as soon as its parent does, however that ends."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def in_own_memory(work: Callable[..., None], *arguments: Any) -> None:
    """Calls a function in a thread and returns when it does; raises what it raises.

    glibc gives a new thread a heap of its own. In the heap that a fork inherits, what is free lies scattered between the pieces of a
    loaded tokenizer: each page of it is copied when it is first written, and small objects end up far apart. `tokenizers`, which makes
    a great many of them, is a quarter slower there.
    """
    with ThreadPoolExecutor(1) as thread:
        thread.submit(work, *arguments).result()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
