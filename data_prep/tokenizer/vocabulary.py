"""The tokenizer of a run: trains, converts or finds its tokenizer.json, checks it, and looks up the ids that the policy needs."""

import hashlib
from pathlib import Path

from data_prep.config import BpeTokenizer, Config, Llama3Tokenizer, Specials
from data_prep.corpus.planning import Shard
from data_prep.errors import InputError
from data_prep.files import digest, read_json, write_json
from data_prep.recipe import known_dataset, recipe_of
from data_prep.run_config import Packing
from data_prep.tokenizer import bpe, llama3
from data_prep.tokenizer.backends import HuggingFaceBackend, load_tokenizer
from data_prep.tokenizer.encoding import Vocabulary
from ssa_pretrain.data.manifest import read_manifest
from ssa_pretrain.data.repair import DatasetError
from ssa_pretrain.settings.files import file_sha256, write_atomically


def prepare_vocabulary(
    config: Config, shards: list[Shard], inputs: list[str], work: Path
) -> tuple[Vocabulary, HuggingFaceBackend | None]:
    """Returns the vocabulary of a run, and its tokenizer if it had to be loaded. Trains or converts the tokenizer if necessary.

    Llama 3's tokenizer is not loaded: that takes a second, and its content is known.

    Args:
        config: the run's settings.
        shards: the plan; a BPE is trained on its train documents.
        inputs: input digests of the shards.
        work: folder for a trained tokenizer.

    Raises:
        InputError: there is no tokenizer, or it lacks a token that the policy needs.
    """
    choice = config.tokenizer
    if isinstance(choice, BpeTokenizer):
        path, name = _train_or_reuse(choice, config, shards, inputs, work), f"bpe{choice.vocab_size}"
        return _load_vocabulary(config, path, name, bpe.EOS, bpe.BOS)
    if isinstance(choice, Llama3Tokenizer):
        path = llama3.llama3_json(choice.path, Path(config.cache))
        size, first = llama3.NUM_RANKS + llama3.NUM_SPECIALS, llama3.NUM_RANKS
        ids = {token: first + number for number, token in llama3.NAMED_SPECIALS.items()}
        return _vocabulary(config, path, "llama3", size, ids[llama3.EOS], ids[llama3.BOS]), None
    path = Path(choice.path).expanduser()
    return _load_vocabulary(config, path, path.parent.name or path.stem, choice.eos_token, choice.bos_token)


def _train_or_reuse(choice: BpeTokenizer, config: Config, shards: list[Shard], inputs: list[str], work: Path) -> Path:
    path, record = work / "tokenizer.json", work / "tokenizer.key.json"
    key = bpe.training_key(choice, config.split, inputs)
    known = read_json(record)
    if isinstance(known, dict) and known.get("key") == key and path.is_file() and file_sha256(path) == known["sha256"]:
        return path
    content = _dataset_tokenizer(config, inputs, work.parent)
    if content is None:
        content = bpe.train_bpe(choice, config.split, shards).encode()
    record.unlink(missing_ok=True)
    write_atomically(path, content)
    write_json(record, {"key": key, "sha256": file_sha256(path)})
    return path


def _dataset_tokenizer(config: Config, inputs: list[str], out: Path) -> bytes | None:
    """Returns the tokenizer of the dataset in `out` if the same settings trained it on the same text.

    Another release of `tokenizers` may train a different one.
    """
    known = known_dataset(out)
    if known is None or known.recipe is None or known.inputs != digest(inputs):
        return None
    requested = recipe_of(config, out)
    if any(requested.settings[section] != known.recipe.settings[section] for section in ("tokenizer", "split")):
        return None
    try:
        tokenizer = read_manifest(out).tokenizer
        content = (out / tokenizer.file).read_bytes()
    except (DatasetError, OSError):
        return None
    return content if hashlib.sha256(content).hexdigest() == tokenizer.sha256 else None


def _load_vocabulary(
    config: Config, path: Path, name: str, eos: str, bos: str | None
) -> tuple[Vocabulary, HuggingFaceBackend]:
    tokenizer = load_tokenizer(path)
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    added = tokenizer.get_added_tokens_decoder().values()
    known = ", ".join([token.content for token in added if token.special][:8]) or "none"
    for key, token in (("eos", eos), ("bos", bos)):
        if token is not None and token not in vocab:
            raise InputError(
                f"{path} has no token {token!r}; set tokenizer.{key}_token to one that it has (its special tokens: {known})"
            )
    if eos not in {token.content for token in added}:
        raise InputError(
            f"{path}: {eos!r} is an ordinary token, which may occur in a text and would end the document there; set tokenizer.eos_token to a special "
            f"one (it has {known})"
        )
    vocabulary = _vocabulary(
        config, path, name, max(vocab.values()) + 1, vocab[eos], vocab[bos] if bos is not None else None
    )
    return vocabulary, HuggingFaceBackend(str(path), vocabulary.specials_as_text, tokenizer)


def _vocabulary(config: Config, path: Path, name: str, size: int, eos_id: int, bos_id: int | None) -> Vocabulary:
    return Vocabulary(
        path=str(path),
        sha256=file_sha256(path),
        name=name,
        vocab_size=size,
        eos_id=eos_id,
        bos_id=bos_id,
        add_bos=config.policy.add_bos,
        append_eos=config.policy.append_eos,
        specials_as_text=config.policy.specials is Specials.text,
        row_tokens=config.packing.row_tokens if config.packing.kind is Packing.official_row else 0,
    )
