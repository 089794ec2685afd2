"""Which tokenizer a run uses: makes or finds its tokenizer.json, checks it, and looks up the ids that the policy needs."""

import json
from pathlib import Path

from tokenizers import Tokenizer

from data_prep.config import BpeTokenizer, Config, Llama3Tokenizer, Specials
from data_prep.errors import InputError
from data_prep.files import read_json, write_atomically, write_json
from data_prep.planning import Shard
from data_prep.run_config import Packing
from data_prep.tokenizer import bpe, llama3
from data_prep.tokenizer.backends import HuggingFaceBackend
from data_prep.tokenizer.encoding import Vocabulary
from ssa_pretrain.data.indexed_format import file_sha256


def prepare_vocabulary(
    config: Config, shards: list[Shard], inputs: list[str], work: Path
) -> tuple[Vocabulary, HuggingFaceBackend]:
    """Returns the vocabulary of a run, and its tokenizer, loaded; trains or converts it unless that has been done.

    Args:
        config: the run's settings.
        shards: the plan; a BPE is trained on its train documents.
        inputs: input digests of the shards.
        work: folder for a trained tokenizer.

    Raises:
        InputError: no tokenizer there, or one without the tokens that the policy needs.
    """
    choice = config.tokenizer
    if isinstance(choice, BpeTokenizer):
        path, name = _trained(choice, config, shards, inputs, work), f"bpe{choice.vocab_size}"
        return _described(config, path, name, bpe.EOS, bpe.BOS)
    if isinstance(choice, Llama3Tokenizer):
        path = llama3.llama3_json(choice.path, Path(config.cache))
        return _described(config, path, "llama3", llama3.EOS, llama3.BOS)
    path = Path(choice.path).expanduser()
    return _described(config, path, path.parent.name or path.stem, choice.eos_token, choice.bos_token)


def _trained(choice: BpeTokenizer, config: Config, shards: list[Shard], inputs: list[str], work: Path) -> Path:
    path, record = work / "tokenizer.json", work / "tokenizer.key.json"
    key = bpe.training_key(choice, config.split, inputs)
    known = read_json(record)
    if isinstance(known, dict) and known.get("key") == key and path.is_file() and file_sha256(path) == known["sha256"]:
        return path
    record.unlink(missing_ok=True)
    write_atomically(path, bpe.train_bpe(choice, config.split, shards).encode())
    write_json(record, {"key": key, "sha256": file_sha256(path)})
    return path


def _described(
    config: Config, path: Path, name: str, eos: str, bos: str | None
) -> tuple[Vocabulary, HuggingFaceBackend]:
    tokenizer = _load(path)
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    for key, token in (("eos", eos), ("bos", bos)):
        if token is not None and token not in vocab:
            specials = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
            known = ", ".join(specials[:8]) or "none"
            raise InputError(
                f"{path} has no token {token!r}; set tokenizer.{key}_token to one that it has (its special tokens: {known})"
            )
    specials_as_text = config.policy.specials is Specials.text
    vocabulary = Vocabulary(
        path=str(path),
        sha256=file_sha256(path),
        name=name,
        vocab_size=max(vocab.values()) + 1,
        eos_id=vocab[eos],
        bos_id=vocab[bos] if bos is not None else None,
        add_bos=config.policy.add_bos,
        append_eos=config.policy.append_eos,
        specials_as_text=specials_as_text,
        row_tokens=config.packing.row_tokens if config.packing.kind is Packing.official_row else 0,
    )
    return vocabulary, HuggingFaceBackend(str(path), specials_as_text, tokenizer)


def _load(path: Path) -> Tokenizer:
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
