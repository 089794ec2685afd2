"""The rows of `data.packing=best_fit` as files: which documents, or parts of long ones, lie in which row.

The documents of a part are packed in windows of WINDOW documents in the order of its files (best_fit.py), so memory does
not grow with the dataset: 100 billion tokens in 100 million documents take about two minutes, and 1.4 GB of files. The
index is a folder, `packing/HASH` in the dataset's folder or in `data.index_path`, where HASH is a hash of the dataset's
fingerprint, the length of a row and VERSION. So an index of other data or settings is never read. For part N it has,
little-endian:

    N.pieces   per piece 12 bytes: int64 first token in the part, int32 tokens; the pieces of a row follow one another
    N.rows     per row 12 bytes: int64 number of pieces up to its end, int32 tokens without padding

and index.json, written last, with sizes and sha256 of these files and a checksum of its own. A piece that ends before its
document does has one token more, which is only the label of its last one. So each token of the part is in one row, and
each one that has a predecessor in its document is its label in one row.

`prepare` builds an index or verifies its sha256; one process per node calls it. `open_index` compares sizes only.
Row n is a function of (fingerprint, length, VERSION, n). Needs only the standard library and numpy.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ssa_pretrain.data.best_fit import best_fit
from ssa_pretrain.data.indexed_format import read_lengths
from ssa_pretrain.data.manifest import Manifest
from ssa_pretrain.data.repair import content_checksum
from ssa_pretrain.settings.files import file_sha256, sync, write_atomically

VERSION = 1  # of what decides the rows; WINDOW is a part of it
WINDOW = 1 << 20  # documents that are packed together
PIECE = np.dtype([("first", "<i8"), ("tokens", "<i4")])
ROW = np.dtype([("end", "<i8"), ("tokens", "<i4")])
LISTING = "index.json"


@dataclass(frozen=True, slots=True)
class PackedPart:
    """One part of an index.

    Attributes:
        name: the part's.
        rows: rows per epoch.
        tokens: of the part, all of which the rows hold.
        pieces: documents and parts of long ones.
        cut_documents: documents longer than a row.
        files: size and sha256 of each file, by name.
    """

    name: str
    rows: int
    tokens: int
    pieces: int
    cut_documents: int
    files: dict[str, tuple[int, str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PackedIndex:
    """The index of a dataset.

    Attributes:
        folder: its files.
        length: tokens per row.
        parts: in the manifest's order.
    """

    folder: Path
    length: int
    parts: tuple[PackedPart, ...]

    @property
    def padding_share(self) -> float:
        """Share of padding in the tokens of all rows of an epoch."""
        return 1.0 - sum(p.tokens for p in self.parts) / (self.length * sum(p.rows for p in self.parts))

    @property
    def rows_per_epoch(self) -> dict[str, int]:
        """The rows of each part."""
        return {part.name: part.rows for part in self.parts}

    def pieces(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the pieces of part `number` and its rows, PIECE and ROW, both mapped."""
        pieces = np.memmap(self.folder / f"{number}.pieces", dtype=PIECE, mode="r")
        return pieces, np.memmap(self.folder / f"{number}.rows", dtype=ROW, mode="r")

    def sentence(self) -> str:
        """Returns the fill of the rows in a sentence."""
        rows, cut = sum(p.rows for p in self.parts), sum(p.cut_documents for p in self.parts)
        return f"best fit: {rows:,} rows, {self.padding_share:.3%} padding; {cut:,} documents longer than a row are cut at its length"


def index_folder(manifest: Manifest, length: int, place: str) -> Path:
    """Returns the folder of an index, which may not exist yet.

    Args:
        manifest: the dataset.
        length: tokens per row.
        place: data.index_path.
    """
    decisive = f"{manifest.fingerprint} best_fit {length} version {VERSION} window {WINDOW}"
    return (Path(place) if place else manifest.root) / "packing" / hashlib.sha256(decisive.encode()).hexdigest()[:16]


def open_index(manifest: Manifest, length: int, place: str) -> PackedIndex | None:
    """Returns the index of a dataset after comparing its listing and the sizes of its files; None if it is missing or does not match.

    Args are those of `index_folder`.
    """
    folder = index_folder(manifest, length, place)
    try:
        content = json.loads((folder / LISTING).read_bytes())
        if content["checksum"] != content_checksum(content):
            return None
        parts = [
            PackedPart(**part | {"files": {n: (s, h) for n, (s, h) in part["files"].items()}})
            for part in content["parts"]
        ]
        sizes = {name: size for part in parts for name, (size, _) in part.files.items()}
        if sizes != {name: (folder / name).stat().st_size for name in _file_names(len(parts))}:
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    expected = dict.fromkeys(shard.part for shard in manifest.splits["train"])
    return PackedIndex(folder, length, tuple(parts)) if [part.name for part in parts] == list(expected) else None


def prepare(manifest: Manifest, length: int, place: str) -> str:
    """Makes sure that a dataset's index is there and undamaged; builds it if it is not. Returns what was done, in a sentence.

    Args are those of `index_folder`.

    Raises:
        OSError: the folder cannot be written, or not be read again.
    """
    folder = index_folder(manifest, length, place)
    found = open_index(manifest, length, place)
    if found is not None and _is_intact(found):
        return f"{found.sentence()}; index {folder}"
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        raise OSError(f"{folder} is damaged and cannot be removed")
    _build(manifest, length, folder)
    built = open_index(manifest, length, place)
    if built is None:
        raise OSError(f"{folder} does not have what was written into it")
    return f"{built.sentence()}; built the index {folder}"


def _is_intact(index: PackedIndex) -> bool:
    """Returns whether the files have the sha256 of the listing."""
    return all(
        file_sha256(index.folder / name) == sha256 for part in index.parts for name, (_, sha256) in part.files.items()
    )


def _file_names(num_parts: int) -> list[str]:
    return [f"{number}.{kind}" for number in range(num_parts) for kind in ("pieces", "rows")]


def _build(manifest: Manifest, length: int, folder: Path) -> None:
    """Writes an index into a temporary folder and renames it. If another process has been faster, its index stays: it has the same bytes."""
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        files: dict[str, list[Path]] = {}
        for shard in manifest.splits["train"]:
            files.setdefault(shard.part, []).append(manifest.root / f"{shard.prefix}.idx")
        parts = [_build_part(unfinished, number, name, files[name], length) for number, name in enumerate(files)]
        content: dict[str, Any] = {"fingerprint": manifest.fingerprint, "length": length, "version": VERSION}
        content |= {"window": WINDOW, "parts": [asdict(part) for part in parts]}
        content["checksum"] = content_checksum(content)
        write_atomically(unfinished / LISTING, json.dumps(content, indent=1) + "\n")
        sync(unfinished)
        try:
            os.rename(unfinished, folder)
        except OSError:
            if not (folder / LISTING).is_file():
                raise
        sync(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _build_part(folder: Path, number: int, name: str, files: list[Path], length: int) -> PackedPart:
    """Writes the two files of a part; returns its line of the listing."""
    num_rows = num_pieces = num_tokens = num_cut = 0
    names = [f"{number}.pieces", f"{number}.rows"]
    with (folder / names[0]).open("wb") as pieces_file, (folder / names[1]).open("wb") as rows_file:
        for window in _windows(files):
            pieces, rows = pack_window(*window, length)
            rows["end"] += num_pieces
            pieces_file.write(pieces.tobytes())
            rows_file.write(rows.tobytes())
            num_rows, num_pieces = num_rows + len(rows), num_pieces + len(pieces)
            num_tokens += int(window[1].sum())
            num_cut += int((window[1] > length).sum())
        for file in (pieces_file, rows_file):
            file.flush()
            os.fsync(file.fileno())
    listed = {file: ((folder / file).stat().st_size, file_sha256(folder / file)) for file in names}
    return PackedPart(name, num_rows, num_tokens, num_pieces, num_cut, listed)


def _windows(files: list[Path]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields first tokens and lengths, int64, of WINDOW documents at a time, across the files of a part."""
    waiting = np.empty(0, dtype=np.int64)
    offset = 0
    for number, file in enumerate(files):
        waiting = np.concatenate([waiting, read_lengths(file).astype(np.int64)])
        is_last = number == len(files) - 1
        while len(waiting) >= WINDOW or (is_last and len(waiting)):
            lengths, waiting = waiting[:WINDOW], waiting[WINDOW:]
            ends = offset + np.cumsum(lengths)
            yield ends - lengths, lengths
            offset = int(ends[-1])


def pack_window(first: np.ndarray, lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pieces of some documents, row after row, and the rows.

    Args:
        first: int64 [documents], each document's first token in its part.
        lengths: int64 [documents], tokens; documents without tokens are left out.
        capacity: tokens per row.

    Returns:
        PIECE [pieces]: within a row in the documents' order. ROW [rows].
    """
    whole, rest = lengths // capacity, lengths % capacity
    num_pieces = whole + (rest > 0)
    document = np.repeat(np.arange(len(lengths)), num_pieces)
    place = np.arange(len(document)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)  # in its document
    tokens = np.where(place < whole[document], capacity, rest[document])
    row = best_fit(tokens, capacity)
    pieces = np.empty(len(document), dtype=PIECE)
    pieces["first"] = first[document] + place * capacity
    pieces["tokens"] = tokens + (place < num_pieces[document] - 1)  # with the label that follows
    rows = np.empty(int(row.max(initial=-1)) + 1, dtype=ROW)
    rows["end"] = np.cumsum(np.bincount(row, minlength=len(rows)))
    rows["tokens"] = np.bincount(row, weights=tokens, minlength=len(rows))
    return pieces[np.argsort(row, kind="stable")], rows
