"""A faster backend is used only if its ids are hf's; otherwise the run logs the reason."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from data_prep.config import BackendChoice, BpeTokenizer, Config
from data_prep.corpus.planning import plan_shards
from data_prep.errors import ConfigurationError, InputError
from data_prep.sources.files import Part
from data_prep.tokenizer import backends
from data_prep.tokenizer.backends import HuggingFaceBackend, choose_backend
from data_prep.tokenizer.encoding import Encoder, Vocabulary
from data_prep.tokenizer.vocabulary import prepare_vocabulary
from support.texts import NASTY

needs_tiktoken = pytest.mark.skipif(backends.find_spec("tiktoken") is None, reason="tiktoken is not installed")
needs_gigatoken = pytest.mark.skipif(backends.find_spec("gigatoken") is None, reason="gigatoken is not installed")


@pytest.fixture
def vocabulary(tmp_path: Path, corpus: Path) -> Vocabulary:
    plan = plan_shards([Part("text", "jsonl", (str(corpus),))], 0)
    return prepare_vocabulary(Config(tokenizer=BpeTokenizer(vocab_size=560)), plan, ["digest"], tmp_path / "work")[0]


def choose(vocabulary: Vocabulary, choice: BackendChoice = BackendChoice.auto, **rejections: str) -> tuple[str, str]:
    name, reason, backend = choose_backend(choice, vocabulary.path, True, rejections)
    assert isinstance(backend, backends.BACKENDS[name])
    return name, reason


@pytest.mark.parametrize(
    "name", [pytest.param("gigatoken", marks=needs_gigatoken), pytest.param("tiktoken", marks=needs_tiktoken)]
)
def test_every_backend_returns_the_same_ids(vocabulary, name):
    one = Encoder(vocabulary, "hf").encode(NASTY)
    other = Encoder(vocabulary, name).encode(NASTY)
    assert [ids.tolist() for ids in one] == [ids.tolist() for ids in other]
    assert {ids.dtype for ids in other} == {np.dtype("uint16")}
    with_bos = replace(vocabulary, add_bos=True)
    assert Encoder(with_bos, name).encode([]) == []
    assert Encoder(with_bos, name).encode(["a"])[0].tolist() == Encoder(with_bos, "hf").encode(["a"])[0].tolist()


@needs_gigatoken
def test_auto_chooses_gigatoken(vocabulary):
    assert choose(vocabulary) == ("gigatoken", "its ids are compared with hf's")
    assert choose(vocabulary, BackendChoice.gigatoken)[0] == "gigatoken"
    assert choose(vocabulary, BackendChoice.hf) == ("hf", "as set")


def test_backends_that_are_not_installed(vocabulary, monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert choose(vocabulary) == (
        "hf",
        "gigatoken is not installed (pip install gigatoken makes it faster); "
        "tiktoken is not installed (pip install tiktoken makes it faster)",
    )
    with pytest.raises(ConfigurationError, match="backend=gigatoken cannot be used: gigatoken is not installed"):
        choose(vocabulary, BackendChoice.gigatoken)


@needs_tiktoken
def test_tiktoken_is_the_second_choice(vocabulary, monkeypatch):
    known = backends.find_spec
    monkeypatch.setattr(backends, "find_spec", lambda name: None if name == "gigatoken" else known(name))
    name, reason = choose(vocabulary)
    assert name == "tiktoken"
    assert (
        reason == "gigatoken is not installed (pip install gigatoken makes it faster); its ids are compared with hf's"
    )
    assert choose(vocabulary, BackendChoice.tiktoken) == ("tiktoken", "its ids are compared with hf's")


def test_added_tokens_are_cut_out_of_any_tokenizer_file(vocabulary):
    content = json.loads(Path(vocabulary.path).read_text())
    assert content["added_tokens"]
    late = dict(reversed(content.items()))  # the list after the model, where it has to be parsed
    for form in (Path(vocabulary.path).read_text(), json.dumps(content), json.dumps(late)):
        assert json.loads(backends.without_added_tokens(form)) == content | {"added_tokens": []}


def test_byte_letters_match_gpt2(vocabulary):
    letters = backends.bytes_to_unicode()
    assert len(set(letters.values())) == 256 and letters[ord("A")] == "A" and letters[ord(" ")] == "Ġ"
    assert set(pre_tokenizers.ByteLevel.alphabet()) == set(letters.values())


@needs_gigatoken
def test_tokenizer_unsupported_by_gigatoken(tmp_path, vocabulary):
    content = json.loads(Path(vocabulary.path).read_text())
    content["model"] = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}
    (tmp_path / "words.json").write_text(json.dumps(content))
    name, reason = choose(replace(vocabulary, path=str(tmp_path / "words.json")))
    assert name == "hf"
    assert re.match(r'gigatoken does not support this tokenizer \(Unsupported model type "WordLevel"', reason)
    assert "; tiktoken does not support this tokenizer (not a byte-level BPE of one pattern: " in reason


@needs_gigatoken
def test_backend_with_a_rejection_is_not_used(vocabulary, monkeypatch):
    monkeypatch.setattr(backends, "FASTEST_FIRST", ("gigatoken",))
    assert choose(vocabulary, gigatoken="gigatoken is wrong") == ("hf", "gigatoken is wrong")
    with pytest.raises(
        ConfigurationError, match="backend=gigatoken cannot be used: gigatoken is wrong; set backend=hf, or auto"
    ):
        choose(vocabulary, BackendChoice.gigatoken, gigatoken="gigatoken is wrong")


def test_damaged_tokenizer_file_is_named_by_every_backend(vocabulary, tmp_path):
    path = tmp_path / "cut.json"
    path.write_text(Path(vocabulary.path).read_text()[:-50])
    with pytest.raises(InputError, match=r"cut.json is not a tokenizer.json \(.*\); fetch it again"):
        choose_backend(BackendChoice.auto, str(path), True, {})


def test_hf_encodes_names_of_special_tokens_as_text_or_as_ids(vocabulary):
    text = ["x <|end_of_text|> y"]
    assert vocabulary.eos_id not in HuggingFaceBackend(vocabulary.path, True).encode(text)[0]
    assert vocabulary.eos_id in HuggingFaceBackend(vocabulary.path, False).encode(text)[0]
