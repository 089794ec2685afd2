"""Llama 3's tokenizer converted from Meta's file: equal to tiktoken on every document of a hard sample."""

import random
import sysconfig
from pathlib import Path

import pytest

from data_prep.config import Config, Llama3Tokenizer
from data_prep.errors import InputError
from data_prep.tokenizer.encoding import Encoder, Vocabulary
from data_prep.tokenizer.llama3 import NUM_RANKS, llama3_json
from data_prep.tokenizer.vocabulary import prepare_vocabulary

NASTY = [
    "Abdomen Arachnida Arthropoda",  # whole words that merges alone do not reach
    "x <|end_of_text|> <|begin_of_text|> y",
    "\x00\x01\x1f\x7f",
    "a" * 5000,
    "a\r\nb\r\r\n \n\t\n  c",
    "🙂👩‍👩‍👧‍👦 漢字かな ไทย עברית العربية Ünïcödé",
    "1234567890 12 3 0x1F 3.14159e-10",
    " leading, trailing \n",
    "don't WE'LL I'm they'Ve",
]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    pytest.importorskip("llama_models", reason="llama-models is not installed (extra llama3)")
    cache = str(tmp_path_factory.mktemp("cache"))
    return prepare_vocabulary(Config(tokenizer=Llama3Tokenizer(), cache=cache), [], [], Path("unused"))[0]


@pytest.fixture(scope="module")
def tiktoken_ids():
    tiktoken = pytest.importorskip("tiktoken")
    import llama_models.llama3.tokenizer as original
    from tiktoken.load import load_tiktoken_bpe

    ranks = load_tiktoken_bpe(str(Path(original.__file__).parent / "tokenizer.model"))
    encoding = tiktoken.Encoding(
        name="llama3",
        pat_str=original.Tokenizer.pat_str,
        mergeable_ranks=ranks,
        special_tokens={"<|end_of_text|>": 128_001},
    )
    return encoding.encode_ordinary


def test_size_and_control_ids_are_the_published_ones(vocabulary):
    assert (vocabulary.vocab_size, vocabulary.bos_id, vocabulary.eos_id) == (128_256, 128_000, 128_001)


def test_hard_cases_equal_tiktoken(vocabulary, tiktoken_ids):
    for text, ids in zip(NASTY, Encoder(vocabulary).encode(NASTY), strict=True):
        assert ids.tolist() == [*tiktoken_ids(text), 128_001], text


def test_real_files_equal_tiktoken(vocabulary, tiktoken_ids):
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    files = random.Random(0).sample(files, 60)
    documents = [path.read_text(encoding="utf-8") for path in files]
    for path, text, ids in zip(files, documents, Encoder(vocabulary).encode(documents), strict=True):
        assert ids[:-1].tolist() == tiktoken_ids(text), path


def test_random_bytes_equal_tiktoken(vocabulary, tiktoken_ids):
    draw = random.Random(1)
    documents = [
        "".join(chr(draw.choice((32, 10, 39, draw.randrange(0xD7FF), draw.randrange(128)))) for _ in range(300))
        for _ in range(100)
    ]
    for text, ids in zip(documents, Encoder(vocabulary).encode(documents), strict=True):
        assert ids[:-1].tolist() == tiktoken_ids(text), repr(text)


def test_gigatoken_equals_tiktoken(vocabulary, tiktoken_ids):
    pytest.importorskip("gigatoken")
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    documents = [*NASTY, *(path.read_text(encoding="utf-8") for path in files)]
    for text, ids in zip(documents, Encoder(vocabulary, "gigatoken").encode(documents), strict=True):
        assert ids[:-1].tolist() == tiktoken_ids(text), text[:80]


def test_conversion_is_cached_by_the_checksum_of_its_source(vocabulary):
    path = Path(vocabulary.path)
    written = path.stat().st_mtime_ns
    assert llama3_json(None, path.parent) == path
    assert path.stat().st_mtime_ns == written
    assert "82e9d31979e92ab9" in path.name and vocabulary.vocab_size > NUM_RANKS


def test_other_vocabulary_is_refused(tmp_path):
    other = tmp_path / "tokenizer.model"
    other.write_bytes(b"IQ== 0\n")
    with pytest.raises(
        InputError, match=r"tokenizer.model is not Llama 3's tokenizer.model \(sha256 .*; install llama-models"
    ):
        llama3_json(str(other), tmp_path)
