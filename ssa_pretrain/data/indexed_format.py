r"""The tokenized dataset on disk: the byte layout of its .bin/.idx pairs.

A shard is two files. `.bin` holds the token arrays of all documents back to back, no header. `.idx` holds,
little-endian:

    offset     size   field
    0          9      magic "MMIDIDX\0\0"
    9          8      uint64 version, 1
    17         1      uint8 dtype code (DTYPES below)
    18         8      uint64 N, number of sequences
    26         8      uint64 D, number of document indices = documents + 1
    34         4 N    int32 tokens in each sequence
    34 +  4 N  8 N    int64 byte offset of each sequence in .bin
    34 + 12 N  8 D    int64 document indices, first 0, last N

We write one sequence per document, so an `.idx` has 42 + 20 N bytes. megatron-core's IndexedDataset reads these files
unchanged, but it checks nothing: a truncated `.bin` opens, a stale `.idx` beside a new `.bin` opens, a flipped bit is a
token id. `check_pair` compares the two files; manifest.py records the size and sha256 of each.

Source of the layout: megatron-core 0.16.1, megatron/core/datasets/indexed_dataset.py (BSD-3-Clause), checked byte by
byte in tests/unit/data/test_indexed_format.py. Needs only the standard library and numpy. The multimodal mode
array is not supported.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ssa_pretrain.data.repair import DatasetError, repair_advice

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")

DTYPES: dict[int, np.dtype] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}

UINT16_VOCAB_LIMIT = 65_500


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the dtype that megatron-core would choose for a vocabulary: uint16 below 65,500 entries, else int32."""
    return DTYPES[8] if vocab_size < UINT16_VOCAB_LIMIT else DTYPES[4]


def dtype_code(dtype: np.dtype) -> int:
    """Returns the code of `dtype` in an .idx header; ValueError if the format has none."""
    for code, known in DTYPES.items():
        if known == dtype:
            return code
    raise ValueError(f"dtype={dtype} has no code in the .idx format; try uint16 or int32")


@dataclass(frozen=True, slots=True)
class IndexHeader:
    """The first 34 bytes of an .idx file."""

    dtype: np.dtype
    num_sequences: int
    num_documents: int

    @property
    def idx_bytes(self) -> int:
        """The size that the .idx file must have."""
        return HEADER.size + 12 * self.num_sequences + 8 * (self.num_documents + 1)


def read_header(path: Path) -> IndexHeader:
    """Returns the header of an .idx file.

    Raises:
        ValueError: the file is too short, its magic or version is wrong, its dtype is unknown, or its size does not match its header.
    """
    remedy = repair_advice(path.parent.parent)
    with open(path, "rb") as file:
        raw = file.read(HEADER.size)
        size = file.seek(0, 2)
    if len(raw) < HEADER.size:
        raise DatasetError(f"{path} is cut short: {size} bytes, its header has {HEADER.size}", remedy)
    magic, version, code, num_sequences, num_indices = HEADER.unpack(raw)
    if magic != MAGIC:
        raise DatasetError(f"{path} is not an .idx file: it does not begin with {MAGIC!r}", remedy)
    if version != VERSION:
        raise DatasetError(f"{path} has version {version} of the format, this code reads {VERSION}", remedy)
    if code not in DTYPES:
        raise DatasetError(f"{path} has the unknown dtype code {code}; this code reads {sorted(DTYPES)}", remedy)
    if num_indices < 1:
        raise DatasetError(f"{path} lists no document indices, at least one is needed", remedy)
    header = IndexHeader(DTYPES[code], num_sequences, num_indices - 1)
    if header.idx_bytes != size:
        raise DatasetError(f"{path} has {size} bytes, its header describes {header.idx_bytes}", remedy)
    return header


def write_index(file: BinaryIO, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Writes an .idx for documents of `lengths` tokens, one sequence per document.

    Args:
        file: binary file, at its start.
        lengths: [N] integers, tokens in each document, in the order of the .bin file.
        dtype: dtype of the tokens in the .bin file.
    """
    num = len(lengths)
    widest = int(lengths.max(initial=0))
    if widest > np.iinfo(np.int32).max:
        raise ValueError(
            f"document of {widest} tokens: the .idx format allows at most 2**31 - 1 per sequence; split it"
        )
    offsets = np.zeros(num, dtype="<i8")
    np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
    offsets *= dtype.itemsize
    file.write(HEADER.pack(MAGIC, VERSION, dtype_code(dtype), num, num + 1))
    file.write(lengths.astype("<i4").tobytes())
    file.write(offsets.tobytes())
    file.write(np.arange(num + 1, dtype="<i8").tobytes())


def read_lengths(path: Path) -> np.ndarray:
    """Returns the sequence lengths of an .idx file, [N] int32."""
    header = read_header(path)
    return np.fromfile(path, dtype="<i4", count=header.num_sequences, offset=HEADER.size)


def check_pair(prefix: Path) -> IndexHeader:
    """Returns the header of `prefix`.idx after comparing it with `prefix`.bin: sizes, lengths, offsets, document indices.

    Raises:
        ValueError: names the first mismatch.
    """
    idx, bin_ = prefix.with_name(prefix.name + ".idx"), prefix.with_name(prefix.name + ".bin")
    header, remedy = read_header(idx), repair_advice(prefix.parent.parent)
    num, itemsize = header.num_sequences, header.dtype.itemsize
    lengths = read_lengths(idx)
    expected = itemsize * int(lengths.sum(dtype=np.int64))
    actual = bin_.stat().st_size
    if expected != actual:
        raise DatasetError(f"{bin_} has {actual} bytes, {idx.name} describes {expected}", remedy)
    offsets = np.fromfile(idx, dtype="<i8", count=num, offset=HEADER.size + 4 * num)
    right = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)[:-1] * itemsize)) if num else offsets
    if not np.array_equal(offsets, right):
        first = int(np.flatnonzero(offsets != right)[0])
        raise DatasetError(f"{idx} points sequence {first} at byte {offsets[first]}, not {right[first]}", remedy)
    documents = np.fromfile(idx, dtype="<i8", offset=HEADER.size + 12 * num)
    if documents[0] != 0 or documents[-1] != num or (np.diff(documents) < 0).any():
        raise DatasetError(f"{idx} has document indices that do not run from 0 to {num}", remedy)
    return header
