"""Encoding under each policy, reproducible training, and which tokenizers are rejected."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from data_prep.config import BpeTokenizer, Config, FileTokenizer, PolicyConfig, SplitConfig
from data_prep.corpus.planning import plan_shards
from data_prep.corpus.splitting import is_heldout
from data_prep.errors import InputError
from data_prep.sources.files import Part
from data_prep.tokenizer.bpe import EOS, train_bpe
from data_prep.tokenizer.encoding import Encoder, Vocabulary
from data_prep.tokenizer.vocabulary import prepare_vocabulary
from support.texts import NASTY


@pytest.fixture
def plan(corpus):
    return plan_shards([Part("text", "jsonl", (str(corpus),))], 0)


@pytest.fixture
def vocabulary(tmp_path, plan) -> Vocabulary:
    config = Config(tokenizer=BpeTokenizer(vocab_size=560))
    return prepare_vocabulary(config, plan, ["digest"], tmp_path / "work")[0]


def test_ids_round_trip_and_end_in_eos(vocabulary):
    decoder = Tokenizer.from_file(vocabulary.path)
    for text, ids in zip(NASTY, Encoder(vocabulary).encode(NASTY), strict=True):
        assert ids[-1] == vocabulary.eos_id
        assert decoder.decode(ids[:-1].tolist(), skip_special_tokens=False) == text
        assert ids.dtype == np.uint16


def test_name_of_a_special_token_is_text_by_default(vocabulary):
    (as_text,) = Encoder(vocabulary).encode([f"x {EOS} y"])
    assert (as_text == vocabulary.eos_id).sum() == 1
    (as_control,) = Encoder(replace(vocabulary, specials_as_text=False)).encode([f"x {EOS} y"])
    assert (as_control == vocabulary.eos_id).sum() == 2


def test_bos_and_eos_follow_the_policy(vocabulary):
    (plain,) = Encoder(replace(vocabulary, append_eos=False)).encode(["some text"])
    (both,) = Encoder(replace(vocabulary, add_bos=True)).encode(["some text"])
    assert both.tolist() == [vocabulary.bos_id, *plain.tolist(), vocabulary.eos_id]


def test_truncation_in_a_tokenizer_file_is_ignored(vocabulary, tmp_path):
    tokenizer = Tokenizer.from_file(vocabulary.path)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "limited.json"))
    limited = Encoder(replace(vocabulary, path=str(tmp_path / "limited.json")))
    for one, other in zip(limited.encode(NASTY), Encoder(vocabulary).encode(NASTY), strict=True):
        assert one.tolist() == other.tolist()


def test_id_outside_the_vocabulary_is_not_stored(vocabulary):
    with pytest.raises(OverflowError, match=r"id \d+ is outside the vocabulary of 300"):
        Encoder(replace(vocabulary, vocab_size=300)).encode(["the sparse stream reads blocks of keys"])


def test_training_twice_gives_the_same_tokenizer(plan):
    config, split = BpeTokenizer(vocab_size=560), SplitConfig()
    first, second = train_bpe(config, split, plan), train_bpe(config, split, plan)
    assert first == second
    assert Tokenizer.from_str(first).get_vocab_size() == 560


def test_held_out_documents_do_not_affect_the_tokenizer(tmp_path):
    split = SplitConfig(heldout_fraction=0.3)
    texts = [f"qzxj{n} " * 40 for n in range(200)]
    kept = [text for text in texts if not is_heldout(text.encode(), split)]
    results = []
    for name, content in (("all", texts), ("kept", kept)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in content))
        plan = plan_shards([Part("text", "jsonl", (str(path),))], 0)
        results.append(train_bpe(BpeTokenizer(vocab_size=560), split, plan))
    assert 0 < len(kept) < 200
    assert results[0] == results[1]


def test_trained_tokenizer_is_reused_until_its_inputs_change(tmp_path, plan, monkeypatch):
    config = Config(tokenizer=BpeTokenizer(vocab_size=560))
    first = prepare_vocabulary(config, plan, ["digest"], tmp_path / "work")[0]
    written = Path(first.path).stat().st_mtime_ns
    assert prepare_vocabulary(config, plan, ["digest"], tmp_path / "work")[0] == first
    assert Path(first.path).stat().st_mtime_ns == written
    Path(first.path).write_text("{}")
    assert prepare_vocabulary(config, plan, ["digest"], tmp_path / "work")[0] == first
    prepare_vocabulary(config, plan, ["other"], tmp_path / "work")[0]
    assert Path(first.path).stat().st_mtime_ns != written


def from_file(path: Path, eos: str = EOS, bos: str | None = None) -> Vocabulary:
    choice = FileTokenizer(path=str(path), eos_token=eos, bos_token=bos)
    return prepare_vocabulary(Config(tokenizer=choice, policy=PolicyConfig()), [], [], Path("unused"))[0]


def test_tokenizer_file_is_used_unchanged(vocabulary):
    found = from_file(Path(vocabulary.path))
    assert (found.sha256, found.vocab_size, found.eos_id) == (vocabulary.sha256, 560, vocabulary.eos_id)
    assert found.bos_id is None


def test_vocabulary_size_includes_added_tokens_and_gaps(vocabulary, tmp_path):
    tokenizer = Tokenizer.from_file(vocabulary.path)
    tokenizer.add_special_tokens([AddedToken("<|pad|>", special=True)])
    tokenizer.save(str(tmp_path / "more.json"))
    assert from_file(tmp_path / "more.json").vocab_size == 561


@pytest.mark.parametrize(
    "content,message",
    [
        (None, r"tokenizer.path=.*t.json is not a file; name a tokenizer.json"),
        (
            b"\xff\xfe",
            r"t.json is not a tokenizer.json \(it is not text\); for Llama 3's tokenizer.model use tokenizer=llama3",
        ),
        (b"IQ== 0\nIg== 1\n", r"t.json is not a tokenizer.json \(Expecting value.*\); fetch it again"),
        (b'{"model_type": "llama"}', r"t.json is not a tokenizer.json \(.*\); fetch it again"),
    ],
)
def test_file_that_is_not_a_tokenizer_is_rejected(tmp_path, content, message):
    path = tmp_path / "t.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        from_file(path)
    assert re.search(message, str(caught.value)), caught.value


@pytest.mark.parametrize("key", ["eos", "bos"])
def test_token_missing_from_the_file_is_named(vocabulary, key):
    with pytest.raises(
        InputError, match=rf"has no token '</s>'; set tokenizer.{key}_token to one that it has \(its special"
    ):
        from_file(Path(vocabulary.path), **{key: "</s>"})


def test_ordinary_token_as_eos_is_rejected(vocabulary):
    with pytest.raises(
        InputError, match=r"'a' is an ordinary token, which may occur in a text and would end the document there"
    ):
        from_file(Path(vocabulary.path), eos="a")
