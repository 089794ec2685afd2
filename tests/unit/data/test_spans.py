"""Spans against the sets of their members."""

from ssa_pretrain.data.spans import intersection


def queries(spans) -> set[int]:
    return {query for first, length in spans for query in range(first, first + length)}


def test_intersection_equals_that_of_the_sets() -> None:
    one, other = [(0, 5), (7, 1), (10, 20)], [(3, 9), (15, 2), (29, 4)]
    assert queries(intersection(one, other)) == queries(one) & queries(other)
    assert intersection(one, []) == intersection([], one) == []
