"""Encodes texts under an explicit policy.

Other tools silently disagree on two things, so both are settings here. One is whether a document begins with BOS. The
other is what happens to the name of a special token in a text ("<|end_of_text|>" in a tutorial about tokenizers). By
default it is text: only this module ends documents.

A third setting is packing. With `megatron` a document is one sequence of any length, and training cuts the concatenated
sequences into rows. With `official_row` documents are cut here, as in SSA's published code: into sequences of at most a
row, each with its own EOS. So a long document has EOS inside, and training pads each sequence to a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.tokenizer.backends import Backend, Encoded, open_backend, split_ids
from ssa_pretrain.data.indexed_format import token_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """A tokenizer.json and the ids that the policy needs, as plain data that can be sent to workers."""

    path: str  # the tokenizer.json
    sha256: str
    name: str
    vocab_size: int
    eos_id: int
    bos_id: int | None
    add_bos: bool
    append_eos: bool
    specials_as_text: bool
    row_tokens: int = 0  # longest sequence, EOS included; 0: a document is one sequence


class Encoder:
    """Encodes batches of documents with the loaded tokenizer of one process.

    Args:
        vocabulary: tokenizer and policy.
        name: of the backend.
        backend: the backend, if it is loaded already.
    """

    def __init__(self, vocabulary: Vocabulary, name: str = "hf", backend: Backend | None = None) -> None:
        self.vocabulary = vocabulary
        self.name = name
        self.dtype = token_dtype(vocabulary.vocab_size)
        self._backend = backend or open_backend(name, vocabulary.path, vocabulary.specials_as_text)
        self._prefix = [vocabulary.bos_id] if vocabulary.add_bos else []
        self._suffix = [vocabulary.eos_id] if vocabulary.append_eos else []

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Returns one array of ids per sequence, BOS and EOS included, in the dtype of the .bin file.

        Raises:
            OverflowError: as `encode_plain`.
        """
        return split_ids(self.sequences(self.encode_plain(texts), range(len(texts))))

    def encode_plain(self, texts: list[str]) -> Encoded:
        """Returns the concatenated ids of all texts, without BOS and EOS, and the number of ids of each.

        Raises:
            OverflowError: the tokenizer returned an id outside its vocabulary, which the .bin file could not hold.
        """
        ids, lengths = self._backend.encode(texts)
        if ids.size and (ids.max() >= self.vocabulary.vocab_size or ids.min() < 0):
            raise OverflowError(f"id {ids.max()} is outside the vocabulary of {self.vocabulary.vocab_size}")
        return ids, lengths

    def sequences(self, encoded: Encoded, chosen: Sequence[int]) -> Encoded:
        """Returns the concatenated sequences of the chosen documents, BOS and EOS included, and the number of tokens of each."""
        ids, lengths = encoded
        ends = np.cumsum(lengths)
        begin, stop = (ends - lengths).tolist(), ends.tolist()
        added = len(self._prefix) + len(self._suffix)
        longest = self.vocabulary.row_tokens - added if self.vocabulary.row_tokens else 0
        ranges = [
            (start, min(start + longest, stop[n]) if longest else stop[n])
            for n in chosen
            for start in (range(begin[n], max(stop[n], begin[n] + 1), longest) if longest else (begin[n],))
        ]
        sizes = np.array([b - a + added for a, b in ranges], dtype=np.int64)
        before, after = ([np.array(added, dtype=self.dtype)] if added else [] for added in (self._prefix, self._suffix))
        pieces = [piece for a, b in ranges for piece in (*before, ids[a:b], *after)]
        # The ids are inside the vocabulary, so the narrower type changes none of them.
        return np.concatenate(pieces, dtype=self.dtype, casting="unsafe") if pieces else np.empty(0, self.dtype), sizes
