"""Small datasets for tests: documents written as .bin/.idx pairs, and the manifest over them."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssa_pretrain.data.indexed_format import write_index
from ssa_pretrain.data.manifest import Manifest, ShardInfo, TokenizerInfo

Documents = Sequence[np.ndarray]


def write_shard(root: Path, name: str, number: int, documents: Documents) -> ShardInfo:
    """Writes one .bin/.idx pair of uint16 documents."""
    prefix = root / f"{name}_{number}"
    tokens = np.concatenate(documents).astype("<u2")
    prefix.with_name(prefix.name + ".bin").write_bytes(tokens.tobytes())
    with prefix.with_name(prefix.name + ".idx").open("wb") as file:
        write_index(file, np.array([len(d) for d in documents]), np.dtype("<u2"))
    sizes = {end: prefix.with_name(prefix.name + end).read_bytes() for end in (".bin", ".idx")}
    return ShardInfo(
        part=name,
        prefix=prefix.name,
        documents=len(documents),
        tokens=len(tokens),
        bin_bytes=len(sizes[".bin"]),
        idx_bytes=len(sizes[".idx"]),
        bin_sha256=hashlib.sha256(sizes[".bin"]).hexdigest(),
        idx_sha256=hashlib.sha256(sizes[".idx"]).hexdigest(),
    )


def write_dataset(
    root: Path,
    train: Mapping[str, Documents],
    heldout: Mapping[str, Documents],
    *,
    vocab_size: int = 30_000,
    policy: dict[str, Any] | None = None,
) -> Manifest:
    """Writes one shard per part, and manifest.json."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "tokenizer.json").write_text("{}")
    sha256 = hashlib.sha256(b"{}").hexdigest()
    manifest = Manifest(
        root=root,
        tokenizer=TokenizerInfo(
            file="tokenizer.json", sha256=sha256, vocab_size=vocab_size, eos_id=0, bos_id=None, name="none"
        ),
        policy=policy or {},
        splits={
            "train": tuple(write_shard(root, name, 0, documents) for name, documents in train.items()),
            "heldout": tuple(write_shard(root, f"{name}_heldout", 0, documents) for name, documents in heldout.items()),
        },
        sources=(),
        unigram_entropy_nats={},
        bytes_per_token=1.0,
        fingerprint="abc",
    )
    (root / "manifest.json").write_text(manifest.to_json())
    return manifest


def cut(length: int, *, base: int = 0, seed: int = 0, longest: int = 80) -> list[np.ndarray]:
    """Returns documents of uneven lengths, `length` tokens in all. Tokens count up from `base`."""
    lengths = np.random.default_rng(seed).integers(1, longest, length)
    ends = np.cumsum(lengths)
    return np.split(base + np.arange(length), ends[ends < length])


def subjects(count: int, length: int, *, seed: int, num_subjects: int = 28, words: int = 16) -> list[np.ndarray]:
    """Returns documents of sections of 24 to 95 tokens, each with a subject. Every second token, by chance, is one of its words; the others are common.

    Which words come next is known from the earlier tokens of the section, and not from other sections, so attention to a few blocks helps.

    Args:
        count: documents.
        length: tokens of each.
        seed: other documents, of the same language, with another one.
        num_subjects: subjects, each with tokens of its own.
        words: tokens of a subject. Four times as many, 1 to 4 * words - 1, are common.
    """
    draw, documents = np.random.default_rng(seed), []
    for _ in range(count):
        sections: list[np.ndarray] = []
        while sum(map(len, sections)) < length:
            size, first = draw.integers(24, 96), (4 + draw.integers(num_subjects)) * words
            is_common = draw.random(size) < 0.5
            common, own = draw.integers(1, 4 * words, size), first + draw.integers(0, words, size)
            sections.append(np.where(is_common, common, own))
        documents.append(np.concatenate(sections)[:length])
    return documents
