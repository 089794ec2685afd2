"""Packing by best fit against a sequential one, and the index: every token once per epoch, no document cut, equal bytes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ssa_pretrain.data import packed_index
from ssa_pretrain.data.batches import collate
from ssa_pretrain.data.best_fit import best_fit
from ssa_pretrain.data.manifest import Manifest
from ssa_pretrain.data.packed_index import PackedIndex, index_folder, open_index, pack_window, prepare
from ssa_pretrain.data.rows import TrainingRows
from support.small_datasets import write_dataset

LENGTH = 32


def one_by_one(lengths: np.ndarray, capacity: int) -> list[int]:
    """Returns the room that best fit leaves in each row, ascending, placing piece after piece."""
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [room for room in rooms if room >= length]
        room = min(fitting) if fitting else capacity
        if fitting:
            rooms.remove(room)
        rooms.append(room - length)
    return sorted(rooms)


@pytest.mark.parametrize("seed", range(40))
def test_rows_are_those_of_sequential_best_fit(seed: int) -> None:
    draw = np.random.default_rng(seed)
    capacity = int(draw.integers(1, 40))
    lengths = draw.integers(1, capacity + 1, int(draw.integers(0, 80)))
    rows = best_fit(lengths, capacity)
    filled = np.bincount(rows, weights=lengths).astype(int) if len(rows) else np.zeros(0, dtype=int)
    assert (filled > 0).all(), "rows are numbered without gaps"
    assert sorted((capacity - filled).tolist()) == one_by_one(lengths, capacity)


@pytest.mark.parametrize("length", [0, 9])
def test_lengths_that_no_row_holds_are_refused(length: int) -> None:
    with pytest.raises(ValueError, match=r"must lie in 1 to 8"):
        best_fit(np.array([1, length]), 8)


def documents(seed: int, count: int, base: int) -> list[np.ndarray]:
    """Returns documents of 1 to 100 tokens, numbered from `base` on; some fill a row, or several, exactly."""
    draw = np.random.default_rng(seed)
    lengths = np.concatenate([draw.integers(1, 100, count), [LENGTH, 2 * LENGTH, 3 * LENGTH + 1, 1]])
    return np.split(base + np.arange(lengths.sum()), np.cumsum(lengths)[:-1])


CORPUS = {"english": documents(0, 90, 0), "python": documents(1, 30, 10_000)}
BEGINS = {int(d[0]) for group in CORPUS.values() for d in group}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    """Two parts. The index is built in windows of 40 documents."""
    return write_dataset(tmp_path_factory.mktemp("packed"), CORPUS, {})


@pytest.fixture(scope="module")
def index(manifest) -> PackedIndex:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_index, "WINDOW", 40)
        prepare(manifest, LENGTH, str(manifest.root / "small"))
        found = open_index(manifest, LENGTH, str(manifest.root / "small"))
    assert found is not None
    return found


def training_rows(
    manifest: Manifest, index: PackedIndex | None, weights: dict[str, float], seed: int = 1
) -> TrainingRows:
    return TrainingRows(manifest, sequence_length=LENGTH, seed=seed, weights=weights, packed=index)


def test_an_epoch_holds_each_token_once_and_cuts_only_long_documents(manifest, index) -> None:
    rows = training_rows(manifest, index, {})
    per_epoch = sum(part.rows for part in index.parts)
    for epoch in range(2):
        inputs, labels = [], []
        for i in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            row = rows.row(i)
            own = LENGTH + 1 - row.padding
            inputs += row.tokens[: min(own, LENGTH)].tolist()
            batch = collate([row], index=0)
            labels += batch.labels[0][batch.loss_mask[0] > 0].tolist()
            begins = row.tokens[:own][row.starts[:own]]
            rests = [int(token) for token in begins if int(token) not in BEGINS]
            assert all((token - start_of(token)) % LENGTH == 0 for token in rests), (
                "long documents are cut at row lengths"
            )
            assert batch.num_padding == max(0, row.padding - 1)
        tokens = sorted(int(t) for group in CORPUS.values() for d in group for t in d)
        assert sorted(inputs) == tokens
        assert sorted(labels) == sorted(set(tokens) - BEGINS), "each token with a predecessor is a label once"


def start_of(token: int) -> int:
    """Returns the first token of a token's document."""
    return max(begin for begin in BEGINS if begin <= token)


def test_short_documents_lie_in_one_row(manifest, index) -> None:
    rows = training_rows(manifest, index, {})
    row_of = {}
    for i in range(sum(part.rows for part in index.parts)):
        row = rows.row(i)
        row_of |= dict.fromkeys(row.tokens[: LENGTH + 1 - row.padding][:LENGTH].tolist(), i)
    for document in (d for group in CORPUS.values() for d in group):
        assert len(document) > LENGTH or len({row_of[int(t)] for t in document}) == 1


def test_listing_counts_rows_padding_and_cut_documents(manifest, index) -> None:
    tokens = {name: sum(map(len, group)) for name, group in CORPUS.items()}
    assert {part.name: part.tokens for part in index.parts} == tokens
    assert [p.cut_documents for p in index.parts] == [sum(len(d) > LENGTH for d in group) for group in CORPUS.values()]
    rows = training_rows(manifest, index, {})
    num_rows = sum(part.rows for part in index.parts)
    padding = sum(max(0, rows.row(i).padding - 1) for i in range(num_rows))
    assert index.padding_share == pytest.approx(padding / (num_rows * LENGTH)) and 0 < index.padding_share < 0.1
    assert index.sentence().startswith(f"best fit: {num_rows:,} rows, ")


def test_tokens_read_are_those_of_the_rows(manifest, index) -> None:
    """Counted on from call to call, after a resume at any row, and going back."""
    rows, counted = training_rows(manifest, index, {"english": 1, "python": 3}), [0, 0]
    whole = [(0, 0)]
    for i in range(250):
        row = rows.row(i)
        counted[row.part] += LENGTH - max(0, row.padding - 1)
        whole.append(tuple(counted))
    for i in (0, 1, 7, 8, 120, 121, 249, 30):
        found = rows.read_so_far(i)
        assert tuple(tokens for tokens, _ in found.values()) == whole[i]
        assert found == training_rows(manifest, index, {"english": 1, "python": 3}).read_so_far(i)
    assert found["python"][1] > 0 and rows.read_so_far(250)["python"][1] > 2, "over several epochs"


def test_weights_count_tokens(manifest, index) -> None:
    rows = training_rows(manifest, index, {"english": 1.0, "python": 1.0})
    (english, _), (python, _) = rows.read_so_far(3000).values()
    assert english / (english + python) == pytest.approx(0.5, abs=0.01)


def test_index_is_built_once_verified_and_never_that_of_other_settings(manifest, tmp_path: Path) -> None:
    place = str(tmp_path)
    assert open_index(manifest, LENGTH, place) is None
    assert "; built the index" in prepare(manifest, LENGTH, place)
    folder = index_folder(manifest, LENGTH, place)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "; index " in prepare(manifest, LENGTH, place)
    others = {
        index_folder(manifest, 2 * LENGTH, place),
        index_folder(replace(manifest, fingerprint="other"), LENGTH, place),
        index_folder(manifest, LENGTH, ""),
    }
    assert len(others | {folder}) == 4
    pieces = folder / "0.pieces"
    pieces.write_bytes(b"\1" + pieces.read_bytes()[1:])
    assert "; built the index" in prepare(manifest, LENGTH, place), "a flipped bit is found"
    pieces.write_bytes(pieces.read_bytes()[:-1])
    assert open_index(manifest, LENGTH, place) is None, "a short file is found without reading it"
    prepare(manifest, LENGTH, place)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    listing = json.loads((folder / "index.json").read_text())
    listing["parts"][0]["rows"] += 1
    (folder / "index.json").write_text(json.dumps(listing))
    assert open_index(manifest, LENGTH, place) is None, "a changed listing is found"
    assert not list(folder.parent.glob("*.tmp"))


def test_index_that_cannot_be_written_is_an_error(manifest, tmp_path: Path) -> None:
    (tmp_path / "packing").write_text("in the way")
    with pytest.raises(OSError, match="packing"):
        prepare(manifest, LENGTH, str(tmp_path))


def test_window_leaves_out_empty_documents_and_cuts_at_the_row_length() -> None:
    pieces, rows = pack_window(np.array([0, 5, 5]), np.array([5, 0, 10]), 4)
    assert rows["tokens"].sum() == 15 and rows["end"][-1] == len(pieces) == 5
    assert sorted(pieces.tolist()) == [(0, 5), (4, 1), (5, 5), (9, 5), (13, 2)]
    empty_pieces, empty_rows = pack_window(np.array([3]), np.array([0]), 4)
    assert len(empty_pieces) == len(empty_rows) == 0


def test_full_row_of_one_document_takes_the_kernels_path_for_rows(manifest, index) -> None:
    """Of rows that are one document each, `num_rows` says so, whether the document ends or goes on."""
    rows = training_rows(manifest, index, {})
    full = [rows.row(i) for i in range(sum(part.rows for part in index.parts))]
    full = [row for row in full if row.padding < 2 and row.starts[:LENGTH].sum() == 1]
    assert {row.padding for row in full} == {0, 1}
    assert collate(full[:2], index=0).num_rows == 2
    batch = collate(full, index=0)
    assert batch.document_lengths == [LENGTH] * len(full)


def test_documents_of_a_batch_leave_padding_out(manifest, index) -> None:
    rows = training_rows(manifest, index, {})
    some = [row for row in map(rows.row, range(60)) if row.padding > 1][:3]
    batch = collate(some, index=0, padding_document=2)
    wanted = [
        len(d)
        for row in some
        for d in np.split(row.tokens[: -row.padding], np.flatnonzero(row.starts[: -row.padding]))[1:]
    ]
    assert batch.document_lengths == wanted and sum(wanted) == 3 * LENGTH - batch.num_padding
