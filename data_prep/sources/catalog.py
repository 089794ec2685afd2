"""The sources there are: for each `kind` its settings and the step that brings its text to this machine.

A source is a dataclass of settings (with `kind` and `problems()`), a YAML file in conf/source/, and a function

    fetch(settings, store, progress) -> None

which leaves files that data_prep.readers can read and names them to `store` (data_prep/sources/store.py): either texts, which the
store writes as JSON lines (`store.add_all`), or files that lie there already (`store.add_files`: jsonl, parquet or text).
`progress` takes lines for people.

`fetch` is idempotent: what an earlier, perhaps killed, call finished is not fetched again. Downloads belong into `store.cache`, which
datasets share, under names that only whole files have. A source that cannot go on raises InputError with one sentence.

To add one: write those three and a line in SOURCES. A fetch that needs more than the standard library imports its module when it is
called: a run need not load those of the other sources.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data_prep import config as settings
from data_prep.sources.files import find_files
from data_prep.sources.hub_settings import HubSource
from data_prep.sources.store import TextStore

Progress = Callable[[str], None]
Fetch = Callable[[Any, TextStore, Progress], None]


@dataclass(frozen=True, slots=True)
class Source:
    """One kind of source."""

    settings: type  # its dataclass
    fetch: Fetch
    remembered: bool = True  # False: the files are the user's own, looked for anew in every run


def _quickstart(source: settings.QuickstartSource, store: TextStore, progress: Progress) -> None:
    from data_prep.sources.quickstart import extract_quickstart

    progress(f"text: extracting it once, kept in {store.folder}")
    extract_quickstart(source, store)


def _local_docs(source: settings.LocalDocsSource, store: TextStore, progress: Progress) -> None:
    from data_prep.sources.local_docs import extract_local_docs

    progress(f"text: extracting it once, kept in {store.folder}")
    extract_local_docs(source, store.cache, progress, store)


def _hub(source: HubSource, store: TextStore, progress: Progress) -> None:
    from data_prep.sources.hub_corpus import fetch_hub

    for subset, facts in zip(*fetch_hub(source, store.cache, progress), strict=True):
        details = {name: value for name, value in facts.items() if name not in ("kind", "name", "files")}
        store.add_files(subset.name, subset.format, subset.files, subset.text_column, origin=source.kind, **details)


def _own_files(source: Any, store: TextStore, progress: Progress) -> None:
    found = find_files(source, progress)
    store.add_files(found.name, found.format, found.files, found.text_column, origin=source.kind)


SOURCES: dict[str, Source] = {
    "quickstart": Source(settings.QuickstartSource, _quickstart),
    "local_docs": Source(settings.LocalDocsSource, _local_docs),
    "hub": Source(HubSource, _hub),
    "jsonl": Source(settings.JsonlSource, _own_files, remembered=False),
    "parquet": Source(settings.ParquetSource, _own_files, remembered=False),
    "text": Source(settings.TextSource, _own_files, remembered=False),
}
