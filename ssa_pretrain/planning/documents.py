"""The documents of a typical row, which determine the cost of the full stream: a row of many documents has fewer (query, key) pairs.

A rule names the distribution of their lengths:

    whole            one document per row
    lognormal:MEAN   as in text from the web: the logarithm has the standard deviation 1, as in the benchmark's real lengths (bench/documents.py)
    geometric:MEAN   as in the benchmark's short documents
    cut:NUMBER       NUMBER documents per row, cut at random places

Documents follow one another over the ends of rows, as in training, and a row's end cuts them. Lengths are quantiles of the distribution in a fixed
random order, so a plan is the same every time. Standard library only.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import lru_cache
from itertools import cycle, pairwise
from statistics import NormalDist

from ssa_pretrain.config import AttentionConfig, ModelConfig
from ssa_pretrain.planning.flops import RowFlops, row_flops

NUM_DOCUMENTS = 400
NUM_ROWS = 32
WHOLE = "whole"


def document_rule(mean_tokens: int) -> str:
    """Returns the rule of data with a mean length in tokens; 0: one document per row."""
    return f"lognormal:{mean_tokens}" if mean_tokens else WHOLE


def typical_row(
    model: ModelConfig, attention: AttentionConfig, row_length: int, vocab_size: int, rule: str = WHOLE
) -> RowFlops:
    """Returns the mean operations of a row.

    Args:
        model: the shape of the model.
        attention: the method and its constants.
        row_length: tokens per row.
        vocab_size: without padding.
        rule: of the documents' lengths.
    """
    if rule == WHOLE:
        return row_flops(model, attention, [row_length], vocab_size)
    lengths = document_lengths(rule, row_length)
    num_rows = sum(lengths) // row_length
    total = row_flops(model, attention, lengths, vocab_size)
    shares = ("full_ratio", "share_if_full", "share_if_sparse")
    means = {f.name: getattr(total, f.name) / num_rows for f in fields(RowFlops) if f.name not in shares}
    return replace(total, **means)


@lru_cache(maxsize=32)
def document_lengths(rule: str, row_length: int) -> tuple[int, ...]:
    """Returns the lengths of the documents of many whole rows, cut at the rows' ends.

    Raises:
        ValueError: there is no such rule.
    """
    name, _, number = rule.partition(":")
    rng = random.Random(0)
    if name == "cut":
        return tuple(_cut(int(number), row_length, rng))
    drawn = {"lognormal": _lognormal, "geometric": _geometric}.get(name)
    if drawn is None or not number.isdecimal() or int(number) < 1:
        raise ValueError(
            f"documents={rule} must be whole, lognormal:MEAN, geometric:MEAN or cut:NUMBER; try lognormal:960"
        )
    lengths = [max(1, round(drawn(int(number), (i + 0.5) / NUM_DOCUMENTS))) for i in range(NUM_DOCUMENTS)]
    rng.shuffle(lengths)
    found, place = [], 0
    room = max(row_length, sum(lengths) // row_length * row_length)
    for length in cycle(lengths):
        length = min(length, room - place)
        while length:
            piece = min(length, row_length - place % row_length)
            found.append(piece)
            place, length = place + piece, length - piece
        if place == room:
            return tuple(found)
    raise AssertionError  # cycle does not end


def _lognormal(mean: int, quantile: float) -> float:
    """Returns the length at a quantile, with a standard deviation of the logarithm of 1."""
    return math.exp(NormalDist(math.log(mean) - 0.5, 1.0).inv_cdf(quantile))


def _geometric(mean: int, quantile: float) -> float:
    """Returns the length at a quantile."""
    return math.log(1.0 - quantile) / math.log(1.0 - 1.0 / mean) if mean > 1 else 1.0


def _cut(number: int, row_length: int, rng: random.Random) -> Iterator[int]:
    """Yields the documents of rows that are cut at random places."""
    for _ in range(NUM_ROWS):
        edges = [0, *sorted(rng.sample(range(1, row_length), number - 1)), row_length]
        yield from (end - start for start, end in pairwise(edges))
