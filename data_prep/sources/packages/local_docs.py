"""Corpora without a model hub: documentation packages of Debian and Ubuntu, and Python source.

    prose          essays and commentaries, long documents
    reference      manuals, tutorials, dictionaries
    python         source files, from pinned wheels or from packages installed on this machine
    encyclopaedia  leads of Wikipedia articles (source=heldout)

This is technical English and Python, not a sample of the web. Documents shorter than 500 characters and exact
duplicates are dropped. `source.keep_out` names packages of held-out text: a training document that shares thirteen
consecutive words with them is dropped and counted (data_prep/sources/packages/contamination.py). With
`source.max_repeated`, so is a document that repeats more than this share of the text before it
(data_prep/sources/packages/repeats.py). Packages and licences are in data_prep/sources/packages/recipes.py.
"""

import itertools
import math
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from data_prep.errors import InputError
from data_prep.progress import Log
from data_prep.sources.packages.contamination import HeldOut
from data_prep.sources.packages.debian import unpacked_packages
from data_prep.sources.packages.extracting import Extracted, Task, extract, extract_all, package_tasks, wheel_task
from data_prep.sources.packages.recipes import RECIPES, check_packages, is_wheel
from data_prep.sources.packages.repeats import RepeatFilter
from data_prep.sources.packages.settings import LocalDocsSource
from data_prep.sources.packages.wheels import downloaded_wheels
from data_prep.sources.store import TextStore

MAX_WHEEL_SHARE = 0.2  # of the Python source, from one wheel, so that no single author dominates


def extract_local_docs(source: LocalDocsSource, cache: Path, log: Log, store: TextStore) -> None:
    """Writes the corpus into `store`, downloading what the cache lacks; InputError if that fails."""
    check_packages([*source.packages, *(name for name in source.keep_out if not is_wheel(name))])
    kept_out = _tasks_of(source.keep_out, cache, 0.0)
    pins = [*source.packages, *source.wheels]
    tasks = _tasks_of(pins, cache, source.python_mb * MAX_WHEEL_SHARE)
    if source.python_mb and not source.wheels:
        tasks.insert(0, Task("python", "installed Python packages", "installed", (), source.python_mb))
    held_out = _held_out(kept_out, log) if kept_out else None
    repeats = None if source.max_repeated is None else RepeatFilter(source.max_repeated)
    _store_all(extract_all(tasks, held_out), source.python_mb * 1e6, repeats, store, log)


def _store_all(
    results: Iterator[Extracted], python_bytes: float, repeats: RepeatFilter | None, store: TextStore, log: Log
) -> None:
    """Puts the results of the tasks into the store, origin by origin, Python source up to a number of bytes."""
    left = {"python": python_bytes}
    for origin, group in groupby(results, key=lambda extracted: extracted.task.origin):
        results_of_origin = _OriginResults(group)
        part = results_of_origin.part
        limit = left.get(part, math.inf)
        counts = store.add_texts(part, origin, results_of_origin.texts(limit), repeats and repeats.keeps)
        counts.overlapping = results_of_origin.overlapping
        if not counts.documents and not counts.duplicates and not counts.repeated and limit > 0:
            raise InputError(
                f"package {origin} has no text in the files of its recipe; leave it out of source.packages"
            )
        if part in left:
            left[part] -= counts.text_bytes
        dropped = f", {counts.overlapping} with held-out words dropped" if counts.overlapping else ""
        if counts.repeated:
            dropped += f", {counts.repeated:,} that repeat earlier text dropped ({counts.repeated_bytes / 1e6:.1f} MB)"
        log(f"text: {origin}, {counts.documents:,} documents, {counts.text_bytes / 1e6:.1f} MB{dropped}")


def _tasks_of(names: list[str], cache: Path, wheel_mb: float) -> list[Task]:
    """Returns the tasks that read Debian packages and wheels, after fetching what the cache lacks."""
    tasks = []
    for name, package in unpacked_packages([n for n in names if not is_wheel(n)], cache).items():
        tasks += package_tasks(package, RECIPES[name])
    for pin, wheel in downloaded_wheels([n for n in names if is_wheel(n)], cache).items():
        tasks.append(wheel_task(pin, wheel, wheel_mb))
    return tasks


def _held_out(tasks: list[Task], log: Log) -> HeldOut:
    held_out = HeldOut(text.encode("utf-8", errors="replace") for task in tasks for text in extract(task))
    log(
        f"text: {held_out.num_documents:,} held-out documents, {held_out.num_ngrams:,} n-grams of words, kept out of training"
    )
    return held_out


class _OriginResults:
    """The results of the tasks of one origin; counts the documents that they dropped."""

    def __init__(self, results: Iterator[Extracted]) -> None:
        first = next(results)
        self._results = itertools.chain([first], results)
        self.part = first.task.part
        self.overlapping = 0

    def texts(self, limit: float) -> Iterator[str]:
        """Yields the documents, up to a number of bytes."""
        size = 0
        for extracted in self._results:
            self.overlapping += extracted.overlapping
            for text in extracted.texts:
                size += len(text.encode("utf-8", errors="replace"))
                if size <= limit:
                    yield text
