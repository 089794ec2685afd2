"""The words and bytes of the tokens that a perplexity is over, counted in the text that the dataset's tokenizer decodes.

A perplexity per word, or per byte, is exp(summed cross entropy / words, or bytes). Unlike the perplexity per token it does not depend on the
tokenizer, so models with different ones can be compared. A word is a run of characters other than white space, as in lm_eval's word_perplexity;
bytes are those of the text in UTF-8.

The tokens counted are the labels: not the first of a document, which nothing predicts, and not what marks a document's end, which has no text. A
piece of a document counts what its labels add to its first token's text. So a word or a character that a row's end cuts counts once, where it
begins. A character cut between bytes is decoded as U+FFFD on both sides: up to 3 bytes too many per row.
"""

import math
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from ssa_pretrain.data.rows import HeldOutRows, Row
from ssa_pretrain.engine import EvaluationResult


@dataclass(frozen=True, slots=True)
class TextSize:
    """Words and UTF-8 bytes of a text."""

    words: int
    bytes: int


def text_size(rows: HeldOutRows, tokenizer: Tokenizer, *, isolate_documents: bool) -> TextSize:
    """Returns the size of the labels' text of all rows.

    Args:
        rows: the rows.
        tokenizer: decodes them.
        isolate_documents: as in training; False: the first token of a document is also a label, unless it begins a row.
    """
    words = num_bytes = 0
    for i in range(rows.num_rows):
        pieces = row_pieces(rows.row(i), isolate_documents=isolate_documents)
        texts = tokenizer.decode_batch([piece for piece in pieces for piece in (piece, piece[:1])])
        for whole, first in zip(texts[::2], texts[1::2], strict=True):
            words += len(whole.split()) - len(first.split())
            num_bytes += len(whole.encode()) - len(first.encode())
    return TextSize(words, num_bytes)


def row_pieces(row: Row, *, isolate_documents: bool) -> list[list[int]]:
    """Returns the parts of a row within which every token after the first is a label: its documents, or itself, without padding."""
    tokens = row.tokens[: len(row.tokens) - row.padding]
    starts = row.starts[: len(tokens)].copy() if isolate_documents else np.zeros(len(tokens), dtype=bool)
    starts[:1] = False
    return [piece.tolist() for piece in np.split(tokens, np.flatnonzero(starts)) if len(piece)]


def perplexities(result: EvaluationResult, size: TextSize) -> dict[str, float | int | None]:
    """Returns the perplexities per token, word and byte, bits per byte, and the counts behind them; None without words or bytes."""
    total = result.cross_entropy * result.num_labels

    def per(count: int) -> float | None:
        return math.exp(min(700.0, total / count)) if count and math.isfinite(total) else None

    return {
        "perplexity": per(result.num_labels),
        "word_perplexity": per(size.words),
        "byte_perplexity": per(size.bytes),
        "bits_per_byte": total / size.bytes / math.log(2) if size.bytes else None,
        "num_words": size.words,
        "num_bytes": size.bytes,
    }
