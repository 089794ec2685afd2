"""Texts into ids under an explicit policy.

Peers disagree in silence on two things, so both are settings here: whether a document begins with BOS, and what happens to the
name of a special token that occurs in a text ("<|end_of_text|>" in a tutorial about tokenizers). By default it is text: only
this module ends documents.
"""

from dataclasses import dataclass

import numpy as np

from data_prep.tokenizer.backends import BackendMismatch, HuggingFaceBackend, open_backend
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


class Encoder:
    """Encodes batches of documents; holds the loaded tokenizer of one process.

    Args:
        vocabulary: tokenizer and policy.
        backend: "hf", or "gigatoken" for the faster one, whose ids are then compared with hf's once a batch.
    """

    def __init__(self, vocabulary: Vocabulary, backend: str = "hf") -> None:
        self.vocabulary = vocabulary
        self.dtype = token_dtype(vocabulary.vocab_size)
        self._backend = open_backend(backend, vocabulary.path, vocabulary.specials_as_text)
        self._exact = HuggingFaceBackend(vocabulary.path, vocabulary.specials_as_text) if backend != "hf" else None
        self._prefix = [vocabulary.bos_id] if vocabulary.add_bos else []
        self._suffix = [vocabulary.eos_id] if vocabulary.append_eos else []

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Returns one array of ids a text, BOS and EOS included, in the dtype of the .bin file.

        Raises:
            OverflowError: the tokenizer gave an id outside its vocabulary, which the .bin file could not hold.
            BackendMismatch: the faster backend gave other ids than the exact one.
        """
        encoded = self._backend.encode(texts)
        self._compare(texts, encoded)
        arrays = []
        for ids in encoded:
            if ids.size and (ids.max() >= self.vocabulary.vocab_size or ids.min() < 0):
                raise OverflowError(f"id {ids.max()} is outside the vocabulary of {self.vocabulary.vocab_size}")
            whole = np.empty(len(self._prefix) + len(ids) + len(self._suffix), dtype=self.dtype)
            whole[: len(self._prefix)] = self._prefix
            whole[len(self._prefix) : len(self._prefix) + len(ids)] = ids
            whole[len(self._prefix) + len(ids) :] = self._suffix
            arrays.append(whole)
        return arrays

    def _compare(self, texts: list[str], encoded: list[np.ndarray]) -> None:
        if self._exact is None:
            return
        for text, ids in zip(texts, encoded, strict=True):
            if len(text) <= CHECKED_CHARACTERS:
                if not np.array_equal(self._exact.encode([text])[0], ids):
                    raise BackendMismatch(
                        f"gigatoken and hf give different ids for a document that begins {text[:40]!r}"
                    )
                return
