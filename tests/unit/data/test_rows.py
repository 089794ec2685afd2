"""Rows over indexed binaries: every token is at its place, documents are known, and nothing depends on the length of a run."""

import numpy as np
import pytest

from ssa_pretrain.data.batches import collate
from ssa_pretrain.data.manifest import Manifest, TokenizerInfo
from ssa_pretrain.data.mixture import readings
from ssa_pretrain.data.rows import HeldOutRows, PartTokens, Row, TrainingRows
from support.small_datasets import cut, write_dataset, write_shard

LENGTH = 32


def documents(seed: int, count: int, base: int) -> list[np.ndarray]:
    """Returns documents of uneven lengths whose tokens are numbered: base, base + 1, ..."""
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
    stream = PartTokens([manifest.root / "english_0", manifest.root / "english_1"], manifest.tokenizer.vocab_size)
    whole = documents(0, 40, 0)
    starts = np.concatenate([[0], np.cumsum([len(d) for d in whole])[:-1]])
    for offset, count in ((0, 10), (5, stream.num_tokens - 5), (sum(len(d) for d in whole[:25]) - 3, 7)):
        row = stream.read(offset, count)
        assert row.tokens.tolist() == list(range(offset, offset + count))
        assert np.flatnonzero(row.starts).tolist() == [s - offset for s in starts if offset <= s < offset + count]


def test_epoch_has_each_row_once_and_the_next_epoch_is_cut_elsewhere(manifest):
    rows = TrainingRows(manifest, sequence_length=LENGTH, seed=5, weights={"english": 1.0})
    total = sum(len(d) for d in documents(0, 40, 0))
    per_epoch = (total - LENGTH) // LENGTH
    first = sorted(int(rows.row(i).tokens[0]) for i in range(per_epoch))
    assert first == [i * LENGTH for i in range(per_epoch)]
    second = sorted(int(rows.row(i).tokens[0]) for i in range(per_epoch, 2 * per_epoch))
    assert len({s % LENGTH for s in second}) == 1
    assert second != first


def test_rows_overlap_by_one_label(manifest):
    rows = TrainingRows(manifest, sequence_length=LENGTH, seed=1, weights={})
    row = rows.row(3)
    assert len(row.tokens) == LENGTH + 1
    assert (np.diff(row.tokens) == 1).all()


def test_row_depends_only_on_seed_and_index(manifest):
    def make(seed: int) -> list[int]:
        rows = TrainingRows(manifest, sequence_length=LENGTH, seed=seed, weights={})
        return [int(rows.row(i).tokens[0]) for i in range(50)]

    assert make(1) == make(1)
    assert make(1) != make(2)
    rows = TrainingRows(manifest, sequence_length=LENGTH, seed=1, weights={})
    assert [int(rows.row(i).tokens[0]) for i in reversed(range(50))][::-1] == make(1)


def test_weights_set_the_shares_of_sources(manifest):
    rows = TrainingRows(manifest, sequence_length=LENGTH, seed=1, weights={"python": 3.0, "english": 1.0})
    share = np.mean([rows.row(i).tokens[0] >= 10_000 for i in range(400)])
    assert abs(share - 0.75) < 0.01


def test_weights_count_tokens_for_rows_of_different_lengths(tmp_path):
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


def test_unknown_source_is_refused(manifest):
    with pytest.raises(ValueError, match=r"data.weights=\['code'\] must name parts.*\['english', 'python'\]"):
        TrainingRows(manifest, sequence_length=LENGTH, seed=1, weights={"code": 1.0})


def test_too_little_text_is_refused(manifest):
    with pytest.raises(
        ValueError, match=r"data.sequence_length=4096 needs at least 8193 tokens of each part, but english \(train\)"
    ):
        TrainingRows(manifest, sequence_length=4096, seed=1, weights={})


def test_held_out_rows_are_spread_evenly_and_fixed(manifest):
    every = HeldOutRows(manifest, sequence_length=LENGTH, rows=0)
    some = HeldOutRows(manifest, sequence_length=LENGTH, rows=3)
    all_starts = [int(every.row(i).tokens[0]) for i in range(every.num_rows)]
    assert all_starts == [20_000 + i * LENGTH for i in range(every.num_rows)]
    full = [start for i, start in enumerate(all_starts) if not every.row(i).padding]
    picked = [int(some.row(i).tokens[0]) for i in range(some.num_rows)]
    assert picked == [full[i * len(full) // 3] for i in range(3)]


@pytest.mark.parametrize("rest", [0, 1, 2, LENGTH - 1])
def test_held_out_rows_hold_each_token_once(tmp_path, rest):
    """Two sources whose last rows have `rest` labels and padding (no such row if the source ends with a full one), and a source shorter than a row."""
    held = {
        "long": cut(4 * LENGTH + 1 + rest, base=100),
        "short": cut(LENGTH + 1 + rest, base=1000),
        "tiny": [np.arange(2000, 2005)],
    }
    rows = HeldOutRows(write_dataset(tmp_path, {}, held), sequence_length=LENGTH, rows=0)
    assert rows.num_rows == 4 + 1 + 1 + 2 * (rest > 0)
    read, labels = [], 0
    for i in range(rows.num_rows):
        row = rows.row(i)
        own = len(row.tokens) - row.padding
        assert len(row.tokens) == LENGTH + 1
        assert not row.padding or (row.starts[own] and (row.tokens[own:] == 0).all())
        read += row.tokens[1:own].tolist()
        labels += int(collate([row], index=0).loss_mask.sum())
    assert sorted(read) == [
        *range(101, 101 + 4 * LENGTH + rest),
        *range(1001, 1001 + LENGTH + rest),
        *range(2001, 2005),
    ]
    assert labels == len(read) - sum(len(documents) - 1 for documents in held.values())


def test_rows_past_the_last_held_out_row_are_padding(manifest):
    rows = HeldOutRows(manifest, sequence_length=LENGTH, rows=2)
    batch = collate([rows.row(2)], index=0)
    assert batch.num_padding == LENGTH and batch.loss_mask.sum() == 0


def test_held_out_split_without_labels_is_refused(tmp_path):
    manifest = write_dataset(tmp_path, {}, {"one": [np.array([5])]})
    with pytest.raises(
        ValueError, match="has no held-out part with two tokens \\(a token and its label\\); prepare more text"
    ):
        HeldOutRows(manifest, sequence_length=LENGTH, rows=0)


def starts_of(rows: TrainingRows, numbers: range) -> list[int]:
    return [int(rows.row(i).tokens[0]) for i in numbers]


@pytest.mark.parametrize("rest", [0, 1, 17, LENGTH - 1])
@pytest.mark.parametrize("per_epoch", [2, 3, 20])
def test_two_epochs_read_each_token(tmp_path, per_epoch, rest):
    """The first begins with the first token, the second ends with the last."""
    total = (per_epoch + 1) * LENGTH + rest
    manifest = write_dataset(tmp_path, {"english": cut(total)}, {})
    rows = TrainingRows(manifest, sequence_length=LENGTH, seed=3, weights={})
    read = {int(t) for i in range(2 * per_epoch) for t in rows.row(i).tokens}
    assert read == set(range(total))
    for epoch in range(2, 8):
        shifts = {s % LENGTH for s in starts_of(rows, range(epoch * per_epoch, (epoch + 1) * per_epoch))}
        assert len(shifts) == 1, "each epoch cuts the stream into rows that do not overlap"


def test_without_weights_all_rows_are_read_equally_often(tmp_path):
    """With a small and a large source, each row is read equally often after any whole number of epochs, and nearly so within one."""
    manifest = write_dataset(tmp_path, {"large": cut(500 * LENGTH), "small": cut(3 * LENGTH + 5, base=20_000)}, {})
    rows = TrainingRows(manifest, sequence_length=LENGTH, seed=3, weights={})
    small = [s for s in starts_of(rows, range(499 + 2)) if s >= 20_000]
    assert sorted(small) == [20_000, 20_000 + LENGTH]
    found = readings(manifest, {}, LENGTH, 3 * 501)
    assert [(r.part.name, r.rows, r.epochs) for r in found] == [("large", 3 * 499, 3.0), ("small", 3 * 2, 3.0)]
    assert [r.part.tail for r in found] == [LENGTH - 1, LENGTH + 4]


def test_readings_equal_the_rows_read(manifest):
    weights = {"python": 3.0, "english": 1.0}
    rows = TrainingRows(manifest, sequence_length=LENGTH, seed=1, weights=weights)
    english, python = readings(manifest, weights, LENGTH, 100)
    starts = starts_of(rows, range(100))
    assert (
        (english.rows, python.rows) == (sum(s < 10_000 for s in starts), sum(s >= 10_000 for s in starts)) == (25, 75)
    )
    assert python.epochs == 75 / python.part.rows_per_epoch > 4


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"english": -1.0}, r"data.weights=\{'english': -1.0\} must be finite and not negative"),
        ({"english": 0.0}, "one must be above 0"),
    ],
)
def test_invalid_weights_are_refused(manifest, weights, words):
    with pytest.raises(ValueError, match=words):
        TrainingRows(manifest, sequence_length=LENGTH, seed=1, weights=weights)


OLD = [
    1056,
    416,
    10288,
    832,
    1312,
    1440,
    10256,
    1504,
    1472,
    1024,
    10032,
    640,
    256,
    768,
    10096,
    1408,
    320,
    384,
    10448,
    160,
]
OLD_SECOND = [200, 1096, 648, 776, 712]


def test_order_1_never_changes(manifest):
    """Runs that began under it resume by it; in the first epoch of a single source, order 2 has the same rows."""
    old, new = (TrainingRows(manifest, sequence_length=LENGTH, seed=5, weights={}, order=order) for order in (1, 2))
    assert starts_of(old, range(40, 60)) == OLD
    assert starts_of(new, range(40, 60)) != OLD
    one = {"english": 1.0}
    old, new = (TrainingRows(manifest, sequence_length=LENGTH, seed=5, weights=one, order=order) for order in (1, 2))
    per_epoch = readings(manifest, one, LENGTH, 1)[0].part.rows_per_epoch
    assert starts_of(old, range(per_epoch)) == starts_of(new, range(per_epoch))
    assert starts_of(old, range(per_epoch, per_epoch + 5)) == OLD_SECOND
    with pytest.raises(ValueError, match="row order 3 is unknown; this version of ssa_pretrain has 1 to 2"):
        TrainingRows(manifest, sequence_length=LENGTH, seed=5, weights=one, order=3)


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


def test_collate_detects_rows_that_are_one_document():
    assert collate([example_row([0]), example_row([0])], index=0).num_rows == 2
    assert collate([example_row([0, 4]), example_row([0])], index=0).num_rows is None


@pytest.mark.parametrize(("isolate", "own"), [(True, [0, 2]), (False, [0])])
def test_collate_cuts_padding_into_short_documents_without_loss(isolate, own):
    """Five tokens of one sequence and its padding of four, the last of which is a label only."""
    flags = np.zeros(9, dtype=bool)
    flags[[0, 2, 5]] = True
    rows = [Row(np.arange(100, 109), flags, padding=4), example_row([0])]
    batch = collate(rows, index=0, isolate_documents=isolate, padding_document=2)
    assert batch.cu_seqlens.tolist() == [*own, 5, 7, 8, 16]
    assert batch.num_padding == 3
    kept = [t for t, m in enumerate(batch.loss_mask[0].tolist()) if m]
    assert kept == [t for t in range(4) if t != 1 or not isolate] + list(range(8, 16))
