"""Full validation of a finished dataset: reads every byte and re-tokenizes a sample of the source text.

For each file it checks
- the header and its sizes, and lengths and offsets against the .bin file,
- both checksums,
- that every id is inside the vocabulary,
- that each document ends with one EOS and, if special tokens are text, has none inside,
- that BOS follows the policy,
- that no sequence is longer than a row if rows are single sequences.

For the dataset it checks the tokenizer's checksum and the unigram entropy of each split against the manifest. If the
text still exists, documents of many shards are encoded again (data_prep/dataset/recheck.py). All problems are returned,
not only the first, each with its file and, if known, its byte and document.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_prep.dataset.recheck import recheck
from data_prep.errors import InputError
from data_prep.recipe import read_recipe
from data_prep.shards.binaries import first_changed_bytes, with_suffix
from ssa_pretrain.data.indexed_format import check_pair, read_lengths
from ssa_pretrain.data.manifest import Manifest, ShardInfo, load_manifest, unigram_entropy
from ssa_pretrain.data.repair import DatasetError
from ssa_pretrain.settings.files import file_sha256

IDS_AT_ONCE = 1 << 22
THREADS = 4


@dataclass(frozen=True, slots=True)
class ValidationResult:
    """The result of a validation."""

    manifest: Manifest
    problems: list[str]  # one sentence each; empty: the dataset is valid
    recheck: str  # how many documents were encoded again, or why none were


def validate_dataset(out: Path, retokenize: int = 0) -> ValidationResult:
    """Returns what is wrong with a dataset.

    Args:
        out: its folder.
        retokenize: how many documents to encode again if the text still exists.

    Raises:
        InputError: the manifest is missing or does not match its files, so nothing else can be checked.
    """
    try:
        manifest = load_manifest(out, hashes=False)  # all mismatches are listed below
    except ValueError as error:
        raise InputError(str(error)) from None
    found = []
    try:
        read_recipe(out)
    except InputError as error:
        found.append(str(error))
    if file_sha256(manifest.root / manifest.tokenizer.file) != manifest.tokenizer.sha256:
        found.append(f"{manifest.tokenizer.file}: its content does not match the manifest's sha256")
    total = sum(shard.bin_bytes + shard.idx_bytes for shards in manifest.splits.values() for shard in shards)
    with (
        ThreadPoolExecutor(THREADS) as pool,
        tqdm(total=total, unit="B", unit_scale=True, desc="validating", disable=not sys.stderr.isatty()) as bar,
    ):
        for split, shards in manifest.splits.items():
            counts = np.zeros(manifest.tokenizer.vocab_size, dtype=np.int64)
            valid = True
            for shard, (problems, shard_counts) in zip(
                shards, pool.map(lambda s: check_shard(manifest, s), shards), strict=True
            ):
                found += problems
                valid = valid and not problems
                counts += shard_counts
                bar.update(shard.bin_bytes + shard.idx_bytes)
            entropy = unigram_entropy(counts)
            if valid and abs(entropy - manifest.unigram_entropy_nats[split]) > 2e-6:
                found.append(
                    f"{split}: unigram entropy is {entropy}, the manifest has {manifest.unigram_entropy_nats[split]}"
                )
    if found or not retokenize:
        return ValidationResult(manifest, found, "no document was encoded again")
    problems, rechecked = recheck(manifest, retokenize)
    return ValidationResult(manifest, problems, rechecked)


def check_shard(manifest: Manifest, shard: ShardInfo) -> tuple[list[str], np.ndarray]:
    """Returns what is wrong with a shard, and the counts of its valid ids [vocab_size]."""
    prefix = manifest.prefix_path(shard)
    counts = np.zeros(manifest.tokenizer.vocab_size, dtype=np.int64)
    found = []
    changed = file_sha256(with_suffix(prefix, ".bin")) != shard.bin_sha256
    if file_sha256(with_suffix(prefix, ".idx")) != shard.idx_sha256:
        found.append(f"{shard.prefix}.idx: its content does not match the manifest's sha256")
    try:
        header = check_pair(prefix)
    except DatasetError as error:
        if changed:
            found.append(f"{shard.prefix}.bin: its content does not match the manifest's sha256")
        return [*found, error.what], counts
    lengths = read_lengths(with_suffix(prefix, ".idx"))
    ends = np.cumsum(lengths, dtype=np.int64)
    if changed:
        found.append(f"{shard.prefix}.bin: {_where_changed(prefix, ends, header.dtype.itemsize)}")
    ids = np.memmap(with_suffix(prefix, ".bin"), dtype=header.dtype, mode="r")
    found += _check_ids(manifest, shard, ids, ends, counts)
    found += _check_documents(manifest, shard, ids, lengths, ends, counts)
    return found, counts


def _where_changed(prefix: Path, ends: np.ndarray, itemsize: int) -> str:
    what = "its content does not match the manifest's sha256"
    changed = first_changed_bytes(prefix)
    if changed is None:
        return what
    first, last = (int(np.searchsorted(ends, byte // itemsize, side="right")) for byte in (changed[0], changed[1] - 1))
    return f"{what}; the first change is in bytes {changed[0]} to {changed[1] - 1}, documents {first} to {last}"


def _place(position: int, ends: np.ndarray, itemsize: int) -> str:
    document = int(np.searchsorted(ends, position, side="right"))
    return f"token {position} (byte {position * itemsize}, document {document})"


def _check_ids(
    manifest: Manifest, shard: ShardInfo, ids: np.ndarray, ends: np.ndarray, counts: np.ndarray
) -> list[str]:
    size = manifest.tokenizer.vocab_size
    for start in range(0, len(ids), IDS_AT_ONCE):
        some = ids[start : start + IDS_AT_ONCE]
        wrong = (some >= size) | (some < 0)
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            place = _place(start + first, ends, ids.itemsize)
            return [f"{shard.prefix}.bin: {place} is id {some[first]}, but the vocabulary ends at {size - 1}"]
        np.add(counts, np.bincount(some, minlength=size), out=counts)
    return []


def _check_documents(
    manifest: Manifest, shard: ShardInfo, ids: np.ndarray, lengths: np.ndarray, ends: np.ndarray, counts: np.ndarray
) -> list[str]:
    policy, tokenizer = manifest.policy, manifest.tokenizer
    smallest = int(policy["append_eos"]) + int(policy["add_bos"])
    if (lengths < smallest).any():
        return [f"{shard.prefix}: document {int(np.argmax(lengths < smallest))} is empty"]
    found = []
    if (limit := policy.get("row_tokens")) and (lengths > limit).any():
        number = int(np.argmax(lengths > limit))
        found.append(f"{shard.prefix}: sequence {number} has {lengths[number]} tokens, but a row has {limit}")
    if policy["append_eos"] and (unended := ids[ends - 1] != tokenizer.eos_id).any():
        number = int(np.argmax(unended))
        byte = int(ends[number] - 1) * ids.itemsize
        found.append(f"{shard.prefix}: document {number} does not end in EOS (id {tokenizer.eos_id}) at byte {byte}")
    if policy["add_bos"] and (unbegun := ids[ends - lengths] != tokenizer.bos_id).any():
        found.append(
            f"{shard.prefix}: document {int(np.argmax(unbegun))} does not begin with BOS (id {tokenizer.bos_id})"
        )
    if policy["append_eos"] and policy["specials"] == "text" and counts[tokenizer.eos_id] > len(lengths) and not found:
        found.append(_eos_inside(shard, ids, ends, tokenizer.eos_id))
    return found


def _eos_inside(shard: ShardInfo, ids: np.ndarray, ends: np.ndarray, eos: int) -> str:
    at = np.flatnonzero(ids == eos)
    first = int(at[~np.isin(at, ends - 1)][0])
    place = _place(first, ends, ids.itemsize)
    return (
        f"{shard.prefix}: {len(at)} EOS in {len(ends)} documents instead of one per document; {place} is one too many"
    )
