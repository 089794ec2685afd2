"""Whether training text holds what is held out: equal documents, and any run of thirteen equal words.

Text is compared in a normal form: ASCII letters in lower case, every other ASCII character that is no digit a space, characters
beyond ASCII as they are. Two documents are the same if their normal forms are; they overlap if one run of `WORDS` words is in both (the length that
GPT-3's authors chose, arXiv 2005.14165, appendix C). A held-out document of fewer words is compared whole.

All in numpy, at some 40 MB/s on one core: with H[i] the polynomial hash of the first i bytes modulo 2**64, the hash of a word is a
difference of two H divided by a power of the (odd, so invertible) base, and the hash of a run is the same again over words. Two
different runs agree by chance once in 2**64 pairs, times a small factor; a false alarm costs one training document, nothing else.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

WORDS = 13

_BYTE_BASE = 0x9E3779B97F4A7C15
_WORD_BASE = 0xC2B2AE3D27D4EB4F
_MODULUS = 1 << 64
_FILTER_BITS = 26

# Lower-case letters and digits stay, bytes of other scripts count as letters, the rest is space.
_NORMAL = bytes((c | 0x20 if 65 <= c <= 90 else c) if c >= 128 or chr(c).isalnum() else 32 for c in range(256))


def word_hashes(text: bytes) -> np.ndarray:
    """Returns a uint64 hash [words] of each word of a text (UTF-8)."""
    codes = np.frombuffer(text.translate(_NORMAL), dtype=np.uint8)
    is_letter = np.zeros(len(codes) + 2, dtype=np.int8)
    is_letter[1:-1] = codes != 32
    edges = np.diff(is_letter)
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    return _spread(_range_hashes(codes, starts, stops, _BYTE_BASE))


def run_hashes(words: np.ndarray, length: int = WORDS) -> np.ndarray:
    """Returns a uint64 hash [runs] of each run of `length` words; empty where there are fewer words."""
    first = np.arange(max(0, len(words) - length + 1))
    return _spread(_range_hashes(words, first, first + length, _WORD_BASE))


def document_hash(words: np.ndarray) -> int:
    """Returns a 64-bit hash of a whole document, given the hashes of its words."""
    return int(_range_hashes(words, np.array([0]), np.array([len(words)]), _WORD_BASE)[0])


@dataclass(slots=True)
class Verdict:
    """What a training document shares with the held-out text."""

    duplicate: bool  # its normal form is that of a held-out document
    shared_runs: int  # runs of WORDS words that are also held out


class HeldOut:
    """The held-out documents, as an index to compare training documents with."""

    def __init__(self, texts: Iterable[bytes]) -> None:
        self._documents: set[int] = set()
        runs = [np.empty(0, dtype=np.uint64)]
        for text in texts:
            words = word_hashes(text)
            self._documents.add(document_hash(words))
            runs.append(run_hashes(words))
        self._runs = np.unique(np.concatenate(runs))
        # A table of bits answers for nearly all runs that are not held out; the search in order is for the rest.
        self._table = np.zeros(1 << _FILTER_BITS, dtype=bool)
        self._table[self._runs >> np.uint64(64 - _FILTER_BITS)] = True

    @property
    def num_documents(self) -> int:
        """Different held-out documents."""
        return len(self._documents)

    @property
    def num_runs(self) -> int:
        """Different held-out runs."""
        return len(self._runs)

    def overlaps(self, text: bytes) -> bool:
        """Returns whether a training document (UTF-8) may not be trained on."""
        verdict = self.compare(text)
        return verdict.duplicate or verdict.shared_runs > 0

    def compare(self, text: bytes) -> Verdict:
        """Returns what a training document (UTF-8) shares with the held-out text."""
        words = word_hashes(text)
        runs = run_hashes(words)
        near = runs[self._table[runs >> np.uint64(64 - _FILTER_BITS)]]
        places = np.searchsorted(self._runs, near)
        found = places < len(self._runs)
        shared = int(np.count_nonzero(self._runs[places[found]] == near[found]))
        return Verdict(document_hash(words) in self._documents, shared)


def _range_hashes(values: np.ndarray, starts: np.ndarray, stops: np.ndarray, base: int) -> np.ndarray:
    """Returns sum of values[start + k] * base**(k + 1) over each range, modulo 2**64."""
    size = 1 << max(10, len(values).bit_length())
    sums = np.zeros(len(values) + 1, dtype=np.uint64)
    np.multiply(values, _powers(base, size)[: len(values)], out=sums[1:])
    np.cumsum(sums, out=sums)
    return (sums[stops] - sums[starts]) * _powers(pow(base, -1, _MODULUS), size)[starts] * np.uint64(base)


@lru_cache(maxsize=16)
def _powers(base: int, count: int) -> np.ndarray:
    """Returns base**0 ... base**(count - 1) modulo 2**64; count is a power of two."""
    powers = np.ones(count, dtype=np.uint64)
    done = 1
    while done < count:
        powers[done : 2 * done] = powers[:done] * np.uint64(pow(base, done, _MODULUS))
        done *= 2
    return powers


def _spread(hashes: np.ndarray) -> np.ndarray:
    """Returns hashes whose every bit depends on every bit (the finaliser of splitmix64)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))
