"""The programs that turn text into ids: Hugging Face's `tokenizers`, which defines the result, and two that are faster.

gigatoken 0.10.0 (MIT) reads the same tokenizer.json and encodes byte-level BPEs some twenty times as fast; tiktoken (MIT) some four
times, given the ranks and the word pattern of that file. Neither is trusted: data_prep/tokenizer/parity.py compares their ids with those of
`tokenizers` on documents from all over the corpus and on one of every batch, and nothing is committed before. So the bytes of a
dataset do not depend on the backend, and neither does a fingerprint.

All run on the calling thread; parallelism is left to the worker processes.
"""

import json
import os
from array import array
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from data_prep.config import BackendChoice
from data_prep.errors import ConfigurationError, InputError

FASTEST_FIRST = ("gigatoken", "tiktoken")

# Characters of a call of `tokenizers`, which makes some thirty bytes of objects for each: the processor's cache holds those of this many, not those
# of a megabyte, which take a fifth longer.
GROUP_CHARACTERS = 125_000

Encoded = tuple[np.ndarray, np.ndarray]  # ids of all texts end to end, and how many each has (int64)


class UnsupportedTokenizer(Exception):
    """A backend cannot use this tokenizer; says why."""


class Backend(Protocol):
    """Encodes batches of texts, special tokens neither added nor, if the policy says so, recognised."""

    def encode(self, texts: list[str]) -> Encoded:
        """Returns the ids of all texts end to end, and how many each has."""
        ...


class HuggingFaceBackend:
    """`tokenizers`, by the call that skips offsets; InputError if the file is no tokenizer.json."""

    def __init__(self, path: str, specials_as_text: bool, loaded: Tokenizer | None = None) -> None:
        self.tokenizer = loaded or load_tokenizer(Path(path))
        # A file may carry the limits of the model that it was made for; a corpus must be neither cut nor padded.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = specials_as_text

    def encode(self, texts: list[str]) -> Encoded:
        """Returns the ids of all texts end to end, and how many each has."""
        batches = (self.tokenizer.encode_batch_fast(group, add_special_tokens=False) for group in _groups(texts))
        return _joined(encoding.ids for batch in batches for encoding in batch)


class GigatokenBackend:
    """gigatoken; UnsupportedTokenizer if it does not know the kind of tokenizer."""

    def __init__(self, path: str, specials_as_text: bool) -> None:
        import gigatoken

        content = Path(path).read_text(encoding="utf-8")
        if specials_as_text:
            content = without_added_tokens(content)  # it cannot recognise what it does not know
        try:
            self._tokenizer = gigatoken.Tokenizer.from_json(content)
        except RuntimeError as error:
            raise UnsupportedTokenizer(str(error).splitlines()[0]) from None

    def encode(self, texts: list[str]) -> Encoded:
        """Returns the ids of all texts end to end, and how many each has."""
        if not texts:
            return _joined([])
        # One by one: its call for a batch takes a fifth longer and imports awkward, which takes half a second.
        documents = [self._tokenizer.encode(text) for text in texts]
        return np.concatenate(documents), np.array([len(ids) for ids in documents], dtype=np.int64)


class TiktokenBackend:
    """tiktoken, given the vocabulary as ranks; UnsupportedTokenizer unless the file is a byte-level BPE with one word pattern."""

    def __init__(self, path: str, specials_as_text: bool) -> None:
        import tiktoken

        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            spelling = {letter: byte for byte, letter in bytes_to_unicode().items()}
            added = {token["content"]: token["id"] for token in content["added_tokens"]}
            ranks = {
                bytes(spelling[letter] for letter in token): rank
                for token, rank in content["model"]["vocab"].items()
                if token not in added
            }
            if content["model"]["type"] != "BPE" or any(bytes([byte]) not in ranks for byte in range(256)):
                raise ValueError(f"a {content['model']['type']} model without a token for every byte")
            self.encoding = tiktoken.Encoding(
                name=path,
                pat_str=_word_pattern(content["pre_tokenizer"]),
                mergeable_ranks=ranks,
                special_tokens=added,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UnsupportedTokenizer(f"not a byte-level BPE of one pattern: {error}") from None
        self._specials_as_text = specials_as_text

    def encode(self, texts: list[str]) -> Encoded:
        """Returns the ids of all texts end to end, and how many each has."""
        if self._specials_as_text:
            return _joined([self.encoding.encode_ordinary(text) for text in texts])
        return _joined([self.encoding.encode(text, allowed_special="all") for text in texts])


BACKENDS = {"hf": HuggingFaceBackend, "gigatoken": GigatokenBackend, "tiktoken": TiktokenBackend}


def use_one_thread() -> None:
    """Keeps `tokenizers` from starting threads, here and in children: the worker processes are the parallelism.

    It looks at this variable in every call.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def open_backend(name: str, path: str, specials_as_text: bool) -> Backend:
    """Returns the backend of a name that `choose_backend` gave."""
    return BACKENDS[name](path, specials_as_text)


def load_tokenizer(path: Path) -> Tokenizer:
    """Returns what a tokenizer.json describes; InputError if it describes nothing."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"tokenizer.path={path} is no file; name a tokenizer.json") from None
    except UnicodeDecodeError:
        raise InputError(
            f"{path} is not a tokenizer.json (it is not text); for Llama 3's tokenizer.model use tokenizer=llama3"
        ) from None
    try:
        return Tokenizer.from_str(text)
    except Exception as error:
        # The Rust library raises the base class itself, so nothing narrower can be caught; subclasses are not its own.
        if type(error) is not Exception:
            raise
        try:
            json.loads(text)
        except ValueError as clearer:
            error = clearer
        raise InputError(f"{path} is not a tokenizer.json ({error}); fetch it again") from None


def needs_parity_check(asked: BackendChoice) -> bool:
    """Returns whether a setting may lead to a backend whose ids have to be compared."""
    return asked is not BackendChoice.hf and any(find_spec(name) for name in _candidates(asked))


def choose_backend(
    asked: BackendChoice, path: str, specials_as_text: bool, rejections: dict[str, str], exact: Backend | None = None
) -> tuple[str, str, Backend]:
    """Returns the name of the backend to try, the reason for people, and the backend itself, loaded.

    Args:
        asked: the setting.
        path: the tokenizer.json.
        specials_as_text: whether names of special tokens are text.
        rejections: why a backend cannot be used, by name; further ones are added.
        exact: the Hugging Face backend, where it is loaded already.

    Raises:
        ConfigurationError: a backend was asked for and cannot be used.
    """
    if asked is BackendChoice.hf:
        return "hf", "as asked", exact or HuggingFaceBackend(path, specials_as_text)
    for name in _candidates(asked):
        if name not in rejections:
            if find_spec(name) is None:
                rejections[name] = f"{name} is not installed (pip install {name} makes it faster)"
                continue
            try:
                backend = open_backend(name, path, specials_as_text)
            except UnsupportedTokenizer as error:
                rejections[name] = f"{name} does not know this tokenizer ({error})"
                continue
            return name, "; ".join([*rejections.values(), "its ids are compared with hf's"]), backend
    if asked is not BackendChoice.auto:
        raise ConfigurationError(
            f"backend={asked.value} cannot be used: {rejections[asked.value]}; set backend=hf, or auto for the fastest that can"
        )
    return "hf", "; ".join(rejections.values()), exact or HuggingFaceBackend(path, specials_as_text)


def _candidates(asked: BackendChoice) -> tuple[str, ...]:
    return FASTEST_FIRST if asked is BackendChoice.auto else (asked.value,)


def without_added_tokens(content: str) -> str:
    """Returns a tokenizer.json with an empty list of added tokens.

    The list stands at the top of the files that `tokenizers` writes, so it is cut out as text: to parse and write 9 MB takes longer
    than to encode as much.
    """
    head = content.find('"added_tokens"')
    start = content.find("[", head)
    if head >= 0 and '"model"' not in content[:head] and content[head + 14 : start].strip() == ":":
        _, end = json.JSONDecoder().raw_decode(content, start)
        return content[:start] + "[]" + content[end:]
    return json.dumps(json.loads(content) | {"added_tokens": []})


def bytes_to_unicode() -> dict[int, str]:
    """Returns the letter that GPT-2's byte-level alphabet writes for each byte: itself where it can be printed."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def split_ids(encoded: Encoded) -> list[np.ndarray]:
    """Returns one array of ids a text."""
    ids, lengths = encoded
    return np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else []


def _groups(texts: list[str]) -> Iterator[list[str]]:
    """Yields texts in groups of about GROUP_CHARACTERS."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= GROUP_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _joined(documents: Iterable[list[int]]) -> Encoded:
    ids, counts = array("I"), []
    for document in documents:
        ids.fromlist(document)  # takes lists of Python's integers four times as fast as numpy does
        counts.append(len(document))
    return np.frombuffer(ids, dtype=np.uint32), np.array(counts, dtype=np.int64)


def _word_pattern(pre_tokenizer: dict[str, Any]) -> str:
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step["type"] for step in steps]
    if kinds != ["Split", "ByteLevel"] or steps[0]["behavior"] != "Isolated" or steps[1]["use_regex"]:
        raise ValueError(f"words are cut by {'+'.join(kinds)}")
    return steps[0]["pattern"]["Regex"]
