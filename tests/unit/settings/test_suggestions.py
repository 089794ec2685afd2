"""Suggestions for generated typing errors and for other trainers' names, and the distance itself."""

import random
import re
import string
from itertools import pairwise

import pytest

from ssa_pretrain.cli import resolve_config
from ssa_pretrain.config import Config
from ssa_pretrain.config.machine import Machine
from ssa_pretrain.settings.convert import known_keys
from ssa_pretrain.settings.problems import ConfigError
from ssa_pretrain.settings.suggestions import closest, typing_distance

KEYS = list(known_keys(Config))


def reference_distance(a: str, b: str) -> int:
    """Returns the Damerau-Levenshtein distance (optimal string alignment) with every edit at 1, independent of the project's code."""
    table = {(i, 0): i for i in range(len(a) + 1)} | {(0, j): j for j in range(len(b) + 1)}
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            same = a[i - 1] == b[j - 1]
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (not same))
            if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
                table[i, j] = min(table[i, j], table[i - 2, j - 2] + 1)
    return table[len(a), len(b)]


def slip(key: str, draw: random.Random) -> str:
    """Returns a key with one typing error: two letters swapped, one missing, doubled, replaced or added."""
    at = draw.randrange(len(key))
    letter = draw.choice(string.ascii_lowercase + "_")
    return draw.choice(
        [
            key[:at] + key[at : at + 2][::-1] + key[at + 2 :],
            key[:at] + key[at + 1 :],
            key[:at] + key[at] + key[at:],
            key[:at] + letter + key[at + 1 :],
            key[:at] + letter + key[at:],
        ]
    )


def typing_errors(count: int) -> dict[str, str]:
    """Returns mistyped keys with their originals, without those that are one edit from a second key (parallel.xp)."""
    draw, errors = random.Random(2511_20102), {}
    while len(errors) < count:
        key = draw.choice(KEYS)
        typed = slip(key, draw)
        candidates = [other for other in KEYS if abs(len(other) - len(typed)) <= 1]
        if (
            typed not in KEYS
            and typed[0] != "."
            and sum(reference_distance(typed, other) <= 1 for other in candidates) == 1
        ):
            errors[typed] = key
    return errors


def test_200_typing_errors_all_get_the_right_key_first() -> None:
    errors = typing_errors(200)
    with pytest.raises(ConfigError) as caught:
        resolve_config("train", ["experiment=quickstart", *(f"{key}=1" for key in errors)], Machine(has_files=False))
    advice = {problem.key: problem.advice for problem in caught.value.problems}
    assert len(advice) == 200
    first = {typed: re.split(r"[ ,?]", text.removeprefix("did you mean "))[0] for typed, text in advice.items()}
    assert first == errors
    # A second suggestion is for keys that look alike.
    assert sum(advice[typed] != f"did you mean {key}?" for typed, key in errors.items()) < 20


@pytest.mark.parametrize("option", ["llama_1b", "llama_300m", "quickstart", "tiny"])
def test_mistyped_options_get_the_right_option_first(option: str) -> None:
    draw = random.Random(option)
    options = ["llama_1b", "llama_300m", "llama_3b", "llama_8b", "quickstart", "tiny"]
    for _ in range(50):
        typed = slip(option, draw)
        if sum(reference_distance(typed, other) <= 1 for other in options) == 1:
            assert closest(typed, options)[0] == option


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("lr", "optim.lr"),
        ("lrr", "optim.lr"),
        ("trainer.lr", "optim.lr"),
        ("OPTIM.LR", "optim.lr"),
        ("optimizer.learning_rate", "optim.lr"),
        ("tensor_model_parallel_size", "parallel.tp"),
        ("trainer.max_steps", "training.steps"),
        ("seq_length", "data.sequence_length"),
        ("data.seq-length", "data.sequence_length"),
        ("model.num_heads", "model.num_attention_heads"),
        ("num_layer", "model.num_layers"),
        ("attention.topk", "attention.top_k"),
        ("wandb.mode", "logging.wandb.mode"),
        ("wandb_project", "logging.wandb.project"),
        ("attention.block-size", "attention.block_size"),
    ],
)
def test_names_of_other_trainers_get_the_right_key(typed: str, meant: str) -> None:
    assert closest(typed, KEYS)[0] == meant


def test_ambiguous_name_lists_all_its_keys() -> None:
    assert set(closest("interval", KEYS)) == {"logging.interval", "checkpoint.interval", "evaluation.interval"}


@pytest.mark.parametrize("typed", ["foo", "xyzzy.plugh", "q"])
def test_unrelated_name_gets_no_suggestion(typed: str) -> None:
    assert closest(typed, KEYS) == []


def test_every_synonym_names_an_existing_key() -> None:
    from ssa_pretrain.settings.suggestions import SYNONYMS

    assert set(SYNONYMS.values()) <= set(KEYS)
    assert not set(SYNONYMS) & {key.rsplit(".", 1)[-1] for key in KEYS}


def test_distance_counts_edits_and_common_slips_cost_less() -> None:
    draw = random.Random(7)
    for _ in range(300):
        a, b = ("".join(draw.choices("abc_", k=draw.randint(0, 6))) for _ in range(2))
        assert 0.2 * reference_distance(a, b) <= typing_distance(a, b) <= reference_distance(a, b)
        assert (typing_distance(a, b) == 0) == (a == b)
    assert typing_distance("ab", "ba") == typing_distance("aab", "ab") == typing_distance("qw", "qq") == 0.8
    assert typing_distance("ax", "ab") == typing_distance("axb", "ab") == 1.0


def test_limit_only_hides_distances_above_it() -> None:
    draw = random.Random(11)
    for a, b in pairwise("".join(draw.choices("abcd", k=draw.randint(1, 8))) for _ in range(400)):
        exact = typing_distance(a, b)
        for limit in (0.5, 1.0, 2.0, 3.5):
            assert typing_distance(a, b, limit) == (exact if exact <= limit else float("inf"))
