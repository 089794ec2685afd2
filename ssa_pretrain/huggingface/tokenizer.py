"""The tokenizer of a dataset as the files that transformers reads: tokenizer.json and tokenizer_config.json.

Special tokens are those that the model has seen in training. data_prep ends each document with EOS and puts BOS before it only if asked to
(`policy.add_bos` in the manifest). A BOS that was never trained is a random embedding in front of every text, so by default the exported tokenizer
has none. Whatever tokenizer.json added by itself, such as Llama's own BOS, is removed: post-processing then adds exactly BOS, or nothing.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from ssa_pretrain.data.manifest import read_manifest
from ssa_pretrain.errors import DataError
from ssa_pretrain.huggingface.settings import SpecialTokens

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"


@dataclass(frozen=True, slots=True)
class TextTokenizer:
    """A tokenizer's file with its sha256, and the ids of its special tokens that the model was trained with."""

    file: Path
    sha256: str
    tokens: SpecialTokens


def dataset_tokenizer(data: Path, add_bos: bool | None) -> TextTokenizer:
    """Returns the tokenizer of a dataset.

    Args:
        data: its folder.
        add_bos: whether BOS goes before every text; None: as in training.

    Raises:
        DataError: the dataset is missing, or its tokenizer has no BOS.
    """
    try:
        manifest = read_manifest(data)
    except ValueError as error:
        raise DataError(
            f"data={data} gives no tokenizer ({error}); name the folder of the dataset, or data=none"
        ) from None
    file, policy, known = manifest.root / manifest.tokenizer.file, manifest.policy, manifest.tokenizer
    if not file.is_file():
        raise DataError(
            f"{file} is missing; name the folder of the dataset with data=DIR, or leave the tokenizer out with data=none"
        )
    with_bos = policy.get("add_bos", False) if add_bos is None else add_bos
    if with_bos and known.bos_id is None:
        raise DataError(f"add_bos=true needs a tokenizer with BOS, and that of {data} has none; leave add_bos out")
    eos = known.eos_id if policy.get("append_eos", True) else None
    return TextTokenizer(file, known.sha256, SpecialTokens(eos=eos, bos=known.bos_id if with_bos else None))


def write_tokenizer(folder: Path, tokenizer: TextTokenizer, longest: int) -> None:
    """Writes the tokenizer's files.

    Args:
        folder: of the export.
        tokenizer: of the dataset.
        longest: tokens of the longest input that the model was trained on.
    """
    loaded = Tokenizer.from_file(str(tokenizer.file))
    bos, eos = (_text(loaded, number) for number in (tokenizer.tokens.bos, tokenizer.tokens.eos))
    record = json.loads(tokenizer.file.read_text(encoding="utf-8"))
    record["post_processor"] = _post_processor(loaded, bos)
    record["truncation"] = record["padding"] = None
    (folder / FILE).write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": longest,
        "add_bos_token": bos is not None,
        "add_eos_token": False,
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": eos,  # masked wherever it pads
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(
        {key: value for key, value in settings.items() if value is not None}, indent=2, ensure_ascii=False
    )
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def _text(tokenizer: Tokenizer, number: int | None) -> str | None:
    """Returns a special token's text."""
    return None if number is None else tokenizer.id_to_token(number)


def _post_processor(tokenizer: Tokenizer, bos: str | None) -> dict[str, Any] | None:
    """Returns the JSON of the step that puts BOS before each text; None without BOS."""
    if bos is None:
        return None
    added = [(bos, tokenizer.token_to_id(bos))]
    tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=added)
    return json.loads(tokenizer.to_str())["post_processor"]
