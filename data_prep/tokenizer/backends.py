"""The libraries that turn text into ids: Hugging Face's `tokenizers`, which defines the result, and two faster ones.

gigatoken 0.10.0 (MIT) reads the same tokenizer.json and encodes byte-level BPEs about twenty times as fast. tiktoken
(MIT), given the ranks and the word pattern of that file, is about four times as fast. Neither is trusted.
data_prep/tokenizer/parity.py compares their ids with those of `tokenizers` on documents from all over the corpus and on
one document of every batch, and nothing is committed before. So neither the bytes of a dataset nor a fingerprint depend
on the backend.

All backends run on the calling thread. The worker processes are the parallelism.
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

# Characters per call of `tokenizers`, which allocates about thirty bytes of objects per character. The objects of this many characters fit in the
# processor's cache. Those of a megabyte do not, and take a fifth longer.
GROUP_CHARACTERS = 125_000

Encoded = tuple[np.ndarray, np.ndarray]  # concatenated ids of all texts, and the number of ids of each text (int64)


class UnsupportedTokenizer(Exception):
    """A backend cannot use this tokenizer; the message is the reason."""


class Backend(Protocol):
    """Encodes batches of texts. It adds no special tokens and, depending on the policy, recognises none."""

    def encode(self, texts: list[str]) -> Encoded:
        """Returns the concatenated ids of all texts, and the number of ids of each."""
        ...


class HuggingFaceBackend:
    """`tokenizers`, through the call that skips offsets; InputError if the file is not a tokenizer.json."""

    def __init__(self, path: str, specials_as_text: bool, loaded: Tokenizer | None = None) -> None:
        self.tokenizer = loaded or load_tokenizer(Path(path))
        # A file may have the length limits of its model, but a corpus must be neither cut nor padded.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = specials_as_text

    def encode(self, texts: list[str]) -> Encoded:
        """Returns the concatenated ids of all texts, and the number of ids of each."""
        batches = (self.tokenizer.encode_batch_fast(group, add_special_tokens=False) for group in _groups(texts))
        return _concatenated(encoding.ids for batch in batches for encoding in batch)


class GigatokenBackend:
    """gigatoken; UnsupportedTokenizer if it does not support this kind of tokenizer."""

    def __init__(self, path: str, specials_as_text: bool) -> None:
        import gigatoken

        content = Path(path).read_text(encoding="utf-8")
        if specials_as_text:
            content = without_added_tokens(content)  # so that it does not recognise them in a text
        try:
            self._tokenizer = gigatoken.Tokenizer.from_json(content)
        except RuntimeError as error:
            raise UnsupportedTokenizer(str(error).splitlines()[0]) from None

    def encode(self, texts: list[str]) -> Encoded:
        """Returns the concatenated ids of all texts, and the number of ids of each."""
        if not texts:
            return _concatenated([])
        # One by one: the batch call takes a fifth longer and imports awkward, which takes half a second.
        documents = [self._tokenizer.encode(text) for text in texts]
        return np.concatenate(documents), np.array([len(ids) for ids in documents], dtype=np.int64)


class TiktokenBackend:
    """tiktoken, with the vocabulary as ranks; UnsupportedTokenizer unless the file is a byte-level BPE with one word pattern."""

    def __init__(self, path: str, specials_as_text: bool) -> None:
        import tiktoken

        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            to_byte = {letter: byte for byte, letter in bytes_to_unicode().items()}
            added = {token["content"]: token["id"] for token in content["added_tokens"]}
            ranks = {
                bytes(to_byte[letter] for letter in token): rank
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
        """Returns the concatenated ids of all texts, and the number of ids of each."""
        if self._specials_as_text:
            return _concatenated([self.encoding.encode_ordinary(text) for text in texts])
        return _concatenated([self.encoding.encode(text, allowed_special="all") for text in texts])


BACKENDS = {"hf": HuggingFaceBackend, "gigatoken": GigatokenBackend, "tiktoken": TiktokenBackend}


def use_one_thread() -> None:
    """Keeps `tokenizers` from starting threads, in this process and its children.

    The worker processes are the parallelism. `tokenizers` reads this variable in every call.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def open_backend(name: str, path: str, specials_as_text: bool) -> Backend:
    """Returns the backend with a name that `choose_backend` returned."""
    return BACKENDS[name](path, specials_as_text)


def load_tokenizer(path: Path) -> Tokenizer:
    """Returns the tokenizer of a tokenizer.json; InputError if the file is not one."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"tokenizer.path={path} is not a file; name a tokenizer.json") from None
    except UnicodeDecodeError:
        raise InputError(
            f"{path} is not a tokenizer.json (it is not text); for Llama 3's tokenizer.model use tokenizer=llama3"
        ) from None
    try:
        return Tokenizer.from_str(text)
    except Exception as error:
        # The Rust library raises Exception itself, so nothing narrower can be caught. A subclass is not its error.
        if type(error) is not Exception:
            raise
        try:
            json.loads(text)
        except ValueError as clearer:
            error = clearer
        raise InputError(f"{path} is not a tokenizer.json ({error}); fetch it again") from None


def needs_parity_check(choice: BackendChoice) -> bool:
    """Returns whether a setting may choose a backend whose ids have to be compared."""
    return choice is not BackendChoice.hf and any(find_spec(name) for name in _candidates(choice))


def choose_backend(
    choice: BackendChoice,
    path: str,
    specials_as_text: bool,
    rejections: dict[str, str],
    hf_backend: Backend | None = None,
) -> tuple[str, str, Backend]:
    """Returns the name of the backend to try, the reason for the user, and the loaded backend.

    Args:
        choice: the setting.
        path: the tokenizer.json.
        specials_as_text: whether names of special tokens are text.
        rejections: why a backend cannot be used, by name. New ones are added.
        hf_backend: the Hugging Face backend, if it is loaded already.

    Raises:
        ConfigurationError: the requested backend cannot be used.
    """
    if choice is BackendChoice.hf:
        return "hf", "as set", hf_backend or HuggingFaceBackend(path, specials_as_text)
    for name in _candidates(choice):
        if name not in rejections:
            if find_spec(name) is None:
                rejections[name] = f"{name} is not installed (pip install {name} makes it faster)"
                continue
            try:
                backend = open_backend(name, path, specials_as_text)
            except UnsupportedTokenizer as error:
                rejections[name] = f"{name} does not support this tokenizer ({error})"
                continue
            return name, "; ".join([*rejections.values(), "its ids are compared with hf's"]), backend
    if choice is not BackendChoice.auto:
        raise ConfigurationError(
            f"backend={choice.value} cannot be used: {rejections[choice.value]}; set backend=hf, or auto for the fastest that can"
        )
    return "hf", "; ".join(rejections.values()), hf_backend or HuggingFaceBackend(path, specials_as_text)


def _candidates(choice: BackendChoice) -> tuple[str, ...]:
    return FASTEST_FIRST if choice is BackendChoice.auto else (choice.value,)


def without_added_tokens(content: str) -> str:
    """Returns a tokenizer.json with an empty list of added tokens.

    `tokenizers` writes the list at the top of the file, so it is cut out as text. Parsing and writing 9 MB takes longer
    than encoding as much.
    """
    head = content.find('"added_tokens"')
    start = content.find("[", head)
    if head >= 0 and '"model"' not in content[:head] and content[head + 14 : start].strip() == ":":
        _, end = json.JSONDecoder().raw_decode(content, start)
        return content[:start] + "[]" + content[end:]
    return json.dumps(json.loads(content) | {"added_tokens": []})


def bytes_to_unicode() -> dict[int, str]:
    """Returns the character of each byte in GPT-2's byte-level alphabet: itself if it is printable."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def split_ids(encoded: Encoded) -> list[np.ndarray]:
    """Returns one array of ids per text."""
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


def _concatenated(documents: Iterable[list[int]]) -> Encoded:
    ids, counts = array("I"), []
    for document in documents:
        ids.fromlist(document)  # four times as fast as numpy for lists of Python integers
        counts.append(len(document))
    return np.frombuffer(ids, dtype=np.uint32), np.array(counts, dtype=np.int64)


def _word_pattern(pre_tokenizer: dict[str, Any]) -> str:
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step["type"] for step in steps]
    if kinds != ["Split", "ByteLevel"] or steps[0]["behavior"] != "Isolated" or steps[1]["use_regex"]:
        raise ValueError(f"words are cut by {'+'.join(kinds)}")
    return steps[0]["pattern"]["Regex"]
