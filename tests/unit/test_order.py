"""The order of rows: permutations that are permutations, blends that keep their shares."""

import numpy as np
import pytest

from ssa_pretrain.data.order import PATTERN_ROWS, Blend, key_number, permute


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 1000])
def test_permute_is_a_permutation(n):
    assert sorted(permute(i, n, "key") for i in range(n)) == list(range(n))


def test_permute_depends_on_the_key_and_mixes():
    one, other = ([permute(i, 1000, key) for i in range(1000)] for key in ("a", "b"))
    assert one != other
    assert one != list(range(1000))
    neighbours = np.mean(np.abs(np.diff(one)))
    assert 280 < neighbours < 390  # a random permutation's mean distance is n / 3, with a spread of about 7


def test_permute_refuses_an_index_outside():
    with pytest.raises(ValueError, match=r"index=5 must lie in \[0, 5\)"):
        permute(5, 5, "key")


def test_permute_never_changes():
    """Runs resume by this order; a change of it is a change of the data of every run."""
    assert [permute(i, 10, "fingerprint:1:english:0") for i in range(10)] == [8, 7, 2, 0, 3, 5, 6, 1, 4, 9]
    assert key_number("x", 1000) == 781


@pytest.mark.parametrize("weights", [[1.0], [3.0, 1.0], [0.7, 0.15, 0.08, 0.06, 0.01]])
def test_blend_keeps_shares_in_every_prefix(weights):
    blend = Blend(weights)
    sources = np.array([blend.source(i)[0] for i in range(2 * PATTERN_ROWS)])
    for source, weight in enumerate(np.array(weights) / np.sum(weights)):
        taken = np.cumsum(sources == source)
        expected = weight * np.arange(1, len(sources) + 1)
        assert np.abs(taken - expected).max() <= 2.0  # one for the interleaving, one for rounding the pattern's counts


def test_blend_hands_out_each_row_of_a_source_once():
    blend = Blend([2.0, 1.0])
    seen = [blend.source(i) for i in range(3 * PATTERN_ROWS)]
    for source in (0, 1):
        rows = [row for s, row in seen if s == source]
        assert rows == list(range(len(rows)))


def test_blend_leaves_out_a_source_of_weight_zero():
    assert {Blend([1.0, 0.0]).source(i)[0] for i in range(PATTERN_ROWS)} == {0}
