"""Texts into ids under an explicit policy.

Peers disagree in silence on two things, so both are settings here: whether a document begins with BOS, and what happens to the
name of a special token that occurs in a text ("<|end_of_text|>" in a tutorial about tokenizers). By default it is text: only
this module ends documents.

The backend is Hugging Face's `tokenizers` (`encode_batch_fast`, which skips offsets). Parallelism is left to the worker
processes: one thread each.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

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


class Encoder:
    """Encodes batches of documents; holds the loaded tokenizer of one process."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.dtype = token_dtype(vocabulary.vocab_size)
        self._tokenizer = Tokenizer.from_file(str(Path(vocabulary.path)))
        # A file may carry the limits of the model that it was made for; a corpus must be neither cut nor padded.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = vocabulary.specials_as_text
        self._prefix = [vocabulary.bos_id] if vocabulary.add_bos else []
        self._suffix = [vocabulary.eos_id] if vocabulary.append_eos else []

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Returns one array of ids a text, BOS and EOS included, in the dtype of the .bin file.

        Raises:
            OverflowError: the tokenizer gave an id outside its vocabulary, which the .bin file could not hold.
        """
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        arrays = []
        for encoding in encodings:
            ids = np.array(self._prefix + encoding.ids + self._suffix, dtype=np.int64)
            if ids.size and (ids.max() >= self.vocabulary.vocab_size or ids.min() < 0):
                raise OverflowError(f"id {ids.max()} is outside the vocabulary of {self.vocabulary.vocab_size}")
            arrays.append(ids.astype(self.dtype))
        return arrays
