"""Dropping documents that repeat earlier text, compared with a filter over tuples of words."""

import random
import re

import numpy as np
import pytest

from data_prep.sources.packages.contamination import WORDS
from data_prep.sources.packages.repeats import HashSet, RepeatFilter


def expected(documents: list[str], max_share: float) -> list[bool]:
    """Returns which documents are kept, by the definition."""
    seen: set[tuple[str, ...]] = set()
    kept = []
    for text in documents:
        words = re.findall(r"[a-z0-9]+", text.lower())
        ngrams = [tuple(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)]
        own = set(ngrams) - seen
        kept.append(len(ngrams) - len(own) <= max_share * len(ngrams))
        if kept[-1]:
            seen |= own
    return kept


def documents_with_repeats() -> list[str]:
    """Returns 60 documents, most of which contain passages of a pool of 20."""
    rng = random.Random(0)
    pool = [" ".join(f"w{rng.randrange(10**6)}" for _ in range(rng.randrange(5, 60))) for _ in range(20)]
    fresh = lambda: " ".join(f"w{rng.randrange(10**6)}" for _ in range(rng.randrange(1, 150)))  # noqa: E731
    return [
        "\n".join(f"{rng.choice(pool).title()}, {fresh()}" for _ in range(rng.randrange(1, 5))) for _ in range(59)
    ] + ["short"]


@pytest.mark.parametrize("max_share", [0.0, 0.05, 0.3, 0.9, 1.0])
def test_kept_documents_are_those_of_the_definition(max_share):
    documents = documents_with_repeats()
    repeats = RepeatFilter(max_share)
    kept = [repeats.keeps(text.encode()) for text in documents]
    assert kept == expected(documents, max_share)
    assert all(kept) == (max_share >= 0.9) and any(kept)


def test_repeats_within_a_document_count():
    line = " ".join(f"w{n}" for n in range(40))
    assert RepeatFilter(0.1).keeps(line.encode())
    assert not RepeatFilter(0.1).keeps(f"{line} {line}".encode())


def test_dropped_document_leaves_no_trace():
    first, second = (" ".join(f"{name}{n}" for n in range(40)) for name in "ab")
    repeats = RepeatFilter(0.3)
    assert repeats.keeps(first.encode())
    assert not repeats.keeps(f"{first} {second}".encode())
    assert repeats.keeps(second.encode())


def test_hash_set_is_a_set_though_places_collide_and_the_table_grows():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 200_000, dtype=np.uint64)
    hashes[:5_000] &= np.uint64(2**64 - 2**32)  # all at place 0
    hashes = np.unique(np.append(hashes, np.array([0, 2], dtype=np.uint64)))
    rng.shuffle(hashes)
    known, other = hashes[:120_000], hashes[120_000:]
    found = HashSet()
    for part in np.array_split(known, 7):
        assert not found.contains(part).any()
        found.add(part)
        assert found.contains(part).all()
    assert found.contains(known).all() and not found.contains(other).any()
    assert len(found) == len(known)
