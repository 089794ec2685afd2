"""Rows over indexed binaries: every token where it should be, documents known, nothing that depends on the length of a run."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from ssa_pretrain.data.batches import collate
from ssa_pretrain.data.indexed_format import Manifest, ShardInfo, TokenizerInfo, write_index
from ssa_pretrain.data.rows import HeldOutRows, Row, TokenStream, TrainingRows

LENGTH = 32


def write_shard(root: Path, name: str, number: int, documents: list[np.ndarray]) -> ShardInfo:
    """Write one .bin/.idx pair of uint16 documents."""
    prefix = root / f"{name}_{number}"
    tokens = np.concatenate(documents).astype("<u2")
    prefix.with_name(prefix.name + ".bin").write_bytes(tokens.tobytes())
    with prefix.with_name(prefix.name + ".idx").open("wb") as file:
        write_index(file, np.array([len(d) for d in documents]), np.dtype("<u2"))
    sizes = {end: prefix.with_name(prefix.name + end).read_bytes() for end in (".bin", ".idx")}
    return ShardInfo(
        name=name,
        prefix=prefix.name,
        documents=len(documents),
        tokens=len(tokens),
        bin_bytes=len(sizes[".bin"]),
        idx_bytes=len(sizes[".idx"]),
        bin_sha256=hashlib.sha256(sizes[".bin"]).hexdigest(),
        idx_sha256=hashlib.sha256(sizes[".idx"]).hexdigest(),
    )


def documents(seed: int, count: int, base: int) -> list[np.ndarray]:
    """Return documents of uneven lengths whose tokens name their place: base, base + 1, ..."""
    lengths = np.random.default_rng(seed).integers(1, 80, count)
    numbers = base + np.arange(lengths.sum())
    return np.split(numbers, np.cumsum(lengths)[:-1])


@pytest.fixture
def manifest(tmp_path) -> Manifest:
    """Two sources, one of two files, and a held-out split."""
    english, python, held = documents(0, 40, 0), documents(1, 12, 10_000), documents(2, 12, 20_000)
    shards = (
        write_shard(tmp_path, "english", 0, english[:25]),
        write_shard(tmp_path, "english", 1, english[25:]),
        write_shard(tmp_path, "python", 0, python),
    )
    return Manifest(
        root=tmp_path,
        tokenizer=TokenizerInfo(file="t.json", sha256="", vocab_size=30_000, eos_id=0, bos_id=None, name="t"),
        policy={},
        splits={"train": shards, "heldout": (write_shard(tmp_path, "held", 0, held),)},
        sources=(),
        unigram_entropy_nats={},
        bytes_per_token=1.0,
        fingerprint="abc",
    )


def test_stream_reads_across_documents_and_files(manifest):
    stream = TokenStream([manifest.root / "english_0", manifest.root / "english_1"], manifest.tokenizer.vocab_size)
    whole = documents(0, 40, 0)
    starts = np.concatenate([[0], np.cumsum([len(d) for d in whole])[:-1]])
    for offset, count in ((0, 10), (5, stream.num_tokens - 5), (sum(len(d) for d in whole[:25]) - 3, 7)):
        row = stream.read(offset, count)
        assert row.tokens.tolist() == list(range(offset, offset + count))
        assert np.flatnonzero(row.starts).tolist() == [s - offset for s in starts if offset <= s < offset + count]


def test_an_epoch_holds_each_row_once_and_the_next_cuts_elsewhere(manifest):
    rows = TrainingRows(manifest, sequence_length=LENGTH, seed=5, weights={"english": 1.0})
    total = sum(len(d) for d in documents(0, 40, 0))
    per_epoch = (total - LENGTH) // LENGTH
    first = sorted(int(rows.row(i).tokens[0]) for i in range(per_epoch))
    assert first == [i * LENGTH for i in range(per_epoch)]
    second = sorted(int(rows.row(i).tokens[0]) for i in range(per_epoch, 2 * per_epoch))
    assert len({s % LENGTH for s in second}) == 1
    assert second != first


def test_rows_overlap_by_the_label(manifest):
    rows = TrainingRows(manifest, sequence_length=LENGTH, seed=1, weights={})
    row = rows.row(3)
    assert len(row.tokens) == LENGTH + 1
    assert (np.diff(row.tokens) == 1).all()


def test_a_row_depends_on_seed_and_index_alone(manifest):
    def make(seed: int) -> list[int]:
        rows = TrainingRows(manifest, sequence_length=LENGTH, seed=seed, weights={})
        return [int(rows.row(i).tokens[0]) for i in range(50)]

    assert make(1) == make(1)
    assert make(1) != make(2)
    rows = TrainingRows(manifest, sequence_length=LENGTH, seed=1, weights={})
    assert [int(rows.row(i).tokens[0]) for i in reversed(range(50))][::-1] == make(1)


def test_weights_choose_the_sources(manifest):
    rows = TrainingRows(manifest, sequence_length=LENGTH, seed=1, weights={"python": 3.0, "english": 1.0})
    share = np.mean([rows.row(i).tokens[0] >= 10_000 for i in range(400)])
    assert abs(share - 0.75) < 0.01


def test_weights_count_tokens_where_rows_are_sequences_of_their_own(tmp_path):
    """Sequences of 40 tokens and of 10: equal rows would give the first source four fifths of the tokens."""
    long = write_shard(tmp_path, "long", 0, [np.full(40, 1)] * 20)
    short = write_shard(tmp_path, "short", 0, [np.full(10, 2)] * 60)
    packed = Manifest(
        root=tmp_path,
        tokenizer=TokenizerInfo(file="t.json", sha256="", vocab_size=9, eos_id=0, bos_id=None, name="t"),
        policy={"packing": "official_row", "row_tokens": 40},
        splits={"train": (long, short)},
        sources=(),
        unigram_entropy_nats={},
        bytes_per_token=1.0,
        fingerprint="abc",
    )
    for weights, expected in (
        ({"long": 1.0, "short": 1.0}, 0.5),
        ({"long": 3.0, "short": 1.0}, 0.75),
        ({}, 800 / 1400),
    ):
        rows = TrainingRows(packed, sequence_length=40, seed=1, weights=weights)
        read = np.concatenate([rows.row(i).tokens for i in range(1000)])
        counts = np.bincount(read, minlength=3)
        assert abs(counts[1] / (counts[1] + counts[2]) - expected) < 0.01, weights


def test_an_unknown_source_is_refused(manifest):
    with pytest.raises(ValueError, match=r"data.weights=\['code'\] must name sources.*\['english', 'python'\]"):
        TrainingRows(manifest, sequence_length=LENGTH, seed=1, weights={"code": 1.0})


def test_too_little_text_is_refused(manifest):
    with pytest.raises(
        ValueError, match=r"data.sequence_length=4096 needs at least 8193 tokens of each source, but english \(train\)"
    ):
        TrainingRows(manifest, sequence_length=4096, seed=1, weights={})


def test_held_out_rows_are_spread_and_fixed(manifest):
    every = HeldOutRows(manifest, sequence_length=LENGTH, rows=0)
    some = HeldOutRows(manifest, sequence_length=LENGTH, rows=3)
    all_starts = [int(every.row(i).tokens[0]) for i in range(every.num_rows)]
    assert all_starts == [20_000 + i * LENGTH for i in range(every.num_rows)]
    picked = [int(some.row(i).tokens[0]) for i in range(some.num_rows)]
    assert picked == [all_starts[i * len(all_starts) // 3] for i in range(3)]


def example_row(starts: list[int]) -> Row:
    flags = np.zeros(9, dtype=bool)
    flags[starts] = True
    return Row(np.arange(100, 109), flags)


def test_collate_masks_labels_of_other_documents_and_restarts_positions():
    batch = collate([example_row([2, 3, 8]), example_row([0, 4])], index=7)
    assert batch.index == 7
    assert batch.cu_seqlens.tolist() == [0, 2, 3, 8, 12, 16]
    assert batch.positions.tolist() == [0, 1, 0, 0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2, 3]
    assert batch.tokens[0].tolist() == [*range(100, 108), *range(100, 108)]
    assert batch.labels[0].tolist() == [*range(101, 109), *range(101, 109)]
    masked = [t for t, m in enumerate(batch.loss_mask[0].tolist()) if m == 0]
    assert masked == [1, 2, 7, 8 + 3]


def test_collate_without_isolation_makes_each_row_one_document():
    batch = collate([example_row([2, 3, 8]), example_row([0, 4])], index=0, isolate_documents=False)
    assert batch.cu_seqlens.tolist() == [0, 8, 16]
    assert batch.loss_mask.min() == 1


def test_collate_knows_rows_that_are_one_document():
    assert collate([example_row([0]), example_row([0])], index=0).num_rows == 2
    assert collate([example_row([0, 4]), example_row([0])], index=0).num_rows is None


@pytest.mark.parametrize(("isolate", "own"), [(True, [0, 2]), (False, [0])])
def test_collate_cuts_padding_into_short_documents_that_bear_no_loss(isolate, own):
    """Five tokens of one sequence and its padding of four, the last of which is a label only."""
    flags = np.zeros(9, dtype=bool)
    flags[[0, 2, 5]] = True
    rows = [Row(np.arange(100, 109), flags, padding=4), example_row([0])]
    batch = collate(rows, index=0, isolate_documents=isolate, padding_document=2)
    assert batch.cu_seqlens.tolist() == [*own, 5, 7, 8, 16]
    assert batch.num_padding == 3
    kept = [t for t, m in enumerate(batch.loss_mask[0].tolist()) if m]
    assert kept == [t for t in range(4) if t != 1 or not isolate] + list(range(8, 16))
