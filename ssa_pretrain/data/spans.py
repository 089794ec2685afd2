"""Spans of neighbouring tokens or queries: (first, length), ascending and without overlaps. Standard library only."""

from collections.abc import Sequence

Span = tuple[int, int]


def intersection(some: Sequence[Span], others: Sequence[Span]) -> list[Span]:
    """Returns the spans that lie in both; each argument ascends and does not overlap itself."""
    found, i, j = [], 0, 0
    while i < len(some) and j < len(others):
        (first, length), (other, other_length) = some[i], others[j]
        begin, end = max(first, other), min(first + length, other + other_length)
        if begin < end:
            found.append((begin, end - begin))
        if first + length < other + other_length:
            i += 1
        else:
            j += 1
    return found


def total(spans: Sequence[Span]) -> int:
    """Returns the number of tokens or queries in some spans."""
    return sum(length for _, length in spans)
