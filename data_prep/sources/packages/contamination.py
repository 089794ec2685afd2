"""Whether training text contains held-out text: equal documents, and any thirteen consecutive equal words (an n-gram).

Text is compared in a normal form. ASCII letters are in lower case, every other ASCII character except digits is a
space, and characters beyond ASCII are unchanged. Two documents are equal if their normal forms are. They overlap if
they share an n-gram of `WORDS` words, the length in GPT-3's paper (arXiv 2005.14165, appendix C). A held-out document
with fewer words is only compared as a whole.

Everything is numpy, at about 40 MB/s on one core. Let H[i] be the polynomial hash of the first i bytes modulo 2**64.
The hash of a word is a difference of two H, divided by a power of the base, which is odd and so invertible. The hash of
an n-gram is computed in the same way over words. Two different n-grams collide once in 2**64 pairs, times a small
factor. A false positive costs one training document.
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

# Lower-case letters and digits stay, bytes of other scripts count as letters, everything else is a space.
_NORMAL = bytes((c | 0x20 if 65 <= c <= 90 else c) if c >= 128 or chr(c).isalnum() else 32 for c in range(256))


def word_hashes(text: bytes) -> np.ndarray:
    """Returns a uint64 hash [words] of each word of a text (UTF-8)."""
    codes = np.frombuffer(text.translate(_NORMAL), dtype=np.uint8)
    is_letter = np.zeros(len(codes) + 2, dtype=np.int8)
    is_letter[1:-1] = codes != 32
    edges = np.diff(is_letter)
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    return _spread(_range_hashes(codes, starts, stops, _BYTE_BASE))


def ngram_hashes(words: np.ndarray, length: int = WORDS) -> np.ndarray:
    """Returns a uint64 hash [n-grams] of each n-gram of `length` words; empty if there are fewer words."""
    first = np.arange(max(0, len(words) - length + 1))
    return _spread(_range_hashes(words, first, first + length, _WORD_BASE))


def document_hash(words: np.ndarray) -> int:
    """Returns a 64-bit hash of a document, given the hashes of its words."""
    return int(_range_hashes(words, np.array([0]), np.array([len(words)]), _WORD_BASE)[0])


@dataclass(slots=True)
class Overlap:
    """What a training document shares with the held-out text."""

    duplicate: bool  # its normal form equals that of a held-out document
    shared_ngrams: int  # n-grams of WORDS words that are also held out


class HeldOut:
    """An index of the held-out documents, to compare training documents with."""

    def __init__(self, texts: Iterable[bytes]) -> None:
        self._documents: set[int] = set()
        ngrams = [np.empty(0, dtype=np.uint64)]
        for text in texts:
            words = word_hashes(text)
            self._documents.add(document_hash(words))
            ngrams.append(ngram_hashes(words))
        self._ngrams = np.unique(np.concatenate(ngrams))
        # A bit table rejects nearly all n-grams that are not held out. Binary search decides the rest.
        self._table = np.zeros(1 << _FILTER_BITS, dtype=bool)
        self._table[self._ngrams >> np.uint64(64 - _FILTER_BITS)] = True

    @property
    def num_documents(self) -> int:
        """Number of different held-out documents."""
        return len(self._documents)

    @property
    def num_ngrams(self) -> int:
        """Number of different held-out n-grams."""
        return len(self._ngrams)

    def overlaps(self, text: bytes) -> bool:
        """Returns whether a training document (UTF-8) overlaps with held-out text and must be dropped."""
        overlap = self.compare(text)
        return overlap.duplicate or overlap.shared_ngrams > 0

    def compare(self, text: bytes) -> Overlap:
        """Returns what a training document (UTF-8) shares with the held-out text."""
        words = word_hashes(text)
        ngrams = ngram_hashes(words)
        near = ngrams[self._table[ngrams >> np.uint64(64 - _FILTER_BITS)]]
        places = np.searchsorted(self._ngrams, near)
        found = places < len(self._ngrams)
        shared = int(np.count_nonzero(self._ngrams[places[found]] == near[found]))
        return Overlap(document_hash(words) in self._documents, shared)


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
    """Returns well-mixed hashes: every bit depends on every input bit (the finaliser of SplitMix64)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))
