"""Text that cannot be read: all files that have some are named at once, or it is left out and counted.

A run ends at the first line that it cannot read. Then the corpus is looked through, by as many processes as there are cores and for a
minute at most, so that one message names the files to be mended.
"""

import multiprocessing
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from data_prep.config import Config
from data_prep.errors import UnreadableText
from data_prep.planning import Shard, listed
from data_prep.pool import num_workers
from data_prep.processes import FORK
from data_prep.progress import Say
from data_prep.readers import Skipped, described, read_piece
from data_prep.shards import Made, skipped_of

SCAN_SECONDS = 60.0
MOST_TOLD = 10  # files with skipped text that are told on the console


@contextmanager
def naming_all_files(config: Config, shards: list[Shard], say: Say) -> Iterator[None]:
    """Gives an UnreadableText from inside the problems of all files.

    Raises:
        UnreadableText: naming every file, with the first problem of each.
    """
    try:
        yield
        return
    except UnreadableText as error:
        first = str(error)
    say("some text cannot be read; looking through all files for more of it")
    problems, complete = _problems(shards, num_workers(config.workers))
    message = listed(problems) if len(problems) > 1 else first
    if not complete:
        message += f"\n(not all files could be looked through in {SCAN_SECONDS:.0f} s)"
    raise UnreadableText(with_skip_advice(message, config))


def with_skip_advice(message: str, config: Config) -> str:
    """Returns a message and how to go on without the text that cannot be read."""
    setting = "source.parts.NAME.on_error" if config.source.kind == "mixed" else "source.on_error"
    joint = "\n" if "\n" in message else "; "
    return f"{message}{joint}{setting}=skip leaves such text out and counts it"


def _problems(shards: list[Shard], processes: int) -> tuple[list[str], bool]:
    """Returns what is wrong with each file, and whether all were read."""
    found: dict[str, list] = {}
    deadline, done = time.monotonic() + SCAN_SECONDS, 0
    with FORK.Pool(min(processes, len(shards)), _ignore_interrupts) as pool:
        results = pool.imap(_scan, shards)
        with suppress(multiprocessing.TimeoutError):
            for _ in shards:
                for path, (problem, count) in results.next(max(0.1, deadline - time.monotonic())).items():
                    found.setdefault(path, [problem, 0])[1] += count
                done += 1
    more = {path: f" (and {count - 1} more in this file)" if count > 1 else "" for path, (_, count) in found.items()}
    return [f"{problem}{more[path]}" for path, (problem, _) in sorted(found.items())], done == len(shards)


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer


def _scan(shard: Shard) -> dict[str, list]:
    skipped = Skipped()
    for piece in shard.pieces:
        if piece.on_error == "fail":
            for _ in read_piece(replace(piece, on_error="skip"), _progress, skipped):
                pass
    return skipped.problems


def _progress(_: int) -> None:
    pass


def total_skipped(made: list[Made]) -> dict[str, int]:
    """Returns how many lines, rows and files the dataset lacks, since they could not be read."""
    return dict(sum((Counter(skipped_of(one.record)) for one in made), Counter()))


def tell_skipped(made: list[Made], say: Say) -> None:
    """Tells what was left out, and the first problem of some files."""
    if not (counts := total_skipped(made)):
        return
    problems: dict[str, list] = {}
    for one in made:
        for path, (problem, count) in one.record.get("skipped", {}).get("problems", {}).items():
            problems.setdefault(path, [problem, 0])[1] += count
    say(f"left out by on_error=skip: {described(counts)}")
    for problem, count in list(problems.values())[:MOST_TOLD]:
        say(f"  {problem}" + (f" (and {count - 1} more in this file)" if count > 1 else ""))
    if len(problems) > MOST_TOLD:
        say(f"  and {len(problems) - MOST_TOLD} more files; work/shards/*.json have the first problem of each")
