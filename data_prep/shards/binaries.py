"""Writing the files of a dataset: tokens in .bin, their index in .idx, checksums in .sums.

A `.sums` file has the CRC-32 of each MiB of the .bin file, four little-endian bytes per MiB. The manifest's sha256
shows that a file changed. The `.sums` file tells validate where. Nothing else reads it.

Temporary names contain the process id, so that two writers never share a file, not even while the workers of a killed
run are still exiting. Files get their final names in the order .sums, .bin, .idx.
"""

import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from ssa_pretrain.data.indexed_format import HEADER, MAGIC, VERSION, dtype_code
from ssa_pretrain.data.manifest import ShardInfo
from ssa_pretrain.settings.files import sync, temporary_path

CRC_BYTES = 1 << 20  # bytes of .bin per CRC
DOCUMENTS_AT_ONCE = 1 << 20  # documents whose index entries are in memory at a time

Lengths = Iterable[np.ndarray]


class TokenFile:
    """A .bin file being written, with its checksums."""

    def __init__(self, prefix: Path) -> None:
        self.bytes = 0
        self._prefix = prefix
        self._sha256 = hashlib.sha256()
        self._sums: list[int] = []
        self._crc, self._crc_bytes = 0, 0
        prefix.parent.mkdir(parents=True, exist_ok=True)
        remove_files(prefix)
        self._file = open(temporary_path(with_suffix(prefix, ".bin")), "wb")

    def write(self, raw: bytes | memoryview) -> None:
        """Appends bytes."""
        self._file.write(raw)
        self._sha256.update(raw)
        self.bytes += len(raw)
        view = memoryview(raw)
        while len(view):
            piece = view[: CRC_BYTES - self._crc_bytes]
            self._crc = zlib.crc32(piece, self._crc)
            self._crc_bytes += len(piece)
            view = view[len(piece) :]
            if self._crc_bytes == CRC_BYTES:
                self._close_crc()

    def discard(self) -> None:
        """Removes what was written. An empty .bin cannot be mapped, so none is kept."""
        self._file.close()
        temporary_path(with_suffix(self._prefix, ".bin")).unlink()

    def close(
        self, part: str, prefix: str, dtype: np.dtype, lengths: Lengths, documents: int, flush: bool = True
    ) -> ShardInfo:
        """Writes the index, gives all files their final names and returns their description.

        Args:
            part: part of the corpus.
            prefix: as the manifest will have it.
            dtype: of the tokens.
            lengths: yields the lengths of the sequences in tokens, in arrays of any size; iterated twice.
            documents: their number.
            flush: waits until everything is on the disk; if false, call `flush_pair` later.
        """
        if self._crc_bytes:
            self._close_crc()
        self._file.close()
        bin_, idx, sums = (with_suffix(self._prefix, suffix) for suffix in (".bin", ".idx", ".sums"))
        with open(temporary_path(sums), "wb") as file:
            file.write(np.array(self._sums, dtype="<u4").tobytes())
        idx_sha256 = write_index_file(temporary_path(idx), lengths, documents, dtype)
        for path in (sums, bin_, idx):
            os.replace(temporary_path(path), path)
        if flush:
            flush_pair(self._prefix)
        return ShardInfo(
            part=part,
            prefix=prefix,
            documents=documents,
            tokens=self.bytes // dtype.itemsize,
            bin_bytes=self.bytes,
            idx_bytes=idx.stat().st_size,
            bin_sha256=self._sha256.hexdigest(),
            idx_sha256=idx_sha256,
        )

    def _close_crc(self) -> None:
        self._sums.append(self._crc)
        self._crc = self._crc_bytes = 0


def write_index_file(path: Path, lengths: Lengths, documents: int, dtype: np.dtype) -> str:
    """Writes an .idx with one sequence per document, some documents at a time; returns its sha256.

    The bytes are those of `ssa_pretrain.data.indexed_format.write_index`, which holds all documents in memory.
    """
    checksum = hashlib.sha256()
    with open(path, "wb") as file:
        for raw in _index_bytes(lengths, documents, dtype):
            file.write(raw)
            checksum.update(raw)
    return checksum.hexdigest()


def _index_bytes(lengths: Lengths, documents: int, dtype: np.dtype) -> Iterator[bytes]:
    yield HEADER.pack(MAGIC, VERSION, dtype_code(dtype), documents, documents + 1)
    for some in lengths:
        if some.max(initial=0) > np.iinfo(np.int32).max:
            raise ValueError(
                f"document of {some.max()} tokens: the .idx format allows at most 2**31 - 1 per sequence; split it"
            )
        yield some.astype("<i4").tobytes()
    start = 0
    for some in lengths:
        ends = np.cumsum(some, dtype="<i8")
        yield (start + (ends - some) * dtype.itemsize).astype("<i8").tobytes()
        start += int(ends[-1]) * dtype.itemsize if len(ends) else 0
    for first in range(0, documents + 1, DOCUMENTS_AT_ONCE):
        yield np.arange(first, min(first + DOCUMENTS_AT_ONCE, documents + 1), dtype="<i8").tobytes()


def first_changed_bytes(prefix: Path) -> tuple[int, int] | None:
    """Returns the first range [start, stop) of a .bin file whose CRC does not match, or None if there is no .sums file or no mismatch."""
    try:
        expected = np.fromfile(with_suffix(prefix, ".sums"), dtype="<u4")
    except FileNotFoundError:
        return None
    with open(with_suffix(prefix, ".bin"), "rb") as file:
        for number, crc in enumerate(expected):
            raw = file.read(CRC_BYTES)
            if zlib.crc32(raw) != crc:
                return number * CRC_BYTES, number * CRC_BYTES + len(raw)
    return None


def with_suffix(prefix: Path, suffix: str) -> Path:
    """Returns the path prefix + suffix. Unlike Path.with_suffix it keeps dots in the name."""
    return prefix.with_name(prefix.name + suffix)


def remove_files(prefix: Path) -> None:
    """Removes the files of a prefix. The .idx goes first: beside a new .bin, an old one would open and serve wrong documents."""
    for suffix in (".idx", ".bin", ".sums"):
        with_suffix(prefix, suffix).unlink(missing_ok=True)


def flush_pair(prefix: Path) -> None:
    """Waits until the files of a prefix, and their names, are on the disk."""
    for suffix in (".sums", ".bin", ".idx"):
        sync(with_suffix(prefix, suffix))
    sync(prefix.parent)
