"""Which documents repeat text that came before: the share of a document's n-grams of words that were seen already.

The n-grams are those of contamination.py: thirteen consecutive words, without case and ASCII punctuation. An n-gram
counts as repeated if a document that was kept before has it, or if it occurs earlier in the same document. Dropped
documents leave no trace. So the result depends only on the documents and on their order.

The hashes of all kept n-grams are in memory: 16 to 32 bytes per word of the kept text.
"""

import numpy as np

from data_prep.sources.packages.contamination import ngram_hashes, word_hashes


class RepeatFilter:
    """Decides, document by document, which ones repeat too much of the text before them."""

    def __init__(self, max_share: float) -> None:
        self._max_share = max_share
        self._seen = HashSet()

    def keeps(self, text: bytes) -> bool:
        """Returns whether a document (UTF-8) is kept: whether it repeats at most the allowed share of its n-grams.

        The n-grams of a kept document are remembered.
        """
        ngrams = ngram_hashes(word_hashes(text))
        different = np.unique(ngrams)
        new = different[~self._seen.contains(different)]
        if len(ngrams) - len(new) > self._max_share * len(ngrams):
            return False
        self._seen.add(new)
        return True


class HashSet:
    """A set of uint64 hashes in numpy: open addressing with linear probing, at most half full.

    The low bits of a hash are its place, so the hashes must be well mixed. 0 marks an empty place. The hash 0 is stored
    as 1, one more collision in 2**64.
    """

    def __init__(self) -> None:
        self._table = np.zeros(1 << 16, dtype=np.uint64)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def contains(self, hashes: np.ndarray) -> np.ndarray:
        """Returns a bool [n]: which hashes are in the set."""
        left, found = np.arange(len(hashes)), np.zeros(len(hashes), dtype=bool)
        hashes = np.maximum(hashes, np.uint64(1))
        places = self._places(hashes)
        while len(left):
            entries = self._table[places]
            equal = entries == hashes[left]
            found[left[equal]] = True
            going_on = ~equal & (entries != 0)
            left, places = left[going_on], self._next(places[going_on])
        return found

    def add(self, hashes: np.ndarray) -> None:
        """Adds different hashes that are not in the set."""
        self._size += len(hashes)
        if 2 * self._size > len(self._table):
            old = self._table[self._table != 0]
            self._table = np.zeros(1 << (2 * self._size).bit_length(), dtype=np.uint64)
            self._insert(old)
        self._insert(np.maximum(hashes, np.uint64(1)))

    def _insert(self, hashes: np.ndarray) -> None:
        places = self._places(hashes)
        while len(hashes):
            free = self._table[places] == 0
            self._table[places[free]] = hashes[free]  # of several hashes at one place, one is stored
            waiting = self._table[places] != hashes
            hashes, places = hashes[waiting], self._next(places[waiting])

    def _places(self, hashes: np.ndarray) -> np.ndarray:
        return (hashes & np.uint64(len(self._table) - 1)).astype(np.int64)

    def _next(self, places: np.ndarray) -> np.ndarray:
        return (places + 1) & (len(self._table) - 1)
