"""The table of sources: for each `kind` its settings and the function that fetches its text.

A source consists of a dataclass of settings (with `kind` and `problems()`), a YAML file in conf/source/, and a function

    fetch(settings, store, log) -> None

It leaves files that data_prep.readers can read and registers them with `store` (data_prep/sources/store.py). They are
either texts that the store writes as JSON lines (`store.add_texts`), or files that exist already (`store.add_files`:
jsonl, parquet or text). `log` prints a line for the user.

`fetch` is idempotent: what an earlier, perhaps killed, call finished is not fetched again. Downloads go into
`store.cache`, which datasets share, and get their names only once they are complete. A source that cannot continue
raises InputError with one sentence.

To add a source, write those three, one line in SOURCES and the dataclass's name in PartSource
(data_prep/sources/settings.py). If fetching needs more than the standard library, import its
module inside the function, so that a run does not load what other sources need.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data_prep.progress import Log
from data_prep.sources.files import JsonlSource, ParquetSource, TextSource, find_part
from data_prep.sources.hub.settings import HubSource
from data_prep.sources.packages.settings import LocalDocsSource, QuickstartSource
from data_prep.sources.store import TextStore

Fetch = Callable[[Any, TextStore, Log], None]


@dataclass(frozen=True, slots=True)
class Source:
    """One kind of source."""

    settings: type  # its dataclass
    fetch: Fetch
    fetched: bool = True  # its text is fetched once and kept; False: the user's own files, searched in every run


def _quickstart(source: QuickstartSource, store: TextStore, log: Log) -> None:
    from data_prep.sources.packages.quickstart import extract_quickstart

    log(f"text: extracting it once, kept in {store.folder}")
    extract_quickstart(source, store)


def _local_docs(source: LocalDocsSource, store: TextStore, log: Log) -> None:
    from data_prep.sources.packages.local_docs import extract_local_docs

    log(f"text: extracting it once, kept in {store.folder}")
    extract_local_docs(source, store.cache, log, store)


def _hub(source: HubSource, store: TextStore, log: Log) -> None:
    from data_prep.sources.hub.parts import fetch_hub

    for part, facts in zip(*fetch_hub(source, store.cache, log), strict=True):
        details = {name: value for name, value in facts.items() if name not in ("kind", "name", "files")}
        store.add_files(part.name, part.format, part.files, part.text_column, origin=source.kind, **details)


def _own_files(source: Any, store: TextStore, log: Log) -> None:
    part = find_part(source, log)
    store.add_files(part.name, part.format, part.files, part.text_column, origin=source.kind)


SOURCES: dict[str, Source] = {
    "quickstart": Source(QuickstartSource, _quickstart),
    "local_docs": Source(LocalDocsSource, _local_docs),
    "hub": Source(HubSource, _hub),
    "jsonl": Source(JsonlSource, _own_files, fetched=False),
    "parquet": Source(ParquetSource, _own_files, fetched=False),
    "text": Source(TextSource, _own_files, fetched=False),
}
