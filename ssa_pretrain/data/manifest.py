"""The manifest of a tokenized dataset: one JSON file that commits the .bin/.idx pairs beside it (indexed_format.py).

It is written last and renamed into place, and records the size and sha256 of each file and a checksum of its own content. A folder without it is not a
dataset. `load_manifest` compares paths, sizes, headers and the sha256 of the small files (.idx, tokenizer), but reads no tokens. `verify_hashes` reads
everything. Files may be links, also out of the folder, as in a hub's cache. A `.bin` that is reached by such a link is compared by its sha256 too, up to
LINKED_BYTES: a dataset from elsewhere must not make a run read a file of its user as tokens. Needs only the standard library and numpy.
"""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ssa_pretrain.data.indexed_format import read_header, token_dtype
from ssa_pretrain.data.repair import (
    DatasetError,
    beginning_advice,
    content_checksum,
    dangling_link,
    dangling_link_error,
    repair_advice,
)
from ssa_pretrain.settings.files import file_sha256, leads_outside

SCHEMA = 1
SPLITS = ("train", "heldout")
HASH_THREADS = 4
LINKED_BYTES = 2**28  # a larger file takes seconds to hash, and secrets are small


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


def verify_hashes(manifest: Manifest) -> None:
    """Reads every file of a dataset and compares its sha256 with the manifest; DatasetError names the first mismatch."""
    expected = [(manifest.tokenizer.file, manifest.tokenizer.sha256)]
    for shard in (shard for shards in manifest.splits.values() for shard in shards):
        expected += [(shard.prefix + ".bin", shard.bin_sha256), (shard.prefix + ".idx", shard.idx_sha256)]
    _compare_hashes(manifest, expected)


def unigram_entropy(counts: np.ndarray) -> float:
    """Returns the entropy of token counts [vocab_size] in nats, to 6 digits; 0 where there are none."""
    shares = counts[counts > 0] / max(1, int(counts.sum()))
    return round(float(-(shares * np.log(shares)).sum()), 6) + 0.0


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
