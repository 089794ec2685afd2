"""Llama 3's tokenizer as a Hugging Face tokenizer.json, converted from the file that Meta's llama-models package ships.

`tokenizer.model` has a line `base64(token) rank` for each of 128,000 tokens and no merges. A byte-pair encoder needs
merges. Every split of a token into two tokens is a merge. Merges are ordered by the rank of the token that they form,
and by the ranks of their halves if a token can be formed in several ways. This gives the 280,147 merges of the
published tokenizer.json.

`ignore_merges=True` is needed for equality with tiktoken: a word that is itself a token becomes that token, even if the
merges do not lead to it ("Abdomen" and about a hundred others). 256 special tokens follow from id 128,000.

The file itself stays where it is (Llama 3 Community License). Only the converted JSON is cached, under the sha256 of
the original. Checked against tiktoken on whole documents in tests/integration/test_data_prep_llama3.py.
"""

import base64
import hashlib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models

from data_prep.errors import InputError
from data_prep.files import write_atomically
from data_prep.tokenizer.backends import bytes_to_unicode
from data_prep.tokenizer.bpe import byte_level

PACKAGE = "llama-models"
FILE = "llama_models/llama3/tokenizer.model"
KNOWN_SHA256 = "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"
NUM_RANKS = 128_000
NUM_SPECIALS = 256
BOS = "<|begin_of_text|>"
EOS = "<|end_of_text|>"

# Ids are the same in every release of the family. The names of the reserved ones differ, and no text relies on them.
NAMED_SPECIALS = {
    0: BOS,
    1: EOS,
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}


def llama3_json(path: str | None, cache: Path) -> Path:
    """Returns the path of the converted tokenizer.json, converting it if the cache has none.

    Args:
        path: a tokenizer.model, or None for the one of the installed package llama-models.
        cache: folder for converted tokenizers.

    Raises:
        InputError: the file does not exist, or is not Llama 3's.
    """
    model = Path(path).expanduser() if path else _packaged_model()
    if not model.is_file():
        raise InputError(f"tokenizer.path={model} does not exist; name a tokenizer.model of Llama 3")
    raw = model.read_bytes()
    sha256 = hashlib.sha256(raw).hexdigest()
    if sha256 != KNOWN_SHA256:
        raise InputError(
            f"{model} is not Llama 3's tokenizer.model (sha256 {sha256[:12]}…, expected {KNOWN_SHA256[:12]}…); "
            f"install {PACKAGE}==0.3.0, or use tokenizer=file with a tokenizer.json"
        )
    converted = cache / f"llama3-{sha256[:16]}.tokenizer.json"
    if not converted.is_file():
        write_atomically(converted, _convert(raw).encode())
    return converted


def _packaged_model() -> Path:
    try:
        return Path(str(distribution(PACKAGE).locate_file(FILE)))
    except PackageNotFoundError:
        raise InputError(
            f"tokenizer=llama3 needs the package {PACKAGE}; install it with `pip install --no-deps {PACKAGE}==0.3.0`, "
            "or give tokenizer.path=…/tokenizer.model"
        ) from None


def _convert(raw: bytes) -> str:
    ranks = {}
    for line in raw.splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    letters = bytes_to_unicode()
    vocab = {_to_letters(token, letters): rank for token, rank in ranks.items()}
    merges = [(_to_letters(left, letters), _to_letters(right, letters)) for left, right in _merges(ranks)]
    tokenizer = byte_level(Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False, ignore_merges=True)))
    tokenizer.add_special_tokens([AddedToken(_special(n), normalized=False, special=True) for n in range(NUM_SPECIALS)])
    return tokenizer.to_str()


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    found = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = ranks.get(token[:cut]), ranks.get(token[cut:])
            if left is not None and right is not None:
                found.append((rank, left, right, token, cut))
    found.sort(key=lambda merge: merge[:3])
    return [(token[:cut], token[cut:]) for _, _, _, token, cut in found]


def _special(number: int) -> str:
    return NAMED_SPECIALS.get(number, f"<|reserved_special_token_{number}|>")


def _to_letters(token: bytes, letters: dict[int, str]) -> str:
    return "".join(letters[byte] for byte in token)
