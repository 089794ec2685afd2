"""gigatoken gives hf's ids or is not used, and says why; a difference during the run is found."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep.config import BackendChoice, BpeTokenizer, Config
from data_prep.errors import ConfigurationError
from data_prep.planning import Subset, plan_shards
from data_prep.tokenizer import backends
from data_prep.tokenizer.backends import BackendMismatch, GigatokenBackend, HuggingFaceBackend, choose_backend
from data_prep.tokenizer.encoding import Encoder, Vocabulary
from data_prep.tokenizer.vocabulary import prepare_vocabulary

NASTY = [
    "",
    " ",
    "a\r\nb\n\n\n  c",
    "\x00\x01\x7f",
    "🙂👩‍👩‍👧 漢字 ไทย",
    "a" * 5000,
    "x <|end_of_text|> y",
    "  leading",
    "1234567",
]

needs_gigatoken = pytest.mark.skipif(backends.find_spec("gigatoken") is None, reason="gigatoken is not installed")


@pytest.fixture
def vocabulary(tmp_path: Path, corpus: Path) -> Vocabulary:
    plan = plan_shards([Subset("text", "jsonl", (str(corpus),))], 0)
    return prepare_vocabulary(Config(tokenizer=BpeTokenizer(vocab_size=560)), plan, ["digest"], tmp_path / "work")


def choose(vocabulary: Vocabulary, asked: BackendChoice = BackendChoice.auto, texts=NASTY) -> tuple[str, str]:
    return choose_backend(asked, vocabulary.path, True, lambda: list(texts))


@needs_gigatoken
def test_both_backends_give_the_same_ids(vocabulary):
    one = Encoder(vocabulary, "hf").encode(NASTY)
    other = Encoder(vocabulary, "gigatoken").encode(NASTY)
    assert [ids.tolist() for ids in one] == [ids.tolist() for ids in other]
    assert {ids.dtype for ids in other} == {np.dtype("uint16")}
    with_bos = replace(vocabulary, add_bos=True)
    assert Encoder(with_bos, "gigatoken").encode([]) == []
    assert Encoder(with_bos, "gigatoken").encode(["a"])[0].tolist() == Encoder(with_bos, "hf").encode(["a"])[0].tolist()


@needs_gigatoken
def test_auto_takes_gigatoken_where_it_agrees(vocabulary):
    assert choose(vocabulary) == ("gigatoken", "the same ids as hf on a sample")
    assert choose(vocabulary, BackendChoice.gigatoken)[0] == "gigatoken"
    assert choose(vocabulary, BackendChoice.hf) == ("hf", "as asked")


def test_gigatoken_that_is_not_installed(vocabulary, monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert choose(vocabulary) == ("hf", "gigatoken is not installed (pip install gigatoken makes it faster)")
    with pytest.raises(ConfigurationError, match="backend=gigatoken cannot be used: gigatoken is not installed"):
        choose(vocabulary, BackendChoice.gigatoken)


@needs_gigatoken
def test_tokenizer_that_gigatoken_does_not_know(tmp_path, vocabulary):
    content = json.loads(Path(vocabulary.path).read_text())
    content["model"] = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}
    (tmp_path / "words.json").write_text(json.dumps(content))
    name, reason = choose(replace(vocabulary, path=str(tmp_path / "words.json")))
    assert name == "hf"
    assert re.match(r'gigatoken does not know this tokenizer \(Unsupported model type "WordLevel"', reason)


def wrong_for_emoji(monkeypatch) -> None:
    honest = GigatokenBackend.encode
    monkeypatch.setattr(
        GigatokenBackend,
        "encode",
        lambda self, texts: [ids[:-1] if "🙂" in t else ids for t, ids in zip(texts, honest(self, texts), strict=True)],
    )


@needs_gigatoken
def test_backend_that_differs_on_the_sample_is_not_used(vocabulary, monkeypatch):
    wrong_for_emoji(monkeypatch)
    assert choose(vocabulary, texts=NASTY[:3])[0] == "gigatoken"
    name, reason = choose(vocabulary)
    assert name == "hf"
    assert reason == f"gigatoken gives other ids than hf for a document that begins {NASTY[4]!r}"
    with pytest.raises(
        ConfigurationError, match=r"gives other ids than hf for a document that begins .*; set backend=hf, or auto"
    ):
        choose(vocabulary, BackendChoice.gigatoken)


@needs_gigatoken
def test_difference_during_the_run_is_found(vocabulary, monkeypatch):
    wrong_for_emoji(monkeypatch)
    encoder = Encoder(vocabulary, "gigatoken")
    encoder.encode(["fine", "🙂"])  # one document of a batch is compared, the first that is not too long
    with pytest.raises(BackendMismatch, match="gigatoken and hf give different ids for a document that begins '🙂'"):
        encoder.encode(["long " * 5000, "🙂", "fine"])


def test_hf_keeps_names_of_special_tokens_as_text_or_not(vocabulary):
    text = ["x <|end_of_text|> y"]
    assert vocabulary.eos_id not in HuggingFaceBackend(vocabulary.path, True).encode(text)[0]
    assert vocabulary.eos_id in HuggingFaceBackend(vocabulary.path, False).encode(text)[0]
