"""Extracts documents from packages in several processes. A task is some files of one package.

Results come in the order of the tasks, so the text is the same on every machine. Only a few tasks are in flight at a
time, so memory does not grow with the corpus.
"""

import gzip
import hashlib
import multiprocessing
import os
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import InputError
from data_prep.sources.packages.contamination import HeldOut
from data_prep.sources.packages.debian import Package
from data_prep.sources.packages.markup import dictionary_pages, html_text, plain_text, sword_blocks
from data_prep.sources.packages.quickstart import is_written_by_hand, python_sources, wiki_pages
from data_prep.sources.packages.recipes import LISTING_FOLDERS, LISTINGS, WIKI_WHEEL, PackageRecipe
from data_prep.sources.packages.wheels import read_wheel

ENTRIES_PER_PAGE = 16
WIKI_ENTRIES_PER_PAGE = 8
MIN_DOCUMENT_CHARACTERS = 500
PYTHON_BYTES = (1_500, 200_000)
TASK_BYTES = 6_000_000


@dataclass(frozen=True, slots=True)
class Task:
    """Files of one package, or a wheel, or the Python source installed on this machine."""

    part: str
    origin: str  # full name of the package, for messages and counts
    format: str  # plain, html, dict, sword, wiki, wheel or installed
    paths: tuple[str, ...] = ()
    limit_mb: float = 0.0  # maximum MB of text; 0 takes all


@dataclass(frozen=True, slots=True)
class Extracted:
    """The result of a task."""

    task: Task
    texts: list[str]
    overlapping: int  # documents dropped because they share consecutive words with held-out text


def package_tasks(package: Package, recipe: PackageRecipe) -> list[Task]:
    """Returns the tasks that read a Debian package."""
    groups: list[list[str]] = [[]]
    size = 0
    for path in sorted(package.folder.glob(recipe.pattern)):
        if not path.is_file() or path.is_symlink() or _is_listing(path):
            continue
        if groups[-1] and size + path.stat().st_size > TASK_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(str(path))
        size += path.stat().st_size
    return [Task(recipe.part, package.full_name, recipe.format, tuple(group)) for group in groups]


def wheel_task(pin: str, wheel: Path, limit_mb: float) -> Task:
    """Returns the task that reads a wheel: Python source, or the encyclopaedia."""
    if pin.startswith(WIKI_WHEEL):
        return Task("encyclopaedia", pin.replace("==", " "), "wiki", (str(wheel),))
    return Task("python", pin.replace("==", " "), "wheel", (str(wheel),), limit_mb)


def extract(task: Task) -> list[str]:
    """Returns the documents of a task, without those shorter than `MIN_DOCUMENT_CHARACTERS`."""
    texts: Iterable[str]
    if task.format == "installed":
        texts = python_sources(task.limit_mb)
    elif task.format == "wheel":
        texts = _wheel_sources(Path(task.paths[0]), task.limit_mb)
    elif task.format == "wiki":
        content = next(read_wheel(Path(task.paths[0]), "/summaries_en-us.json"), None)
        if content is None:
            raise InputError(f"{task.paths[0]} has no English summaries; use {WIKI_WHEEL}==0.0.7")
        texts = wiki_pages(content[1], WIKI_ENTRIES_PER_PAGE)
    else:
        texts = (text for path in task.paths for text in _documents(task, Path(path)))
    return [text for text in texts if len(text) >= MIN_DOCUMENT_CHARACTERS]


def extract_all(tasks: list[Task], held_out: HeldOut | None) -> Iterator[Extracted]:
    """Yields the result of each task, in order. Documents that overlap with held-out text are dropped and counted.

    Raises:
        InputError: a file is damaged, or a process was killed.
    """
    if not tasks:
        return
    processes = min(len(os.sched_getaffinity(0)), len(tasks))
    context = multiprocessing.get_context("spawn")
    waiting: deque = deque()
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_start_process, initargs=(held_out,)) as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(_run_task, task))
                if len(waiting) > 3 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise InputError(
                "a process that extracts text was killed, most often because memory ran out; free some and run again"
            ) from None
        finally:
            for future in waiting:
                future.cancel()


class _ProcessState:
    """What a process keeps between tasks. A pool calls plain functions, so the state is on a class."""

    held_out: HeldOut | None = None


def _start_process(held_out: HeldOut | None) -> None:
    _ProcessState.held_out = held_out


def _run_task(task: Task) -> Extracted:
    texts = extract(task)
    if _ProcessState.held_out is None:
        return Extracted(task, texts, 0)
    kept = [text for text in texts if not _ProcessState.held_out.overlaps(text.encode("utf-8", errors="replace"))]
    return Extracted(task, kept, len(texts) - len(kept))


def _documents(task: Task, path: Path) -> Iterator[str]:
    try:
        if task.format == "plain":
            yield plain_text(path)
        elif task.format == "html":
            yield html_text(plain_text(path))
        elif task.format == "dict":
            yield from dictionary_pages(path, ENTRIES_PER_PAGE)
        else:
            yield from sword_blocks(path)
    except (OSError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"{path} of package {task.origin} is damaged ({error}); delete the package's folder and run again"
        ) from None


def _wheel_sources(wheel: Path, limit_mb: float) -> Iterator[str]:
    """Yields Python files of a wheel in the order of their hashes, up to a number of MB: a fair sample."""
    files = []
    for _, raw in read_wheel(wheel, ".py"):
        if PYTHON_BYTES[0] <= len(raw) <= PYTHON_BYTES[1]:
            files.append((hashlib.sha256(raw).digest(), raw))
    total = 0
    for _, raw in sorted(files):
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if is_written_by_hand(text):
            total += len(raw)
            if total > limit_mb * 1e6:
                return
            yield text


def _is_listing(path: Path) -> bool:
    return path.name.startswith(LISTINGS) or not set(LISTING_FOLDERS).isdisjoint(path.parts)
