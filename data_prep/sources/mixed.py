"""source=mixed: several sources as one corpus, each with settings of its own, so that one command makes one dataset of them.

    parts:
      web:  {kind: jsonl, paths: [web/*.jsonl.gz]}
      docs: {kind: hub, repo: owner/name, subsets: {docs: {files: "data/*.parquet"}}}

A part's settings are those of its kind. The user's own files (jsonl, parquet, text) become a part of the corpus under the key. Other kinds name
their parts themselves: the subsets of a hub's dataset, what an extracting source makes.
"""

from typing import Any

from data_prep.sources.settings import MixedSource


def sources_of(source: Any) -> list[Any]:
    """Returns the settings of the sources that a run asks: those inside a mixed one, else the one itself."""
    return source.settings() if isinstance(source, MixedSource) else [source]
