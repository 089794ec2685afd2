"""The files of a dataset as they are written: tokens in .bin, their index in .idx, checksums of blocks in .sums.

A `.sums` file has the CRC-32 of each MiB of the .bin file, four little-endian bytes a block. The manifest's sha256 says that a file
changed; with these, validate says where. Nothing else reads them.

Files have the process in their temporary names, so that two writers never share one, not even for the moment in which a killed
run's workers notice it. They get their final names in the order .sums, .bin, .idx.
"""

import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from data_prep.files import sync
from ssa_pretrain.data.indexed_format import HEADER, MAGIC, VERSION, ShardInfo, dtype_code

BLOCK = 1 << 20  # bytes of .bin under one CRC
AT_ONCE = 1 << 20  # documents whose part of an index is in memory at a time

Lengths = Iterable[np.ndarray]


class TokenFile:
    """A .bin file being written, with its checksums."""

    def __init__(self, prefix: Path) -> None:
        self.bytes = 0
        self._prefix = prefix
        self._sha256 = hashlib.sha256()
        self._sums: list[int] = []
        self._crc, self._in_block = 0, 0
        prefix.parent.mkdir(parents=True, exist_ok=True)
        # An old .idx beside a new .bin would open and serve wrong documents: it goes first.
        for suffix in (".idx", ".bin", ".sums"):
            with_suffix(prefix, suffix).unlink(missing_ok=True)
        self._file = open(temporary(with_suffix(prefix, ".bin")), "wb")

    def write(self, raw: bytes | memoryview) -> None:
        """Appends bytes."""
        self._file.write(raw)
        self._sha256.update(raw)
        self.bytes += len(raw)
        view = memoryview(raw)
        while len(view):
            part = view[: BLOCK - self._in_block]
            self._crc = zlib.crc32(part, self._crc)
            self._in_block += len(part)
            view = view[len(part) :]
            if self._in_block == BLOCK:
                self._close_block()

    def discard(self) -> None:
        """Removes what has been written: an empty .bin cannot be mapped, so there is none."""
        self._file.close()
        temporary(with_suffix(self._prefix, ".bin")).unlink()

    def close(
        self, name: str, prefix: str, dtype: np.dtype, lengths: Lengths, documents: int, flush: bool = True
    ) -> ShardInfo:
        """Writes the index, gives all files their names and returns what they are.

        Args:
            name: the part of the corpus.
            prefix: as the manifest will have it.
            dtype: of the tokens.
            lengths: gives the tokens in each sequence, in groups of any size; iterated twice.
            documents: how many there are.
            flush: waits until all is on the disk; without it `flush_pair` does so later.
        """
        if self._in_block:
            self._close_block()
        self._file.close()
        bin_, idx, sums = (with_suffix(self._prefix, suffix) for suffix in (".bin", ".idx", ".sums"))
        with open(temporary(sums), "wb") as file:
            file.write(np.array(self._sums, dtype="<u4").tobytes())
        idx_sha256 = write_index_file(temporary(idx), lengths, documents, dtype)
        for path in (sums, bin_, idx):
            os.replace(temporary(path), path)
        if flush:
            flush_pair(self._prefix)
        return ShardInfo(
            name=name,
            prefix=prefix,
            documents=documents,
            tokens=self.bytes // dtype.itemsize,
            bin_bytes=self.bytes,
            idx_bytes=idx.stat().st_size,
            bin_sha256=self._sha256.hexdigest(),
            idx_sha256=idx_sha256,
        )

    def _close_block(self) -> None:
        self._sums.append(self._crc)
        self._crc = self._in_block = 0


def write_index_file(path: Path, lengths: Lengths, documents: int, dtype: np.dtype) -> str:
    """Writes an .idx of one sequence a document, a group of documents at a time; returns its sha256.

    The bytes are those of `ssa_pretrain.data.indexed_format.write_index`, which holds all documents in memory.
    """
    checksum = hashlib.sha256()
    with open(path, "wb") as file:
        for part in _index_parts(lengths, documents, dtype):
            file.write(part)
            checksum.update(part)
    return checksum.hexdigest()


def _index_parts(lengths: Lengths, documents: int, dtype: np.dtype) -> Iterator[bytes]:
    yield HEADER.pack(MAGIC, VERSION, dtype_code(dtype), documents, documents + 1)
    for group in lengths:
        if group.max(initial=0) > np.iinfo(np.int32).max:
            raise ValueError(
                f"document of {group.max()} tokens: the .idx format counts at most 2**31 - 1 a sequence; split it"
            )
        yield group.astype("<i4").tobytes()
    start = 0
    for group in lengths:
        ends = np.cumsum(group, dtype="<i8")
        yield (start + (ends - group) * dtype.itemsize).astype("<i8").tobytes()
        start += int(ends[-1]) * dtype.itemsize if len(ends) else 0
    for first in range(0, documents + 1, AT_ONCE):
        yield np.arange(first, min(first + AT_ONCE, documents + 1), dtype="<i8").tobytes()


def first_bad_block(prefix: Path) -> tuple[int, int] | None:
    """Returns the bytes [start, stop) of the first block of a .bin file that is not what was written, None if unknown."""
    try:
        expected = np.fromfile(with_suffix(prefix, ".sums"), dtype="<u4")
    except FileNotFoundError:
        return None
    with open(with_suffix(prefix, ".bin"), "rb") as file:
        for number, crc in enumerate(expected):
            block = file.read(BLOCK)
            if zlib.crc32(block) != crc:
                return number * BLOCK, number * BLOCK + len(block)
    return None


def with_suffix(prefix: Path, suffix: str) -> Path:
    """Returns the file of a prefix: a name may have dots of its own."""
    return prefix.with_name(prefix.name + suffix)


def temporary(path: Path) -> Path:
    """Returns the name under which this process writes a file."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def flush_pair(prefix: Path) -> None:
    """Waits until the files of a prefix, and their names, are on the disk."""
    for suffix in (".sums", ".bin", ".idx"):
        sync(with_suffix(prefix, suffix))
    sync(prefix.parent)
