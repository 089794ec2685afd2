"""A token budget takes the shortest sufficient prefix of the shuffled shards, whatever was estimated on the way."""

import pytest

from data_prep.corpus.planning import Shard
from data_prep.errors import ConfigurationError
from data_prep.readers import Piece
from data_prep.run_config import MixConfig
from data_prep.shards.budget import choose, shares
from data_prep.shards.shard import Job


def jobs(name: str, count: int, size: int = 1000) -> list[Job]:
    piece = Piece("x", "jsonl", "text", 0, size, size)
    return [Job(Shard(name, number, (piece,)), f"{name}{number}") for number in range(count)]


CORPUS_SAMPLE = jobs("web", 20) + jobs("code", 10)
EXACT = {job.shard.stem: 100 + 7 * (number % 5) for number, job in enumerate(CORPUS_SAMPLE)}


def settle(mix: MixConfig, known: dict[str, int]) -> list[str]:
    """Tokenizes the chosen shards until the choice no longer grows; returns their stems."""
    known = dict(known)
    for _ in range(100):
        chosen = choose(mix, CORPUS_SAMPLE, known)
        missing = [job.shard.stem for job in chosen if job.shard.stem not in known]
        if not missing:
            return [job.shard.stem for job in chosen]
        known |= {stem: EXACT[stem] for stem in missing}
    raise AssertionError("never settles")


def test_without_a_budget_all_shards_are_taken():
    assert choose(MixConfig(), CORPUS_SAMPLE, {}) == CORPUS_SAMPLE
    assert shares(MixConfig(), CORPUS_SAMPLE) == {}


def test_each_part_exceeds_its_budget_by_less_than_one_shard():
    mix = MixConfig(weights={"web": 3, "code": 1}, target_tokens=1600)
    stems = settle(mix, {})
    for name, budget in (("web", 1200), ("code", 400)):
        own = [EXACT[stem] for stem in stems if stem.startswith(name)]
        assert budget <= sum(own) < budget + max(own)
    assert stems == [job.shard.stem for job in CORPUS_SAMPLE if job.shard.stem in stems]  # in the order of the plan
    assert {int(stem[-5:]) for stem in stems} != set(range(len(stems)))  # a sample, not the beginning


def test_choice_does_not_depend_on_earlier_shards():
    mix = MixConfig(weights={"web": 3, "code": 1}, target_tokens=1600)
    fresh = settle(mix, {})
    assert settle(mix, EXACT) == fresh
    assert settle(mix, {stem: EXACT[stem] for stem in list(EXACT)[3:9]}) == fresh


def test_larger_budget_extends_a_smaller_one_and_another_seed_chooses_other_shards():
    small = settle(MixConfig(weights={"web": 1, "code": 1}, target_tokens=800), {})
    large = settle(MixConfig(weights={"web": 1, "code": 1}, target_tokens=1600), {})
    assert set(small) < set(large)
    assert settle(MixConfig(weights={"web": 1, "code": 1}, target_tokens=800, seed=1), {}) != small


def test_budget_above_the_corpus_takes_all_shards():
    assert len(settle(MixConfig(weights={"web": 1, "code": 1}, target_tokens=1e9), {})) == len(CORPUS_SAMPLE)


def test_budget_without_weights_is_proportional_to_the_text():
    assert shares(MixConfig(target_tokens=10), CORPUS_SAMPLE) == pytest.approx({"web": 2 / 3, "code": 1 / 3})


def test_mix_and_corpus_must_name_the_same_parts():
    with pytest.raises(
        ConfigurationError, match=r"mix.weights has no weight for code; add one, or leave that part out"
    ):
        shares(MixConfig(weights={"web": 1}), CORPUS_SAMPLE)
    absent = {"web": 6, "code": 2, "books": 8}
    with pytest.raises(ConfigurationError, match=r"names books, which the source has no text for .*mix.missing=drop"):
        shares(MixConfig(weights=absent), CORPUS_SAMPLE)
    assert shares(MixConfig(weights=absent, missing="drop"), CORPUS_SAMPLE) == {"web": 0.75, "code": 0.25}
