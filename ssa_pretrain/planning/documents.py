"""The documents of a typical row, which determine the cost of the full stream: a row of many documents has fewer (query, key) pairs.

A rule names the distribution of their lengths:

    whole            one document per row
    lognormal:MEAN   as in text from the web: the logarithm has the standard deviation 1, as in the benchmark's real lengths (bench/documents.py)
    geometric:MEAN   as in the benchmark's short documents
    cut:NUMBER       NUMBER documents per row, cut at random places

Documents follow one another over the ends of rows, as in training, and a row's end cuts them. Under data.packing=best_fit they are packed as in
training: only those longer than a row are cut, at its length, and padding is cut into short documents. Lengths are quantiles of the distribution in a
fixed random order, so a plan is the same every time. Needs only the standard library, and numpy for best_fit.
"""

import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import lru_cache
from itertools import cycle, pairwise
from statistics import NormalDist

import numpy as np

from ssa_pretrain.config import AttentionConfig, Auto, ModelConfig
from ssa_pretrain.data.best_fit import best_fit
from ssa_pretrain.data.manifest import Manifest
from ssa_pretrain.planning.flops import RowFlops, row_flops

NUM_DOCUMENTS = 400
NUM_ROWS = 32
WHOLE = "whole"


def document_rule(mean_tokens: int | Auto) -> str:
    """Returns the rule of data with a mean length in tokens; 0, or auto without data: one document per row."""
    return f"lognormal:{mean_tokens}" if mean_tokens and not isinstance(mean_tokens, Auto) else WHOLE


def mean_document(manifest: Manifest) -> int:
    """Returns the mean tokens per document of a dataset's training split, at least 1."""
    shards = manifest.splits["train"]
    return max(1, round(sum(shard.tokens for shard in shards) / max(1, sum(shard.documents for shard in shards))))


def typical_row(
    model: ModelConfig,
    attention: AttentionConfig,
    row_length: int,
    vocab_size: int,
    rule: str = WHOLE,
    padding_document: int = 0,
) -> RowFlops:
    """Returns the mean operations of a row.

    Args:
        model: the shape of the model.
        attention: the method and its constants.
        row_length: tokens per row.
        vocab_size: without padding.
        rule: of the documents' lengths.
        padding_document: longest document of padding, in tokens, under data.packing=best_fit; 0: documents flow over rows.
    """
    if rule == WHOLE:
        return row_flops(model, attention, [row_length], vocab_size)
    if padding_document:
        pieces, padding = packed_lengths(rule, row_length, padding_document)
        lengths = pieces + padding
    else:
        lengths = document_lengths(rule, row_length)
    num_rows = sum(lengths) // row_length
    total = row_flops(model, attention, lengths, vocab_size)
    same = ("full_ratio", "share_if_full", "share_if_sparse", "one_document")  # of a row and of many
    means = {f.name: getattr(total, f.name) / num_rows for f in fields(RowFlops) if f.name not in same}
    return replace(total, **means)


@lru_cache(maxsize=32)
def document_lengths(rule: str, row_length: int) -> tuple[int, ...]:
    """Returns the lengths of the documents of many whole rows, cut at the rows' ends.

    Raises:
        ValueError: there is no such rule.
    """
    if rule.startswith("cut:"):
        return tuple(_cut(int(rule.partition(":")[2]), row_length, random.Random(0)))
    lengths = _whole_lengths(rule)
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


@lru_cache(maxsize=32)
def packed_lengths(rule: str, row_length: int, padding_document: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the lengths of the documents of many rows that are packed by best fit, and those of the padding that fills the rows.

    Raises:
        ValueError: there is no such rule.
    """
    if rule.startswith("cut:"):
        return document_lengths(rule, row_length), ()
    whole = _whole_lengths(rule)
    whole *= -(-NUM_ROWS * row_length // sum(whole))  # the last row, which stays half empty, must not count for much
    pieces = [min(row_length, length - place) for length in whole for place in range(0, length, row_length)]
    rows = best_fit(np.array(pieces), row_length)
    room = row_length - np.bincount(rows, weights=pieces).astype(int)
    padding = Counter()
    for tokens in room.tolist():
        padding[padding_document] += tokens // padding_document
        padding[tokens % padding_document] += 1
    del padding[0]
    return tuple(pieces), tuple(padding.elements())


def _whole_lengths(rule: str) -> list[int]:
    """Returns the lengths of documents that nothing cuts; the errors are those of `document_lengths`."""
    name, _, number = rule.partition(":")
    drawn = {"lognormal": _lognormal, "geometric": _geometric}.get(name)
    if drawn is None or not number.isdecimal() or int(number) < 1:
        raise ValueError(
            f"documents={rule} must be whole, lognormal:MEAN, geometric:MEAN or cut:NUMBER; try lognormal:960"
        )
    lengths = [max(1, round(drawn(int(number), (i + 0.5) / NUM_DOCUMENTS))) for i in range(NUM_DOCUMENTS)]
    random.Random(0).shuffle(lengths)
    return lengths


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
