"""Held-out text is found in training text: equal documents and shared n-grams, regardless of case and punctuation."""

import random

import numpy as np
import pytest

from data_prep.sources.packages.contamination import WORDS, HeldOut, ngram_hashes, word_hashes

DRAW = random.Random(0)
VOCABULARY = [f"word{n}" for n in range(5000)]


def prose(words: int) -> list[str]:
    return DRAW.choices(VOCABULARY, k=words)


def runs_by_definition(text: str) -> set[str]:
    """Returns the n-grams, as strings instead of hashes."""
    words = "".join(c.lower() if (c.isascii() and c.isalnum()) or not c.isascii() else " " for c in text).split()
    return {" ".join(words[n : n + WORDS]) for n in range(len(words) - WORDS + 1)}


def test_equal_words_have_equal_hashes_at_any_position():
    hashes = word_hashes(b"Ab, cd! ab\\ncd--AB 'ef' cdab")
    assert hashes.dtype == np.uint64
    words = ["ab", "cd", "ab", "ncd", "ab", "ef", "cdab"]
    assert len(hashes) == len(words)
    for i, first in enumerate(words):
        for j, second in enumerate(words):
            assert (hashes[i] == hashes[j]) == (first == second)


@pytest.mark.parametrize("words", [0, 1, WORDS - 1, WORDS, WORDS + 1, 500])
def test_number_of_ngrams_matches_the_definition(words):
    text = " ".join(f"w{n}" for n in range(words))
    assert len(ngram_hashes(word_hashes(text.encode()))) == max(0, words - WORDS + 1) == len(runs_by_definition(text))


def test_shared_ngrams_match_the_definition():
    held = [" ".join(prose(DRAW.randint(5, 400))) for _ in range(40)]
    index = HeldOut(text.encode() for text in held)
    runs = set().union(*map(runs_by_definition, held))
    assert index.num_ngrams == len(runs)
    for number in range(60):
        words = prose(300)
        if number % 2:
            taken = held[number % 40].split()
            start = DRAW.randrange(max(1, len(taken) - 20))
            words[100:100] = taken[start : start + DRAW.randint(5, 20)]
        text = " ".join(words)
        verdict = index.compare(text.encode())
        assert verdict.shared_ngrams == len(runs_by_definition(text) & runs)


@pytest.mark.parametrize("count, overlaps", [(WORDS - 1, False), (WORDS, True), (WORDS + 5, True)])
def test_thirteen_shared_words_are_an_overlap(count, overlaps):
    passage = prose(60)
    index = HeldOut([" ".join(passage).encode()])
    training = " ".join([*prose(30), *passage[20 : 20 + count], *prose(30)])
    assert index.overlaps(training.encode()) is overlaps


def test_case_and_punctuation_are_ignored():
    index = HeldOut([b"Whoever would be free must strike the first blow, and strike it in person today."])
    hidden = b"x WHOEVER would be -- free; must\\nstrike the 'first' blow and (strike) it in person, TODAY y"
    assert index.compare(hidden.replace(b"\\n", b"\n")).shared_ngrams == 3
    assert not index.overlaps(b"whoever would be free must not strike the first blow and strike it in person")


def test_short_held_out_document_is_compared_whole():
    index = HeldOut(["Äpfel zählen nicht.".encode()])
    assert index.compare("äpfel  zählen nicht".encode()).duplicate is False  # only ASCII letters are folded
    assert index.compare("Äpfel ZäHLEN: nicht!".encode()).duplicate
    assert not index.overlaps("Äpfel zählen nicht immer".encode())


def test_empty_texts_do_not_overlap():
    assert not HeldOut([]).overlaps(b"some text")
    assert not HeldOut([b"some text"]).overlaps(b"")


def test_many_documents_give_no_false_positive():
    index = HeldOut(" ".join(prose(400)).encode() for _ in range(100))
    assert sum(index.overlaps(" ".join(prose(400)).encode()) for _ in range(200)) == 0
