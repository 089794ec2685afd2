"""A dataset on the hub as parts of a corpus: listing, files or streamed text, and the text of blobs where a part lists them."""

import itertools
from pathlib import Path
from typing import Any

from data_prep.corpus.planning import Part
from data_prep.errors import InputError
from data_prep.files import digest
from data_prep.sources.files import JSONL_SUFFIXES
from data_prep.sources.hub.blobs import fetch_blobs
from data_prep.sources.hub.download import Listing, Log, RemoteFile, download_all, list_dataset
from data_prep.sources.hub.settings import HubMode, HubPart, HubSource
from data_prep.sources.hub.streaming import stream_all


def fetch_hub(source: HubSource, cache: Path, log: Log) -> tuple[list[Part], list[dict[str, Any]]]:
    """Returns the parts of the corpus, all on this disk, and their description for the manifest.

    Args:
        source: checked settings.
        cache: folder of downloads.
        log: takes lines for the user.

    Raises:
        InputError: what cannot be fetched, in one sentence.
    """
    folder = cache / "hub" / source.repo.replace("/", "--")
    listing = list_dataset(source, folder)
    subsets, described = [], []
    # All patterns are looked up before the first byte of a file is fetched.
    chosen = {name: _chosen(listing, subset, source.mode) for name, subset in source.subsets.items()}
    for name, subset in source.subsets.items():
        facts: dict[str, Any] = {"kind": source.kind, "name": name, "repo": source.repo, "commit": listing.commit}
        facts |= {"licence": listing.licence, "files": len(chosen[name])}
        if subset.blobs:
            lists = download_all(source, listing, chosen[name], folder, log)
            place = folder / listing.commit / f"blobs-{digest([file.path for file in chosen[name]])[:12]}"
            paths, report = fetch_blobs(lists, source.blobs, place, log)
            facts |= {"blobs": report}
        elif source.mode is HubMode.stream:
            paths = stream_all(source, subset, listing, chosen[name], folder, log)
        else:
            paths = download_all(source, listing, chosen[name], folder, log)
        described.append(facts)
        subsets.append(Part(name, _format(paths[0]) if paths else "parquet", tuple(map(str, paths)), _column(subset)))
    return subsets, described


def _column(subset: HubPart) -> str:
    return "text" if subset.blobs else subset.text_column


def _chosen(listing: Listing, subset: HubPart, mode: HubMode) -> list[RemoteFile]:
    """Returns the files of a part: those that the pattern names, up to the limit where whole files are taken."""
    files = listing.matching(subset.files)
    formats = {_format(Path(file.path)) for file in files}
    if len(formats) > 1 or "" in formats:
        odd = next(file.path for file in files if _format(Path(file.path)) != "parquet")
        raise InputError(
            f"{listing.repo}: {subset.files} names {odd}, which is neither Parquet nor JSON lines like the others; narrow "
            "source.subsets.…files"
        )
    if mode is HubMode.stream or not subset.limit_gb or subset.blobs:
        return files
    before = itertools.accumulate((file.size for file in files), initial=0)
    return [file for file, size in zip(files, before, strict=False) if size < subset.limit_gb * 1e9]


def _format(path: Path) -> str:
    if path.name.endswith(".parquet"):
        return "parquet"
    return "jsonl" if path.name.endswith((*JSONL_SUFFIXES, ".json")) else ""
