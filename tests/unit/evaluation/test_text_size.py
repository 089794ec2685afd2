"""ssa_pretrain/evaluation/text_size.py: words and bytes of labels, over documents, rows and padding; perplexities of a known loss."""

import math

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ssa_pretrain.data.rows import HeldOutRows, Row, padded
from ssa_pretrain.engine import EvaluationResult
from ssa_pretrain.evaluation.text_size import TextSize, perplexities, row_pieces, text_size
from support.small_datasets import write_dataset

EOS = 256


@pytest.fixture(scope="module")
def letters() -> Tokenizer:
    """A tokenizer with one token per byte, in the order of its alphabet, and EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


def held_out(folder, tokenizer: Tokenizer, texts: list[str], length: int) -> HeldOutRows:
    documents = [np.array([*tokenizer.encode(text).ids, EOS]) for text in texts]
    manifest = write_dataset(folder, {}, {"held": documents}, vocab_size=257)
    return HeldOutRows(manifest, sequence_length=length, rows=0)


TEXTS = ["one two  three\nfour", "füñf", "x", "seven eight nine ten eleven twelve"]


@pytest.mark.parametrize("length", [5, 8, 13, 64, 1000])
def test_words_and_bytes_do_not_depend_on_the_rows(tmp_path, letters, length):
    """All words but those that a first token begins, and all bytes but first tokens': each document's first letter is no label."""
    size = text_size(held_out(tmp_path, letters, TEXTS, length), letters, isolate_documents=True)
    assert size.words == sum(len(text.split()) - 1 for text in TEXTS)
    if length > 13:  # shorter rows cut between the two bytes of a letter
        assert size.bytes == sum(len(text.encode()) for text in TEXTS) - len(TEXTS)
    else:
        assert 0 <= size.bytes - sum(len(text.encode()) for text in TEXTS) + len(TEXTS) <= 6 * 12


def test_without_isolation_a_documents_first_token_is_a_label(tmp_path, letters):
    size = text_size(held_out(tmp_path, letters, ["one", "two", "six"], 100), letters, isolate_documents=False)
    assert size == TextSize(words=0, bytes=8), "end tokens have no text, so the words touch: onetwosix without its o"


def test_pieces_leave_out_padding_and_keep_document_starts():
    starts = np.array([False, False, True, False, True])
    row = padded(Row(np.arange(5), starts), 7, 0)
    assert row_pieces(row, isolate_documents=True) == [[0, 1], [2, 3], [4]]
    assert row_pieces(row, isolate_documents=False) == [[0, 1, 2, 3, 4]]


def test_perplexities_are_of_the_summed_loss():
    result = EvaluationResult(2.0, [], [], num_labels=30, num_tokens=31)
    found = perplexities(result, TextSize(words=10, bytes=120))
    assert found["perplexity"] == pytest.approx(math.exp(2.0))
    assert found["word_perplexity"] == pytest.approx(math.exp(6.0))
    assert found["byte_perplexity"] == pytest.approx(math.exp(0.5))
    assert found["bits_per_byte"] == pytest.approx(0.5 / math.log(2))
    none = perplexities(EvaluationResult(math.nan, [], [], 0, 0), TextSize(0, 0))
    assert all(none[key] is None for key in ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"))
