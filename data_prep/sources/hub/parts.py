"""A dataset on the hub as parts of the corpus: its files or streamed text, and the text of blobs for a part that lists blob ids."""

import itertools
from pathlib import Path
from typing import Any

from data_prep.errors import InputError
from data_prep.files import digest
from data_prep.progress import Log
from data_prep.sources.files import JSONL_SUFFIXES, Part
from data_prep.sources.hub.blobs import fetch_blobs
from data_prep.sources.hub.download import Listing, RemoteFile, download_all, list_dataset
from data_prep.sources.hub.settings import HubMode, HubPart, HubSource
from data_prep.sources.hub.streaming import stream_all


def fetch_hub(source: HubSource, cache: Path, log: Log) -> tuple[list[Part], list[dict[str, Any]]]:
    """Returns the parts of the corpus, fetched to this machine, and their descriptions for the manifest.

    Args:
        source: checked settings.
        cache: folder of downloads.
        log: prints a line for the user.

    Raises:
        InputError: something cannot be fetched, in one sentence.
    """
    folder = cache / "hub" / source.repo.replace("/", "--")
    listing = list_dataset(source, folder)
    parts, descriptions = [], []
    # All patterns are matched before the first byte of a file is fetched.
    chosen = {name: _chosen(listing, part, source.mode) for name, part in source.subsets.items()}
    for name, part in source.subsets.items():
        facts: dict[str, Any] = {"kind": source.kind, "name": name, "repo": source.repo, "commit": listing.commit}
        facts |= {"licence": listing.licence, "files": len(chosen[name])}
        if part.blobs:
            lists = download_all(source, listing, chosen[name], folder, log)
            place = folder / listing.commit / f"blobs-{digest([file.path for file in chosen[name]])[:12]}"
            paths, report = fetch_blobs(lists, source.blobs, place, log)
            facts |= {"blobs": report}
        elif source.mode is HubMode.stream:
            paths = stream_all(source, part, listing, chosen[name], folder, log)
        else:
            paths = download_all(source, listing, chosen[name], folder, log)
        descriptions.append(facts)
        parts.append(Part(name, _format(paths[0]) if paths else "parquet", tuple(map(str, paths)), _column(part)))
    return parts, descriptions


def _column(part: HubPart) -> str:
    return "text" if part.blobs else part.text_column


def _chosen(listing: Listing, part: HubPart, mode: HubMode) -> list[RemoteFile]:
    """Returns the files of a part: those that match the pattern, up to the limit if whole files are downloaded."""
    files = listing.matching(part.files)
    formats = {_format(Path(file.path)) for file in files}
    if len(formats) > 1 or "" in formats:
        odd = next(file.path for file in files if _format(Path(file.path)) != "parquet")
        raise InputError(
            f"{listing.repo}: {part.files} matches {odd}, which is neither Parquet nor JSON lines like the others; narrow "
            "source.subsets.…files"
        )
    if mode is HubMode.stream or not part.limit_gb or part.blobs:
        return files
    before = itertools.accumulate((file.size for file in files), initial=0)
    return [file for file, size in zip(files, before, strict=False) if size < part.limit_gb * 1e9]


def _format(path: Path) -> str:
    if path.name.endswith(".parquet"):
        return "parquet"
    return "jsonl" if path.name.endswith((*JSONL_SUFFIXES, ".json")) else ""
