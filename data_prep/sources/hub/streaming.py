"""The text column of remote Parquet files, row group by row group over HTTP range requests.

A Parquet file's footer has the position of each column of each row group, so only the text is read, not the other
columns. Row groups are collected into files of about `source.part_mb` MB of text. Each is written under a temporary
name and renamed, so a file that exists is complete, and a killed run continues after its last file. Which row groups go
into a file depends only on the footer.
"""

import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet

from data_prep.errors import InputError
from data_prep.files import read_json, sync, write_json
from data_prep.progress import Log
from data_prep.readers import check_text_column
from data_prep.sources.hub.download import Listing, RemoteFile, TransferError, explain_errors, retry, run_all
from data_prep.sources.hub.settings import HubPart, HubSource
from ssa_pretrain.data.indexed_format import file_sha256


@dataclass(frozen=True, slots=True)
class RowGroups:
    """Row groups [start, stop) of a remote file that become one local file."""

    start: int
    stop: int
    rows: int
    text_bytes: int  # uncompressed, from the footer

    @property
    def name(self) -> str:
        """Name of the local file."""
        return f"groups_{self.start:05d}_{self.stop:05d}.parquet"


def stream_all(
    source: HubSource, part: HubPart, listing: Listing, files: list[RemoteFile], folder: Path, log: Log
) -> list[Path]:
    """Returns local Parquet files with the text of remote ones, in order, after fetching what the cache lacks.

    Raises:
        InputError: all attempts failed; names file and row groups.
    """
    place = folder / listing.commit
    limit = part.limit_gb * 1e9 or math.inf
    paths: list[Path] = []
    total = 0.0
    # A few files at a time: only when they are done it is known how much text is still needed.
    for first in range(0, len(files), source.connections):
        if total >= limit:
            break
        group = files[first : first + source.connections]
        for file in group:
            if not file.path.endswith(".parquet"):
                raise InputError(f"source.mode=stream reads Parquet and {file.path} is not; use source.mode=download")
        fetch = partial(_stream_file, source, part, listing, place, limit - total)
        records = run_all(fetch, group, len(group))
        for file, record in zip(group, records, strict=True):
            for entry in record["parts"]:
                if total >= limit:
                    break
                total += entry["text_bytes"]
                paths.append(_folder(place, file, part) / entry["file"])
        log(f"hub: {listing.repo}, {first + len(group)} of {len(files)} files, {total / 1e9:.2f} GB of text")
    return paths


def _folder(place: Path, file: RemoteFile, part: HubPart) -> Path:
    path = place / file.path
    return path.with_name(f"{path.name}.stream-{part.text_column}")


def _stream_file(
    source: HubSource, part: HubPart, listing: Listing, place: Path, limit: float, file: RemoteFile
) -> dict[str, Any]:
    """Returns the record of a file after streaming its row groups, up to `limit` bytes of text."""
    folder = _folder(place, file, part)
    record = read_json(folder / "fetched.json")
    if isinstance(record, dict) and record["part_mb"] == source.part_mb and _is_sufficient(record, folder, limit):
        return record
    folder.mkdir(parents=True, exist_ok=True)
    what = f"{source.repo}/{file.path}"
    with explain_errors(what):
        remote = retry(lambda: _Remote(source, listing, file), source.attempts, what)
        check_text_column(remote.schema, part.text_column, what)
        planned = plan_row_groups(remote.metadata, part.text_column, source.part_mb)
        done, total = [], 0
        for groups in planned:
            if total >= limit:
                break
            retry(lambda g=groups: remote.write(g, part.text_column, folder), source.attempts, f"{what}, {groups.name}")
            done.append({"file": groups.name, **_facts(folder / groups.name, groups)})
            total += groups.text_bytes
    record = {
        "repo": listing.repo,
        "commit": listing.commit,
        "path": file.path,
        "part_mb": source.part_mb,
        "whole": len(done) == len(planned),
        "parts": done,
    }
    write_json(folder / "fetched.json", record)
    return record


def plan_row_groups(metadata: parquet.FileMetaData, column: str, part_mb: float) -> list[RowGroups]:
    """Returns the row groups of each local file: consecutive ones until their text reaches `part_mb` MB."""
    planned = []
    start = rows = size = 0
    # Leaves of nested columns count as columns here, so the index in the schema is not the index in a row group.
    names = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
    for group in range(metadata.num_row_groups):
        rows += metadata.row_group(group).num_rows
        size += metadata.row_group(group).column(names.index(column)).total_uncompressed_size
        if size >= part_mb * 1e6 or group == metadata.num_row_groups - 1:
            planned.append(RowGroups(start, group + 1, rows, size))
            start, rows, size = group + 1, 0, 0
    return planned


class _Remote:
    """A Parquet file behind HTTP, opened through its footer."""

    def __init__(self, source: HubSource, listing: Listing, file: RemoteFile) -> None:
        from huggingface_hub import HfFileSystem, get_hf_file_metadata, hf_hub_url

        url = hf_hub_url(source.repo, file.path, repo_type="dataset", revision=listing.commit, endpoint=source.endpoint)
        stated = get_hf_file_metadata(url, endpoint=source.endpoint)
        for name, here, there in (
            ("commit", stated.commit_hash, listing.commit),
            ("size", stated.size, file.size),
            ("ETag", stated.etag, file.sha256 or stated.etag),
        ):
            if here != there:
                raise TransferError(f"the server returns {name} {here}, but its listing has {there}")
        system = HfFileSystem(endpoint=source.endpoint, skip_instance_cache=True)
        # cache_type none: only the requested bytes are transferred. pyarrow itself joins neighbouring reads.
        handle = system.open(
            f"datasets/{source.repo}@{listing.commit}/{file.path}", "rb", cache_type="none", size=file.size
        )
        self._file = _open_parquet(handle)
        self.metadata = self._file.metadata
        self.schema = self._file.schema_arrow

    def write(self, groups: RowGroups, column: str, folder: Path) -> None:
        """Writes the text of some row groups to a local file, unless it exists."""
        path = folder / groups.name
        if path.is_file():
            return
        temporary = folder / f"{groups.name}.{os.getpid()}.tmp"
        rows = 0
        try:
            with parquet.ParquetWriter(
                temporary, pyarrow.schema([self.schema.field(column)]), compression="zstd"
            ) as out:
                for group in range(groups.start, groups.stop):
                    table = self._file.read_row_group(group, columns=[column])
                    rows += len(table)
                    out.write_table(table)
        except (pyarrow.ArrowException, OSError) as error:
            temporary.unlink(missing_ok=True)
            raise TransferError(f"row group {group} cannot be read: {error}") from None
        if rows != groups.rows:
            raise TransferError(f"it has {rows} rows, but its footer has {groups.rows}")
        sync(temporary)
        temporary.replace(path)
        sync(folder)


def _open_parquet(handle: Any) -> parquet.ParquetFile:
    try:
        return parquet.ParquetFile(handle, pre_buffer=True, page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise TransferError(f"its footer cannot be read: {error}") from None


def _facts(path: Path, groups: RowGroups) -> dict[str, Any]:
    return {
        "size": path.stat().st_size,
        "sha256": file_sha256(path),
        "rows": groups.rows,
        "text_bytes": groups.text_bytes,
    }


def _is_sufficient(record: dict[str, Any], folder: Path, limit: float) -> bool:
    """Returns whether a record's files all exist and hold the whole remote file, or as much as `limit` requires."""
    enough = record["whole"] or sum(part["text_bytes"] for part in record["parts"]) >= limit
    return enough and all(
        (folder / part["file"]).is_file() and (folder / part["file"]).stat().st_size == part["size"]
        for part in record["parts"]
    )
