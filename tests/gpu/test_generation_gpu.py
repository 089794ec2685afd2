"""Generation from a cache by the decoding kernels: the tokens are those that forwards over the whole text find, in fp32 and in both modes."""

import pytest

from ssa_pretrain.config import Config, Method, Score
from support.generation_run import LENGTHS, prompts, require_likeliest, run_of, with_cache

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def placement():
    """One process."""
    from ssa_pretrain.parallel.state import start, stop

    yield start(Config().parallel, seed=1)
    stop()


@pytest.mark.parametrize(
    ("mode", "attention"),
    [
        ("full", {}),
        ("sparse", {}),
        ("sparse", {"score": Score.per_head}),
        ("sparse", {"score": Score.official_compat, "top_k": 4}),
        ("sparse", {"method": Method.nsa, "score": Score.compressed, "window": 20}),
    ],
)
def test_tokens_are_those_of_whole_forwards(placement, mode, attention):
    run, texts = run_of(placement, **attention), prompts()
    found = with_cache(run, texts, mode, 200)
    require_likeliest(run, found, LENGTHS, mode)
