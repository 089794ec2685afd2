"""source=mixed: several sources as one corpus, each with its own settings, so that one command makes one dataset of them.

    parts:
      web:  {kind: jsonl, paths: [web/*.jsonl.gz]}
      docs: {kind: hub, repo: owner/name, subsets: {docs: {files: "data/*.parquet"}}}

The settings under each key are those of its kind. The user's own files (jsonl, parquet, text) become a part of the
corpus named by the key. Other kinds name their parts themselves: the subsets of a dataset on the hub, or what an
extracting source makes.
"""

from typing import Any

from data_prep.sources.catalog import SOURCES
from data_prep.sources.settings import MixedSource


def sources_of(source: Any) -> list[Any]:
    """Returns the settings of each source of a run: those inside a mixed one, else the one itself."""
    return source.settings() if isinstance(source, MixedSource) else [source]


def fetched_and_own(source: Any) -> tuple[list[Any], list[Any]]:
    """Returns the sources whose text is fetched once and kept, and those of the user's own files, which are searched in every run."""
    sources = sources_of(source)
    fetched = [one for one in sources if SOURCES[one.kind].fetched]
    return fetched, [one for one in sources if not SOURCES[one.kind].fetched]
