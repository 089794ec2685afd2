"""Texts for small corpora."""

import random

WORDS = [
    "the",
    "sparse",
    "stream",
    "reads",
    "blocks",
    "of",
    "keys",
    "while",
    "the",
    "full",
    "stream",
    "reads",
    "every",
    "key",
    "it",
    "may",
    "see",
    "in",
    "a",
    "document",
]


def sentences(count: int, seed: int, *, words: int = 200, prefix: str = "") -> list[str]:
    """Returns `count` different texts of 20 to `words` words, each behind the prefix and its number."""
    draw = random.Random(seed)
    return [f"{prefix}{number}: " + " ".join(draw.choices(WORDS, k=draw.randint(20, words))) for number in range(count)]
