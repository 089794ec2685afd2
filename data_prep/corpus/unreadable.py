"""Text that cannot be read: one message names all files that have some.

A run stops at the first line that it cannot read. Then the entire corpus is scanned, by one process per core and for at
most a minute, so that one message names every file to repair.
"""

import multiprocessing
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from data_prep.config import Config
from data_prep.corpus.planning import Shard, format_problems
from data_prep.errors import UnreadableText
from data_prep.processes import FORK, worker_count
from data_prep.progress import Log
from data_prep.readers import Skipped, read_piece

SCAN_SECONDS = 60.0


@contextmanager
def reporting_all_unreadable(config: Config, shards: list[Shard], log: Log) -> Iterator[None]:
    """Replaces an UnreadableText raised inside by one that lists the problems of all files.

    Raises:
        UnreadableText: names every file, with the first problem of each.
    """
    try:
        yield
        return
    except UnreadableText as error:
        first = str(error)
    log("some text cannot be read; scanning all files for more of it")
    problems, complete = _scan_all(shards, worker_count(config.workers))
    message = format_problems(problems) if len(problems) > 1 else first
    if not complete:
        message += f"\n(not all files could be scanned in {SCAN_SECONDS:.0f} s)"
    raise UnreadableText(with_skip_advice(message, config))


def with_skip_advice(message: str, config: Config) -> str:
    """Returns a message with the setting that leaves unreadable text out."""
    setting = "source.parts.NAME.on_error" if config.source.kind == "mixed" else "source.on_error"
    joint = "\n" if "\n" in message else "; "
    return f"{message}{joint}{setting}=skip leaves such text out and counts it"


def _scan_all(shards: list[Shard], num_processes: int) -> tuple[list[str], bool]:
    """Returns what is wrong with each file, and whether all files were read."""
    found: dict[str, list] = {}
    deadline, done = time.monotonic() + SCAN_SECONDS, 0
    with FORK.Pool(min(num_processes, len(shards)), _ignore_interrupts) as pool:
        results = pool.imap(_scan, shards)
        with suppress(multiprocessing.TimeoutError):
            for _ in shards:
                for path, (problem, count) in results.next(max(0.1, deadline - time.monotonic())).items():
                    found.setdefault(path, [problem, 0])[1] += count
                done += 1
    more = {path: f" (and {count - 1} more in this file)" if count > 1 else "" for path, (_, count) in found.items()}
    return [f"{problem}{more[path]}" for path, (problem, _) in sorted(found.items())], done == len(shards)


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C


def _scan(shard: Shard) -> dict[str, list]:
    skipped = Skipped()
    for piece in shard.pieces:
        if piece.on_error == "fail":
            for _ in read_piece(replace(piece, on_error="skip"), _ignore_progress, skipped):
                pass
    return skipped.problems


def _ignore_progress(_: int) -> None:
    pass
