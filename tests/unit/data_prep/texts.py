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


def sentences(count: int, seed: int) -> list[str]:
    """Returns `count` different texts of 20 to 200 words."""
    draw = random.Random(seed)
    return [f"{number}: " + " ".join(draw.choices(WORDS, k=draw.randint(20, 200))) for number in range(count)]
