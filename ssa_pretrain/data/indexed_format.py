r"""The tokenized dataset on disk: byte layout of .bin/.idx pairs and the manifest that commits them.

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
token id. Hence the manifest: one JSON file beside the shards, written last and renamed into place. It records the size
and sha256 of each file and a checksum of its own content. A folder without it is not a dataset. `load_manifest`
compares paths, sizes, headers and the sha256 of the small files (.idx, tokenizer), but reads no tokens. `verify_hashes`
reads everything. Files may be links, also out of the folder, as in a hub's cache. A `.bin` that is reached by such a
link is compared by its sha256 too, up to LINKED_BYTES: a dataset from elsewhere must not make a run read a file of its
user as tokens.

Source of the layout: megatron-core 0.16.1, megatron/core/datasets/indexed_dataset.py (BSD-3-Clause), checked byte by
byte in tests/unit/data/test_indexed_format.py. Needs only the standard library and numpy. The multimodal mode
array is not supported.
"""

import json
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from ssa_pretrain.data.repair import (
    DatasetError,
    beginning_advice,
    content_checksum,
    dangling_link,
    dangling_link_error,
    repair_advice,
)
from ssa_pretrain.settings.files import file_sha256, leads_outside

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
SCHEMA = 1
SPLITS = ("train", "heldout")

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
HASH_THREADS = 4
LINKED_BYTES = 2**28  # a larger file takes seconds to hash, and secrets are small


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


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerInfo:
    """The tokenizer that produced the ids."""

    file: str  # path of the HF `tokenizers` JSON, relative to the dataset's folder
    sha256: str  # of that file
    vocab_size: int  # ids run from 0 to vocab_size - 1, special tokens included
    eos_id: int  # last id of each document if policy.append_eos
    bos_id: int | None  # first id of each document if policy.add_bos
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """One pair of files with their recorded sizes and hashes."""

    part: str  # part of the corpus, such as "english"; `name` in JSON
    prefix: str  # path without .bin/.idx, relative to the dataset's folder
    documents: int
    tokens: int
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str
    idx_sha256: str

    def to_record(self) -> dict[str, Any]:
        """Returns the JSON form."""
        content = asdict(self)
        return {"name": content.pop("part"), **content}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "ShardInfo":
        """Returns the shard of a JSON form; TypeError or KeyError if a field is missing or unknown."""
        return cls(part=record["name"], **{key: value for key, value in record.items() if key != "name"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A finished dataset. `root` is its folder. Everything else is as in manifest.json."""

    root: Path
    tokenizer: TokenizerInfo
    policy: dict[str, Any]
    splits: dict[str, tuple[ShardInfo, ...]]
    sources: tuple[dict[str, Any], ...]
    unigram_entropy_nats: dict[str, float]  # of each split's token counts: the loss of a model that sees no context
    bytes_per_token: float  # UTF-8 bytes of text per token, both splits
    fingerprint: str  # sha256 of all that determines the bytes of the shards
    schema: int = SCHEMA
    weights: dict[str, float] = field(
        default_factory=dict
    )  # share of each part in training; empty: in proportion to its tokens
    details: dict[str, Any] = field(default_factory=dict)  # counts for people; no code may depend on them

    def prefix_path(self, shard: ShardInfo) -> Path:
        """Returns the absolute path without suffix that megatron-core's IndexedDataset takes."""
        return self.root / shard.prefix

    def tokens(self, split: str) -> int:
        """Returns the number of tokens of a split."""
        return sum(shard.tokens for shard in self.splits[split])

    def blend(self, split: str) -> tuple[list[str], list[float]]:
        """Returns prefixes and weights as megatron-core's `BlendedMegatronDatasetConfig.blend` takes them."""
        shards = self.splits[split]
        sizes: dict[str, int] = {}
        for shard in shards:
            sizes[shard.part] = sizes.get(shard.part, 0) + shard.tokens
        shares = self.weights or {part: float(size) for part, size in sizes.items()}
        total = sum(shares[part] for part in sizes)
        weights = [shares[s.part] / total * s.tokens / sizes[s.part] for s in shards]
        return [str(self.prefix_path(shard)) for shard in shards], weights

    def to_json(self) -> str:
        """Returns the text of manifest.json."""
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("root", "tokenizer", "splits")}
        content["tokenizer"] = asdict(self.tokenizer)
        content["splits"] = {split: [shard.to_record() for shard in shards] for split, shards in self.splits.items()}
        order = ["schema", "tokenizer", "policy", "splits", "sources", "unigram_entropy_nats", "bytes_per_token"]
        ordered = {key: content.pop(key) for key in order} | content
        return json.dumps(ordered | {"checksum": content_checksum(ordered)}, indent=1) + "\n"


def load_manifest(path: Path | str, *, hashes: bool = True) -> Manifest:
    """Returns the manifest of a dataset after checking it against the files: names, existence, sizes, headers, checksums of small files.

    Most of the time goes into the checksums of the .idx files: 20 bytes per document, 2 GB for 100 billion tokens.

    Args:
        path: the dataset's folder, or its manifest.json.
        hashes: compares the sha256 of each .idx file and of the tokenizer.

    Raises:
        DatasetError: one sentence with the problem, the file and the remedy.
    """
    manifest = read_manifest(path)
    every = [shard for shards in manifest.splits.values() for shard in shards]
    try:
        _check_file(manifest, manifest.tokenizer.file, None)
        for split, shards in manifest.splits.items():
            for shard in shards:
                _check_shard(manifest, split, shard)
        if hashes:
            small = [(f"{shard.prefix}.idx", shard.idx_sha256) for shard in every]
            small += [
                (f"{shard.prefix}.bin", shard.bin_sha256)
                for shard in every
                if shard.bin_bytes <= LINKED_BYTES and leads_outside(manifest.root, f"{shard.prefix}.bin")
            ]
            _compare_hashes(manifest, [(manifest.tokenizer.file, manifest.tokenizer.sha256), *small])
    except OSError as error:
        raise DatasetError(
            f"{error.filename} cannot be read ({error.strerror})", "make it readable (chmod +r)"
        ) from None
    return manifest


def verify_hashes(manifest: Manifest) -> None:
    """Reads every file of a dataset and compares its sha256 with the manifest; DatasetError names the first mismatch."""
    expected = [(manifest.tokenizer.file, manifest.tokenizer.sha256)]
    for shard in (shard for shards in manifest.splits.values() for shard in shards):
        expected += [(shard.prefix + ".bin", shard.bin_sha256), (shard.prefix + ".idx", shard.idx_sha256)]
    _compare_hashes(manifest, expected)


def _compare_hashes(manifest: Manifest, expected: Iterable[tuple[str, str]]) -> None:
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        checks = [(name, sha256, pool.submit(file_sha256, manifest.root / name)) for name, sha256 in expected]
        for name, sha256, check in checks:
            if (actual := check.result()) != sha256:
                pool.shutdown(wait=False, cancel_futures=True)
                raise DatasetError(
                    f"{manifest.root / name} has sha256 {actual[:12]}…, the manifest has {sha256[:12]}…: its content changed "
                    "after it was written",
                    repair_advice(manifest.root),
                )


def unigram_entropy(counts: np.ndarray) -> float:
    """Returns the entropy of token counts [vocab_size] in nats, to 6 digits; 0 where there are none."""
    shares = counts[counts > 0] / max(1, int(counts.sum()))
    return round(float(-(shares * np.log(shares)).sum()), 6) + 0.0


def read_manifest(path: Path | str) -> Manifest:
    """Returns the manifest of a dataset after comparing it with its own checksum; reads no other file.

    Args:
        path: as `load_manifest`.

    Raises:
        DatasetError: it is missing or damaged, or names files outside the folder.
    """
    file = Path(path)
    if file.is_dir() or file.suffix != ".json":
        file = file / "manifest.json"
    content = _json_of(file)
    remedy = repair_advice(file.parent.resolve())
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        found = content.get("schema") if isinstance(content, dict) else None
        raise DatasetError(f"{file}: schema={found} is not the {SCHEMA} that this version reads", remedy)
    sound = content.get("checksum") == content_checksum(content)
    changed = DatasetError(f"{file} does not match its own checksum: it changed after it was written", remedy)
    known = {f.name for f in fields(Manifest)} - {"root", "tokenizer", "splits", "sources"}
    try:
        manifest = Manifest(
            root=file.parent.resolve(),
            tokenizer=TokenizerInfo(**content["tokenizer"]),
            splits={s: tuple(ShardInfo.from_record(shard) for shard in content["splits"][s]) for s in SPLITS},
            sources=tuple(content["sources"]),
            **{key: value for key, value in content.items() if key in known},
        )
        _check_names(manifest)
    except (KeyError, TypeError, AttributeError) as error:
        if "checksum" in content and not sound:
            raise changed from None
        raise DatasetError(f"{file} lacks a field or has an unknown one ({error})", remedy) from None
    if "checksum" in content and not sound:
        raise changed
    # Manifests of older versions have no checksum, and only the known fields.
    if not sound and (unknown := set(content) - known - {"tokenizer", "splits", "sources"}):
        raise DatasetError(f"{file} has the unknown field {min(unknown)!r} and no checksum: it is damaged", remedy)
    return manifest


def _json_of(file: Path) -> Any:
    if link := dangling_link(file, Path(file.anchor)):
        raise dangling_link_error(link, file.parent)
    try:
        return json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise DatasetError(
            f"{file} does not exist: there is no finished dataset", beginning_advice(file.parent)
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"{file} cannot be read as JSON ({error})", repair_advice(file.parent.resolve())) from None


def _check_names(manifest: Manifest) -> None:
    prefixes = [shard.prefix for shards in manifest.splits.values() for shard in shards]
    for name in (manifest.tokenizer.file, *prefixes):
        parts = PurePosixPath(name)
        if not parts.name or parts.is_absolute() or ".." in parts.parts:
            raise DatasetError(
                f"{manifest.root}/manifest.json names {name!r}, which is outside its folder",
                repair_advice(manifest.root),
            )


def _check_file(manifest: Manifest, relative: str, size: int | None) -> Path:
    path, remedy = manifest.root / relative, repair_advice(manifest.root)
    if link := dangling_link(path, manifest.root):
        raise dangling_link_error(link, manifest.root)
    if not path.is_file():
        raise DatasetError(f"{path} is missing though manifest.json lists it", remedy)
    if size is not None and path.stat().st_size != size:
        raise DatasetError(f"{path} has {path.stat().st_size} bytes, manifest.json has {size}", remedy)
    return path


def _check_shard(manifest: Manifest, split: str, shard: ShardInfo) -> None:
    _check_file(manifest, shard.prefix + ".bin", shard.bin_bytes)
    header = read_header(_check_file(manifest, shard.prefix + ".idx", shard.idx_bytes))
    where, remedy = f"{split} shard {shard.prefix}", repair_advice(manifest.root)
    if header.num_documents != shard.documents or header.dtype.itemsize * shard.tokens != shard.bin_bytes:
        raise DatasetError(
            f"{where}: {header.num_documents} documents of {header.dtype} in .idx, but manifest.json has "
            f"{shard.documents} documents, {shard.tokens} tokens, {shard.bin_bytes} bytes",
            remedy,
        )
    if header.dtype != token_dtype(manifest.tokenizer.vocab_size):
        raise DatasetError(
            f"{where} holds {header.dtype}, but a vocabulary of {manifest.tokenizer.vocab_size} is stored as "
            f"{token_dtype(manifest.tokenizer.vocab_size)}",
            remedy,
        )
