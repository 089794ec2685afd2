"""The order of rows: `permute` is a permutation, and blends keep their shares."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssa_pretrain.data.order import PATTERN_ROWS, Blend, PatternBlend, key_number, permute


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 1000])
def test_permute_is_a_permutation(n):
    assert sorted(permute(i, n, "key") for i in range(n)) == list(range(n))


def test_permute_depends_on_the_key_and_mixes():
    one, other = ([permute(i, 1000, key) for i in range(1000)] for key in ("a", "b"))
    assert one != other
    assert one != list(range(1000))
    neighbours = np.mean(np.abs(np.diff(one)))
    assert 280 < neighbours < 390  # a random permutation's mean distance is n / 3, with a spread of about 7


def test_permute_refuses_an_out_of_range_index():
    with pytest.raises(ValueError, match=r"index=5 must lie in \[0, 5\)"):
        permute(5, 5, "key")


def test_permute_never_changes():
    """Runs resume by this order. Changing it changes the data of every run."""
    assert [permute(i, 10, "fingerprint:1:english:0") for i in range(10)] == [8, 7, 2, 0, 3, 5, 6, 1, 4, 9]
    assert key_number("x", 1000) == 781


def furthest(weights: list, rows: int) -> float:
    """Returns the largest distance, in rows, of any prefix of a blend from a source's share, and checks each index and count."""
    blend, shares = Blend(weights), [Fraction(w) for w in weights]
    total, seen, worst = sum(shares), [0] * len(weights), Fraction(0)
    for row in range(rows):
        source, index = blend.locate(row)
        assert index == seen[source], f"row {row}: source {source} gives its row {index} after {seen[source]} rows"
        seen[source] += 1
        worst = max(worst, *(abs(n - (row + 1) * share / total) for n, share in zip(seen, shares, strict=True)))
    assert blend.counts(rows) == seen
    return float(worst)


WEIGHTS = st.one_of(
    st.lists(st.floats(0, 1e12), min_size=1, max_size=12),
    st.lists(st.floats(-30, 30).map(math.exp), min_size=1, max_size=12),
    st.lists(st.integers(0, 50), min_size=1, max_size=40),
)


@settings(max_examples=60, deadline=None)
@given(WEIGHTS.filter(any))
def test_every_prefix_holds_each_share_to_within_two_rows(weights):
    assert furthest(weights, 150) < 2


@pytest.mark.parametrize(
    "weights",
    [
        [1.0],
        [1 / 3, 1 / 3, 1 / 3],
        [0.7, 0.15, 0.08, 0.06, 0.01],
        [242.0, 7_200_000.0],
        [math.pi, math.e, math.sqrt(2), 1e-9],
        [1.0, 0.0, 5e-324, 1.0],
        [3.0**-i for i in range(40)],
        [1.5**-i for i in range(40)],
        [1.0] * 63 + [1.01],
        [7.0, *[1e-3] * 60],
    ],
)
def test_hard_weights_keep_their_shares(weights):
    assert furthest(weights, 1500) < 2


@settings(max_examples=30, deadline=None)
@given(WEIGHTS.filter(any), st.integers(0, 10**12))
def test_any_row_is_found_without_a_scan(weights, row):
    """A distant row agrees with the counts before and after it, and these are within two rows of the shares."""
    blend, total = Blend(weights), sum(Fraction(w) for w in weights)
    before, behind = blend.counts(row), blend.counts(row + 1)
    source, index = blend.locate(row)
    assert index == before[source]
    assert behind == [n + (s == source) for s, n in enumerate(before)]
    assert all(abs(n - row * Fraction(w) / total) < 2 for n, w in zip(before, weights, strict=True))


def test_thousands_of_sources_keep_their_shares():
    weights = (1 / np.arange(1, 3001)).tolist()
    blend, total = Blend(weights), sum(map(Fraction, weights))
    shares = np.array([float(Fraction(w) / total) for w in weights])
    for rows in (1, 1000, 3000, 123_457, 10**9 + 7):
        counts = np.array(blend.counts(rows))
        assert counts.sum() == rows and np.abs(counts - rows * shares).max() < 2


def test_integer_weights_are_exact_at_multiples_of_their_sum():
    weights = [242, 7_200_000, 31, 5000]
    for times in (1, 2, 1000):
        assert Blend(weights).counts(times * sum(weights)) == [times * w for w in weights]


def test_only_the_ratio_of_weights_matters():
    rows = range(300)
    one, other = (Blend([s * w for w in (0.5, 0.125, 0.0, 0.375)]) for s in (1.0, 2.0**-400))
    assert [one.locate(i) for i in rows] == [other.locate(i) for i in rows]
    assert one.counts(10**6)[2] == 0


def test_blend_never_changes():
    """As for `permute`."""
    assert [Blend([0.7, 0.15, 0.08, 0.06, 0.01]).locate(i)[0] for i in range(20)] == [
        0, 2, 0, 0, 1, 0, 0, 0, 3, 0, 0, 1, 0, 0, 2, 0, 0, 0, 1, 0
    ]  # fmt: skip
    assert Blend([0.7, 0.2, 0.1]).locate(10**12) == (0, 700000000000)


@pytest.mark.parametrize("weights", [[], [0.0], [-1.0, 2.0], [math.nan, 1.0], [math.inf]])
def test_invalid_weights_are_refused(weights):
    with pytest.raises(ValueError, match=r"weights=\[.*\] must (be finite|not be negative, and one must be above 0)"):
        Blend(weights)


def test_pattern_of_order_1_never_changes():
    """Runs that began under it resume by it."""
    blend = PatternBlend([2.0, 1.0])
    assert [blend.locate(i) for i in (*range(6), PATTERN_ROWS, 10 * PATTERN_ROWS)] == [
        (0, 0), (1, 0), (0, 1), (0, 2), (1, 1), (0, 3), (0, 2731), (0, 27310)
    ]  # fmt: skip
    small = PatternBlend([1.0, 1e-9])
    assert sum(small.locate(i)[0] for i in range(PATTERN_ROWS + 1)) == 1
