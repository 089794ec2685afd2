"""Texts into ids under an explicit policy.

Peers disagree in silence on two things, so both are settings here: whether a document begins with BOS, and what happens to the
name of a special token that occurs in a text ("<|end_of_text|>" in a tutorial about tokenizers). By default it is text: only
this module ends documents.

A third is packing. As `megatron` a document is one sequence, however long, and training cuts the stream of them into rows. As
`official_row` it is cut here, the way SSA's published code does it: into sequences of at most a row, each with an EOS of its own
(so a long document has EOS inside), and training pads each to a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.tokenizer.backends import Backend, Encoded, open_backend, split_ids
from ssa_pretrain.data.indexed_format import token_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """A tokenizer.json and the ids that the policy needs; plain data, so that it can be sent to workers."""

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
    """Encodes batches of documents; holds the loaded tokenizer of one process.

    Args:
        vocabulary: tokenizer and policy.
        name: of the backend.
        backend: the backend itself, where it is loaded already.
    """

    def __init__(self, vocabulary: Vocabulary, name: str = "hf", backend: Backend | None = None) -> None:
        self.vocabulary = vocabulary
        self.name = name
        self.dtype = token_dtype(vocabulary.vocab_size)
        self._backend = backend or open_backend(name, vocabulary.path, vocabulary.specials_as_text)
        self._prefix = [vocabulary.bos_id] if vocabulary.add_bos else []
        self._suffix = [vocabulary.eos_id] if vocabulary.append_eos else []

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Returns one array of ids a sequence, BOS and EOS included, in the dtype of the .bin file.

        Raises:
            OverflowError: as `encode_plain`.
        """
        return split_ids(self.sequences(self.encode_plain(texts), range(len(texts))))

    def encode_plain(self, texts: list[str]) -> Encoded:
        """Returns the ids of all texts end to end, without BOS or EOS, and how many each has.

        Raises:
            OverflowError: the tokenizer gave an id outside its vocabulary, which the .bin file could not hold.
        """
        ids, lengths = self._backend.encode(texts)
        if ids.size and (ids.max() >= self.vocabulary.vocab_size or ids.min() < 0):
            raise OverflowError(f"id {ids.max()} is outside the vocabulary of {self.vocabulary.vocab_size}")
        return ids, lengths

    def sequences(self, encoded: Encoded, chosen: Sequence[int]) -> Encoded:
        """Returns the sequences of the chosen documents end to end, BOS and EOS included, and the tokens of each."""
        ids, lengths = encoded
        ends = np.cumsum(lengths)
        begin, stop = (ends - lengths).tolist(), ends.tolist()
        added = len(self._prefix) + len(self._suffix)
        most = self.vocabulary.row_tokens - added if self.vocabulary.row_tokens else 0
        parts = [
            (start, min(start + most, stop[n]) if most else stop[n])
            for n in chosen
            for start in (range(begin[n], max(stop[n], begin[n] + 1), most) if most else (begin[n],))
        ]
        sizes = np.array([b - a + added for a, b in parts], dtype=np.int64)
        before, after = ([np.array(added, dtype=self.dtype)] if added else [] for added in (self._prefix, self._suffix))
        pieces = [piece for a, b in parts for piece in (*before, ids[a:b], *after)]
        # The ids are inside the vocabulary, so none is changed by the narrower type.
        return np.concatenate(pieces, dtype=self.dtype, casting="unsafe") if pieces else np.empty(0, self.dtype), sizes
