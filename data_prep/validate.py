"""Everything that can be known of a finished dataset without its text, by reading every byte of it.

For each shard: the header and its sizes, lengths and offsets against the .bin file, both checksums, every id inside the vocabulary,
one EOS at the end of each document and, where specials are text, none inside one, BOS as the policy says. For the whole: the
tokenizer's checksum and the unigram entropy of each split against the manifest. All findings are returned, not the first alone.

What it cannot find is a tokenizer that was wrong from the start: that needs the text.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_prep.errors import InputError
from ssa_pretrain.data.indexed_format import (
    Manifest,
    ShardInfo,
    check_pair,
    file_sha256,
    load_manifest,
    read_lengths,
    unigram_entropy,
)

IDS_AT_ONCE = 1 << 22
THREADS = 4


def validate_dataset(out: Path) -> tuple[Manifest, list[str]]:
    """Returns the manifest of a dataset and what is wrong with it, a sentence each; an empty list is a sound dataset.

    Raises:
        InputError: the manifest itself is missing or does not fit its files, so that nothing further can be read.
    """
    try:
        manifest = load_manifest(out)
    except ValueError as error:
        raise InputError(str(error)) from None
    found = []
    if file_sha256(manifest.root / manifest.tokenizer.file) != manifest.tokenizer.sha256:
        found.append(f"{manifest.tokenizer.file}: its content is not that of the manifest's sha256")
    total = sum(shard.bin_bytes + shard.idx_bytes for shards in manifest.splits.values() for shard in shards)
    with (
        ThreadPoolExecutor(THREADS) as pool,
        tqdm(total=total, unit="B", unit_scale=True, desc="validating", disable=not sys.stderr.isatty()) as bar,
    ):
        for split, shards in manifest.splits.items():
            counts = np.zeros(manifest.tokenizer.vocab_size, dtype=np.int64)
            sound = True
            for shard, (problems, shard_counts) in zip(
                shards, pool.map(lambda s: check_shard(manifest, s), shards), strict=True
            ):
                found += problems
                sound = sound and not problems
                counts += shard_counts
                bar.update(shard.bin_bytes + shard.idx_bytes)
            entropy = unigram_entropy(counts)
            if sound and abs(entropy - manifest.unigram_entropy_nats[split]) > 2e-6:
                found.append(
                    f"{split}: unigram entropy is {entropy}, the manifest says {manifest.unigram_entropy_nats[split]}"
                )
    return manifest, found


def check_shard(manifest: Manifest, shard: ShardInfo) -> tuple[list[str], np.ndarray]:
    """Returns what is wrong with a shard, and the counts of its valid ids [vocab_size]."""
    prefix = manifest.prefix_path(shard)
    counts = np.zeros(manifest.tokenizer.vocab_size, dtype=np.int64)
    found = []
    for kind, expected in (("bin", shard.bin_sha256), ("idx", shard.idx_sha256)):
        if file_sha256(prefix.with_name(f"{prefix.name}.{kind}")) != expected:
            found.append(f"{shard.prefix}.{kind}: its content is not that of the manifest's sha256")
    try:
        header = check_pair(prefix)
    except ValueError as error:
        return [*found, str(error)], counts
    ids = np.memmap(prefix.with_name(prefix.name + ".bin"), dtype=header.dtype, mode="r")
    found += _check_ids(manifest, shard, ids, counts)
    found += _check_documents(manifest, shard, ids, read_lengths(prefix.with_name(prefix.name + ".idx")), counts)
    return found, counts


def _check_ids(manifest: Manifest, shard: ShardInfo, ids: np.ndarray, counts: np.ndarray) -> list[str]:
    size = manifest.tokenizer.vocab_size
    for start in range(0, len(ids), IDS_AT_ONCE):
        part = ids[start : start + IDS_AT_ONCE]
        wrong = (part >= size) | (part < 0)
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            return [f"{shard.prefix}.bin: token {start + first} is id {part[first]}, the vocabulary ends at {size - 1}"]
        np.add(counts, np.bincount(part, minlength=size), out=counts)
    return []


def _check_documents(
    manifest: Manifest, shard: ShardInfo, ids: np.ndarray, lengths: np.ndarray, counts: np.ndarray
) -> list[str]:
    policy, tokenizer = manifest.policy, manifest.tokenizer
    ends = np.cumsum(lengths, dtype=np.int64)
    smallest = int(policy["append_eos"]) + int(policy["add_bos"])
    if (lengths < smallest).any():
        return [f"{shard.prefix}: document {int(np.argmax(lengths < smallest))} is empty"]
    found = []
    if policy["append_eos"] and (unended := ids[ends - 1] != tokenizer.eos_id).any():
        found.append(f"{shard.prefix}: document {int(np.argmax(unended))} does not end in EOS (id {tokenizer.eos_id})")
    if policy["add_bos"] and (unbegun := ids[ends - lengths] != tokenizer.bos_id).any():
        found.append(
            f"{shard.prefix}: document {int(np.argmax(unbegun))} does not begin with BOS (id {tokenizer.bos_id})"
        )
    if policy["append_eos"] and policy["specials"] == "text" and counts[tokenizer.eos_id] > len(lengths) and not found:
        found.append(
            f"{shard.prefix}: {counts[tokenizer.eos_id]} EOS in {len(lengths)} documents, one a document is right"
        )
    return found
