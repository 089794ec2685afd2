"""The order of training rows: pure functions of (key, index). A checkpoint holds no sampler state, and the length of a run moves no row.

`permute` is a permutation of range(n) evaluated one index at a time: a four-round Feistel network over the next even
number of bits, repeated until the result is inside the range (Black and Rogaway, "Ciphers with arbitrary finite
domains", 2002). `Blend` interleaves parts so that every prefix holds each part's share to within two rows.
`PatternBlend` is the earlier interleaving, kept for checkpoints that were written under it.
"""

import hashlib
import math
from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

import numpy as np

PATTERN_ROWS = 4096


def permute(index: int, n: int, key: str) -> int:
    """Returns where a keyed permutation of range(n) sends `index`."""
    if not 0 <= index < n:
        raise ValueError(f"index={index} must lie in [0, {n})")
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    rounds = _round_keys(key)
    while True:
        left, right = index >> half, index & mask
        for round_key in rounds:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        index = left << half | right
        if index < n:
            return index


def permute_all(indices: np.ndarray, n: int, key: str) -> np.ndarray:
    """Returns `permute` of each of some indices, int64, in one pass over them."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    half_bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    found, outside = indices.astype(np.uint64), np.arange(len(indices))
    while len(outside):
        left, right = found[outside] >> half_bits, found[outside] & mask
        for round_key in _round_keys(key):
            left, right = right, left ^ (_mix_all(right ^ np.uint64(round_key)) & mask)
        found[outside] = left << half_bits | right
        outside = outside[found[outside] >= n]
    return found.astype(np.int64)


def key_number(key: str, n: int) -> int:
    """Returns a number in [0, n) that depends only on the key."""
    return _round_keys(key)[0] % n


def _round_keys(key: str) -> list[int]:
    digest = hashlib.sha256(key.encode()).digest()
    return [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(4)]


def _mix(x: int) -> int:
    """Returns 64 well-mixed bits of x (the finaliser of SplitMix64; Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


def _mix_all(x: np.ndarray) -> np.ndarray:
    """Returns `_mix` of each of some numbers, uint64; products wrap around."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Blend:
    """Which part each row of a mixture comes from, and how many rows of that part precede it.

    The parts are the leaves of a binary tree. Of the first m rows of a node of weight w, round(m * l / w) go to its
    left child of weight l and the others to its right child, halves rounded up. Both counts grow by 0 or 1 with each
    row. So a row takes one path down, and its index in a child is the child's count before it. There is no table and no
    state. A row costs one division per level, and integers keep it exact.

    The bound. Let e be a node's count less its share of n rows, 0 at the root. A child with r times the node's weight
    has r * e + d with |d| <= 1/2. A node's parts, the largest first, are cut where the two sides are most nearly equal.
    If the largest part has half of the weight or more, it is one side, a leaf, and the other side has at most half. If
    it has a third or more, the cut behind it is at most a sixth off the middle. If it has less, consecutive cuts are
    less than a third apart, so one of them is at most a sixth off. So a side of several parts has r <= 2/3: |e| < 1/2 *
    (1 + 2/3 + 4/9 + ...) = 3/2 inside the tree, and |e| < 3/2 + 1/2 = 2 at the leaves.

    With integer weights there is no rounding at multiples of their sum: there each part has had exactly its share.

    Args:
        weights: one per part, finite, not negative, not all 0; their sum does not matter.

    Raises:
        ValueError: the weights violate this.
    """

    def __init__(self, weights: Sequence[float | Fraction]) -> None:
        shares = _whole_numbers(weights)
        self._num_parts = len(shares)
        largest_first = sorted((p for p, share in enumerate(shares) if share), key=lambda p: -shares[p])
        ends = list(accumulate((shares[p] for p in largest_first), initial=0))
        self._nodes: list[tuple[int, int, int, int]] = []  # weight of the left child, of both, the children
        unbuilt: list[tuple[int, int]] = []  # the parts of each node, a range of `largest_first`

        def child(first: int, last: int) -> int:
            """Returns the number of a node for a range of parts; a single part p is ~p."""
            if last - first == 1:
                return ~largest_first[first]
            unbuilt.append((first, last))
            return len(unbuilt) - 1

        self._root = child(0, len(largest_first))
        while len(self._nodes) < len(unbuilt):
            first, last = unbuilt[len(self._nodes)]
            cut = _middle(ends, first, last)
            node = (ends[cut] - ends[first], ends[last] - ends[first], child(first, cut), child(cut, last))
            self._nodes.append(node)

    def locate(self, row: int) -> tuple[int, int]:
        """Maps a row of the mixture to (part, row index within that part)."""
        node, row = self._root, int(row)
        while node >= 0:
            left, both, first, second = self._nodes[node]
            before, rest = divmod(2 * row * left + both, 2 * both)
            node, row = (first, before) if rest + 2 * left >= 2 * both else (second, row - before)
        return ~node, row

    def counts(self, rows: int) -> list[int]:
        """Returns how many of the first `rows` rows each part has."""
        found = [0] * self._num_parts
        below = [(self._root, int(rows))]
        while below:
            node, count = below.pop()
            if node < 0:
                found[~node] = count
                continue
            left, both, first, second = self._nodes[node]
            taken = (2 * count * left + both) // (2 * both)
            below += [(first, taken), (second, count - taken)]
        return found


def _whole_numbers(weights: Sequence[float | Fraction]) -> list[int]:
    """Returns integers in the exact ratio of some weights."""
    if not all(isinstance(w, int | Fraction) or math.isfinite(w) for w in weights):
        raise ValueError(f"weights={list(weights)} must be finite")
    exact = [w if isinstance(w, int | Fraction) else Fraction(float(w)) for w in weights]
    if min(exact, default=0) < 0 or not any(exact):
        raise ValueError(f"weights={list(weights)} must not be negative, and one must be above 0")
    denominator = math.lcm(*(w.denominator for w in exact))
    whole = [int(w * denominator) for w in exact]
    divisor = math.gcd(*whole)
    return [w // divisor for w in whole]


def _middle(ends: list[int], first: int, last: int) -> int:
    """Returns where ends[first..last] are cut into two sides that are most nearly equal, neither of them empty."""
    twice = ends[first] + ends[last]
    cut = bisect_left(ends, twice, first + 1, last - 1, key=lambda end: 2 * end)
    return min((c for c in (cut - 1, cut) if c > first), key=lambda c: abs(2 * ends[c] - twice))


class PatternBlend:
    """The interleaving of row order 1: a pattern of 4,096 rows in which each part has a rounded number of rows, at least one.

    Shares drift with every repetition of the pattern. It is only used to continue runs that began under it.
    """

    def __init__(self, weights: Sequence[float | Fraction]) -> None:
        share = np.asarray(weights, dtype=np.float64)
        exact = share / share.sum() * PATTERN_ROWS
        counts = np.floor(exact).astype(np.int64)
        counts[np.argsort(counts - exact, kind="stable")[: PATTERN_ROWS - counts.sum()]] += 1
        counts[(share > 0) & (counts == 0)] = 1  # a small part still gets a row
        rows = int(counts.sum())
        place = np.concatenate([(np.arange(n) + 0.5) / max(n, 1) for n in counts])
        part = np.repeat(np.arange(len(counts)), counts)
        self._pattern = part[np.argsort(place, kind="stable")]
        self._counts = counts
        self._nth = np.empty(rows, dtype=np.int64)
        for p in range(len(counts)):
            self._nth[self._pattern == p] = np.arange(counts[p])

    def locate(self, row: int) -> tuple[int, int]:
        """Maps a row of the mixture to (part, row index within that part)."""
        cycle, at = divmod(row, len(self._pattern))
        part = int(self._pattern[at])
        return part, int(cycle * self._counts[part] + self._nth[at])

    def counts(self, rows: int) -> list[int]:
        """Returns how many of the first `rows` rows each part has."""
        cycles, rest = divmod(rows, len(self._pattern))
        more = np.bincount(self._pattern[:rest], minlength=len(self._counts))
        return [int(n) for n in cycles * self._counts + more]
