"""ssa_pretrain/step_ranges.py: the same steps have one form, and both ends of a range belong to it."""

import pytest

from ssa_pretrain.step_ranges import are_valid, contains, merged, up_to


def test_ranges_that_touch_or_overlap_are_joined():
    assert merged([[7, 9], [1, 2], [3, 3], [8, 12]]) == [(1, 3), (7, 12)]
    assert merged([[1, 9], [2, 3]]) == [(1, 9)]
    assert merged([]) == []


def test_same_steps_have_the_same_form():
    steps = {3, 4, 5, 9}
    forms = [merged(ranges) for ranges in ([[3, 5], [9, 9]], [[9, 9], [4, 5], [3, 4]], [[n, n] for n in steps])]
    assert forms[0] == forms[1] == forms[2]
    assert {step for step in range(1, 20) if contains(forms[0], step)} == steps


@pytest.mark.parametrize(
    ("step", "expected"), [(2, []), (3, [(3, 3)]), (4, [(3, 4)]), (8, [(3, 5)]), (9, [(3, 5), (9, 9)])]
)
def test_ranges_end_at_a_step(step, expected):
    assert up_to([[9, 12], [3, 5]], step) == up_to(expected, step) == expected


@pytest.mark.parametrize("bad", [[[0, 3]], [[3, 2]], [[3]], [[1, 2, 3]], [[]]])
def test_other_lists_are_not_ranges(bad):
    assert not are_valid(bad)
    assert are_valid([[1, 1], [5, 9]]) and are_valid([])
