"""ssa_pretrain/evaluation/needle.py: length, depth and content of prompts, and how answers are read."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ssa_pretrain.evaluation.needle import NOISE, answer_tokens, first_number, hide


@pytest.fixture(scope="module")
def letters() -> Tokenizer:
    """A tokenizer with one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.mark.parametrize("depth", [0, 25, 50, 100])
@pytest.mark.parametrize("length", [700, 1000, 4096])
def test_prompt_fills_its_length_and_hides_the_number_at_its_depth(letters, length, depth):
    found = hide(letters, [NOISE] * 100, "\n", length, depth, random.Random(3))
    text, used = letters.decode(found.prompt), len(found.prompt) + answer_tokens(letters, found.value)
    assert length - len(NOISE) - 1 <= used <= length
    assert text.count(f"is: {found.value}.") == 1 and len(found.value) == 7
    before, after = text.split(found.value)
    count = text.count(NOISE)
    assert before.count(NOISE) == round(count * depth / 100) and count > 0
    key = before.rpartition("numbers for ")[2].partition(" is:")[0]
    assert text.endswith(f"The special magic number for {key} mentioned in the provided text is")
    assert after.count(key) == 2


def test_haystack_without_room_holds_only_the_needle(letters):
    found = hide(letters, [NOISE] * 3, "\n", 10, 50, random.Random(0))
    assert NOISE not in letters.decode(found.prompt)


def test_prompts_are_functions_of_their_draw(letters):
    one, same, other = (hide(letters, [NOISE], " ", 900, 0, random.Random(n)) for n in (1, 1, 2))
    assert one == same and one.value != other.value


@pytest.mark.parametrize(("text", "number"), [(" 1234567.", "1234567"), (" is 12 and 34", "12"), ("none", None)])
def test_first_number_is_the_answer(text, number):
    assert first_number(text) == number
