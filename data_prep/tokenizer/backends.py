"""The programs that turn text into ids: Hugging Face's `tokenizers`, which defines the result, and gigatoken, which is faster.

gigatoken 0.10.0 (MIT) reads the same tokenizer.json and encodes byte-level BPEs some twenty times as fast. It is used only where
it gives the same ids: `choose_backend` compares both on documents of the corpus before the run, and each worker compares one
document of every batch during it. So the bytes of a dataset do not depend on the backend, and neither does a fingerprint.

Both run on the calling thread; parallelism is left to the worker processes.
"""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from data_prep.config import BackendChoice
from data_prep.errors import ConfigurationError


class BackendMismatch(Exception):
    """Two backends gave different ids for one text."""


class Backend(Protocol):
    """Encodes batches of texts, special tokens neither added nor, if the policy says so, recognised."""

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Returns one array of ids a text."""
        ...


class HuggingFaceBackend:
    """`tokenizers`, by the call that skips offsets."""

    def __init__(self, path: str, specials_as_text: bool) -> None:
        self._tokenizer = Tokenizer.from_file(path)
        # A file may carry the limits of the model that it was made for; a corpus must be neither cut nor padded.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = specials_as_text

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Returns one array of ids a text, int64."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]


class GigatokenBackend:
    """gigatoken; RuntimeError if it does not know the kind of tokenizer."""

    def __init__(self, path: str, specials_as_text: bool) -> None:
        import gigatoken

        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if specials_as_text:
            content["added_tokens"] = []  # what it does not know it cannot recognise in a text
        self._tokenizer = gigatoken.Tokenizer.from_json(json.dumps(content))

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Returns one array of ids a text, uint32."""
        if not texts:
            return []
        layout: Any = self._tokenizer.encode_batch(texts, parallel=False).layout  # awkward's annotations do not know it
        return np.split(np.asarray(layout.content.data), np.asarray(layout.offsets.data)[1:-1])


def open_backend(name: str, path: str, specials_as_text: bool) -> Backend:
    """Returns the backend of a name that `choose_backend` gave."""
    return (GigatokenBackend if name == "gigatoken" else HuggingFaceBackend)(path, specials_as_text)


def choose_backend(
    asked: BackendChoice, path: str, specials_as_text: bool, sample: Callable[[], list[str]]
) -> tuple[str, str]:
    """Returns the backend to use, "gigatoken" or "hf", and the reason for people.

    Args:
        asked: the setting.
        path: the tokenizer.json.
        specials_as_text: whether names of special tokens are text.
        sample: gives documents of the corpus on which both must agree.

    Raises:
        ConfigurationError: gigatoken was asked for and cannot be used.
    """
    if asked is BackendChoice.hf:
        return "hf", "as asked"
    problem = _objection(path, specials_as_text, sample)
    if problem is None:
        return "gigatoken", "the same ids as hf on a sample"
    if asked is BackendChoice.gigatoken:
        raise ConfigurationError(f"backend=gigatoken cannot be used: {problem}; set backend=hf, or auto")
    return "hf", problem


def _objection(path: str, specials_as_text: bool, sample: Callable[[], list[str]]) -> str | None:
    if find_spec("gigatoken") is None:
        return "gigatoken is not installed (pip install gigatoken makes it faster)"
    try:
        fast = GigatokenBackend(path, specials_as_text)
    except RuntimeError as error:
        return f"gigatoken does not know this tokenizer ({str(error).splitlines()[0]})"
    texts = sample()
    exact = HuggingFaceBackend(path, specials_as_text)
    for text, one, other in zip(texts, fast.encode(texts), exact.encode(texts), strict=True):
        if not np.array_equal(one, other):
            return f"gigatoken gives other ids than hf for a document that begins {text[:40]!r}"
    return None
