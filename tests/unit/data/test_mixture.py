"""Mixtures by stage: exact counts in every stage, epochs that go on over stages, and no row that depends on later stages."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from ssa_pretrain.data.mixture import Mixture, Stage
from ssa_pretrain.data.order import Blend, permute, permute_all
from ssa_pretrain.data.rows import TrainingRows
from support.small_datasets import cut, write_dataset

LENGTH = 32
STAGES = (
    Stage(0, {"a": 0.7, "b": 0.2, "c": 0.1}),
    Stage(53, {"c": 1.0}),
    Stage(60, {"a": 1, "b": 1}),
    Stage(131, {}),
)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    sizes = {"a": 60 * LENGTH, "b": 20 * LENGTH + 9, "c": 9 * LENGTH}
    return write_dataset(
        tmp_path_factory.mktemp("stages"),
        {name: cut(n, base=9000 * i) for i, (name, n) in enumerate(sizes.items())},
        {},
    )


def training_rows(manifest, weights, order: int = 2) -> TrainingRows:
    return TrainingRows(manifest, sequence_length=LENGTH, seed=4, weights=weights, order=order)


@pytest.mark.parametrize("order", [1, 2])
def test_counts_are_those_of_the_rows_at_every_row(manifest, order: int) -> None:
    mixture, seen = Mixture(manifest, STAGES, LENGTH, order=order), Counter()
    for row in range(300):
        assert mixture.counts(row) == [seen[part] for part in range(3)]
        part, number = mixture.locate(row)
        assert number == seen[part], "a part's rows follow one another over stages"
        seen[part] += 1


def test_each_stage_has_its_shares_to_within_two_rows_at_every_row(manifest) -> None:
    mixture = Mixture(manifest, STAGES, LENGTH)
    names = [part.name for part in mixture.parts]
    shares = [[stage.weights.get(name, 0) for name in names] for stage in STAGES[:-1]]
    shares.append([part.rows_per_epoch for part in mixture.parts])
    ends = [stage.first_row for stage in STAGES[1:]] + [400]
    for stage, share, end in zip(STAGES, shares, ends, strict=True):
        for row in range(stage.first_row, end):
            found = np.array([reading.rows for reading in mixture.readings(row, stage.first_row)])
            exact = (row - stage.first_row) * np.array(share) / sum(share)
            assert (np.abs(found - exact) < 2).all() and found.sum() == row - stage.first_row
    assert [r.rows for r in mixture.readings(60, 53)] == [0, 0, 7]


def test_no_row_of_a_source_comes_twice_before_all_have_come(manifest) -> None:
    rows = training_rows(manifest, STAGES)
    places: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for i in range(400):
        row = rows.row(i)
        places[row.part].append(int(row.tokens[0]))
    for part in range(3):
        per_epoch = Mixture(manifest, {}, LENGTH).parts[part].rows_per_epoch
        assert len(places[part]) > per_epoch
        for first in range(0, len(places[part]) - per_epoch, per_epoch):
            assert len(set(places[part][first : first + per_epoch])) == per_epoch


def test_later_stages_move_no_earlier_row_and_one_stage_is_the_plain_mixture(manifest) -> None:
    def first_tokens(weights, numbers=range(200)) -> list[int]:
        rows = training_rows(manifest, weights)
        return [int(rows.row(i).tokens[0]) for i in numbers]

    whole = first_tokens(STAGES)
    assert first_tokens((*STAGES[:2], Stage(60, {"b": 1.0})))[:60] == whole[:60]
    assert first_tokens((*STAGES[:2], Stage(60, {"b": 1.0})))[60:] != whole[60:]
    assert first_tokens(STAGES[:1]) == first_tokens(STAGES[0].weights)
    assert first_tokens(STAGES, reversed(range(200)))[::-1] == whole, "a row depends on its number only"


def test_tokens_and_epochs_read(manifest) -> None:
    rows = training_rows(manifest, STAGES)
    for (before, after), number in zip(pairwise(map(rows.read_so_far, range(201))), range(200), strict=True):
        name = rows.part_names[rows.row(number).part]
        assert after[name][0] - before[name][0] == LENGTH
        assert sum(tokens for tokens, _ in after.values()) == (number + 1) * LENGTH
    per_epoch = {part.name: part.rows_per_epoch for part in Mixture(manifest, {}, LENGTH).parts}
    assert all(epochs == tokens / LENGTH / per_epoch[name] for name, (tokens, epochs) in after.items())


def test_unknown_source_of_a_stage_is_refused(manifest) -> None:
    with pytest.raises(ValueError, match=r"data.weights=\['d'\] must name parts"):
        Mixture(manifest, [Stage(0, {}), Stage(5, {"d": 1.0})], LENGTH)


@pytest.mark.parametrize("n", [1, 2, 3, 64, 65, 1000])
def test_permutation_of_many_is_that_of_each(n: int) -> None:
    assert permute_all(np.arange(n), n, "key").tolist() == [permute(i, n, "key") for i in range(n)]


def test_blend_of_a_stage_is_exact_over_whole_periods() -> None:
    assert Blend([5, 3, 2]).counts(1_000_000) == [500_000, 300_000, 200_000]
