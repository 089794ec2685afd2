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

from data_prep.tokenizer.backends import Backend, BackendMismatch, Encoded, HuggingFaceBackend, open_backend, split_ids
from ssa_pretrain.data.indexed_format import token_dtype

CHECKED_CHARACTERS = 8_000  # longest document that is encoded a second time for comparison


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
        name: of the backend; the ids of any but "hf" are compared with hf's once a batch.
        backend: the backend itself, where it is loaded already.
        exact: the Hugging Face backend, where it is loaded already.
    """

    def __init__(
        self, vocabulary: Vocabulary, name: str = "hf", backend: Backend | None = None, exact: Backend | None = None
    ) -> None:
        self.vocabulary = vocabulary
        self.name = name
        self.dtype = token_dtype(vocabulary.vocab_size)
        self._backend = backend or open_backend(name, vocabulary.path, vocabulary.specials_as_text)
        self._exact = None
        if name != "hf":
            self._exact = exact or HuggingFaceBackend(vocabulary.path, vocabulary.specials_as_text)
        self._prefix = [vocabulary.bos_id] if vocabulary.add_bos else []
        self._suffix = [vocabulary.eos_id] if vocabulary.append_eos else []

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Returns one array of ids a sequence, BOS and EOS included, in the dtype of the .bin file.

        Raises:
            OverflowError, BackendMismatch: as `encode_plain`.
        """
        return split_ids(self.sequences(self.encode_plain(texts), range(len(texts))))

    def encode_plain(self, texts: list[str]) -> Encoded:
        """Returns the ids of all texts end to end, without BOS or EOS, and how many each has.

        Raises:
            OverflowError: the tokenizer gave an id outside its vocabulary, which the .bin file could not hold.
            BackendMismatch: the faster backend gave other ids than the exact one.
        """
        ids, lengths = self._backend.encode(texts)
        self._compare(texts, ids, lengths)
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
        whole = np.empty(int(sizes.sum()), dtype=self.dtype)
        at = 0
        for a, b in parts:
            after = at + len(self._prefix) + b - a
            whole[at : at + len(self._prefix)] = self._prefix
            whole[at + len(self._prefix) : after] = ids[a:b]
            at = after + len(self._suffix)
        if self._suffix:
            whole[np.cumsum(sizes) - 1] = self._suffix[0]
        return whole, sizes

    def _compare(self, texts: list[str], ids: np.ndarray, lengths: np.ndarray) -> None:
        if self._exact is None:
            return
        for number, text in enumerate(texts):
            if len(text) <= CHECKED_CHARACTERS:
                start = int(lengths[:number].sum())
                if not np.array_equal(self._exact.encode([text])[0], ids[start : start + int(lengths[number])]):
                    raise BackendMismatch(
                        f"{self.name} and hf give different ids for a document that begins {text[:40]!r}"
                    )
                return
