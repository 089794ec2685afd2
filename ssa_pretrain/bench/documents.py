"""Lengths of documents, drawn at random: as in the SmolLM corpus, or with a mean of 1k tokens.

What is known of the SmolLM corpus is the number of documents and tokens of each part, and so the mean lengths: the
dataset card of HuggingFaceTB/smollm-corpus (documents) and the blog post "SmolLM" (tokens of SmolLM's tokenizer). The
parts are mixed as in data_prep/conf/mix/smollm1_corpus.yaml: 960 tokens per document on average. Quantiles are not
published. The lengths of a part are therefore drawn from a lognormal distribution with the part's mean, whose
`log_deviation` is an assumption: 1 for web pages and code, which gives a median of 0.61 of the mean and half of the
tokens in documents of 1.65 times the mean or longer; 0.5 for text that was generated to similar lengths.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

MEAN_DOCUMENT = 1024  # tokens, of Documents.short


class Documents(StrEnum):
    """The documents of a row."""

    whole = "whole"  # one document per row
    short = "short"  # random lengths with a mean of MEAN_DOCUMENT tokens
    real = "real"  # lengths as in the SmolLM corpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of a corpus.

    Attributes:
        weight: its share of the tokens of the mix, up to a factor common to all parts.
        documents: their number.
        tokens: of all documents.
        log_deviation: standard deviation of the logarithm of a document's length.
    """

    weight: float
    documents: float
    tokens: float
    log_deviation: float

    def lengths(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """Returns the lengths of `count` documents in tokens, int64, at least 1; before rounding, their mean is tokens / documents."""
        center = math.log(self.tokens / self.documents) - self.log_deviation**2 / 2
        return np.ceil(generator.lognormal(center, self.log_deviation, count)).astype(np.int64)


SMOLLM_CORPUS = {
    "fineweb-edu-dedup": Part(weight=0.70, documents=190_168_005, tokens=220e9, log_deviation=1.0),
    "cosmopedia-v2": Part(weight=0.15, documents=39_134_000, tokens=28e9, log_deviation=0.5),
    "python-edu": Part(weight=0.08, documents=7_678_448, tokens=4e9, log_deviation=1.0),
}


def document_starts(kind: Documents, generator: np.random.Generator, num_tokens: int) -> np.ndarray:
    """Returns whether each of `num_tokens` tokens begins a document, bool [num_tokens].

    Args:
        kind: the documents. Under `whole` only rows begin documents, so none is marked.
        generator: draws the lengths.
        num_tokens: tokens of all rows; documents follow one another over their borders.
    """
    if kind is Documents.short:
        return generator.random(num_tokens) < 1.0 / MEAN_DOCUMENT
    starts = np.zeros(num_tokens, dtype=bool)
    if kind is Documents.real:
        ends = _corpus_lengths(generator, num_tokens).cumsum()
        starts[ends[ends < num_tokens]] = True
    return starts


def _corpus_lengths(generator: np.random.Generator, num_tokens: int) -> np.ndarray:
    """Returns the lengths of documents of the SmolLM corpus in random order, at least `num_tokens` tokens in all."""
    parts = list(SMOLLM_CORPUS.values())
    shares = np.array([part.weight * part.documents / part.tokens for part in parts])  # of the documents
    found: list[np.ndarray] = []
    while sum(int(lengths.sum()) for lengths in found) < num_tokens:
        counts = generator.multinomial(256, shares / shares.sum())
        lengths = np.concatenate([part.lengths(generator, n) for part, n in zip(parts, counts, strict=True)])
        found.append(generator.permutation(lengths))
    return np.concatenate(found)
