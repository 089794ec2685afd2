"""The order of training rows: pure functions of (key, index), so a checkpoint holds no sampler state and no length of a run moves a row.

`permute` is a permutation of range(n) evaluated one index at a time: a four-round Feistel network over the next even number of bits, walked
until it lands inside the range (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). `Blend` interleaves sources by a fixed
pattern in which every prefix holds each source's share to within one row.
"""

import hashlib

import numpy as np

PATTERN_ROWS = 4096


def permute(index: int, n: int, key: str) -> int:
    """Return where a keyed permutation of range(n) sends `index`."""
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


def key_number(key: str, n: int) -> int:
    """Return a number in [0, n) that depends on the key alone."""
    return _round_keys(key)[0] % n


def _round_keys(key: str) -> list[int]:
    digest = hashlib.sha256(key.encode()).digest()
    return [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(4)]


def _mix(x: int) -> int:
    """Return 64 well-mixed bits of x (the finaliser of SplitMix64; Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


class Blend:
    """Which source each row of a mixture comes from, and the how-manieth row of that source it is."""

    def __init__(self, weights: list[float]) -> None:
        share = np.asarray(weights, dtype=np.float64)
        exact = share / share.sum() * PATTERN_ROWS
        counts = np.floor(exact).astype(np.int64)
        counts[np.argsort(counts - exact, kind="stable")[: PATTERN_ROWS - counts.sum()]] += 1
        counts[(share > 0) & (counts == 0)] = 1  # a small source still has its turn
        rows = int(counts.sum())
        place = np.concatenate([(np.arange(n) + 0.5) / max(n, 1) for n in counts])
        source = np.repeat(np.arange(len(counts)), counts)
        self._pattern = source[np.argsort(place, kind="stable")]
        self._counts = counts
        self._nth = np.empty(rows, dtype=np.int64)
        for s in range(len(counts)):
            self._nth[self._pattern == s] = np.arange(counts[s])

    def source(self, row: int) -> tuple[int, int]:
        """Return (source, row of that source) of a mixture's row."""
        cycle, at = divmod(row, len(self._pattern))
        s = int(self._pattern[at])
        return s, int(cycle * self._counts[s] + self._nth[at])
