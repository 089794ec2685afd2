"""Generation from a cache by the decoding kernels: the tokens are those that forwards over the whole text find, in fp32 and in both modes.

No library's full attention takes fp32, so in full mode the forwards over whole texts run the reference.
"""

import pytest

from ssa_pretrain.config import Config, IndexerConfig, Method, Score
from ssa_pretrain.engine.megatron.checkpoint import unwrap
from support.generation_run import LENGTHS, prompts, require_likeliest, run_of, with_cache

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def placement():
    """One process."""
    from ssa_pretrain.parallel.state import start, stop

    yield start(Config().parallel, seed=1)
    stop()


def by_reference(method):
    """Returns the engine's method, with attention by the reference."""

    def call(engine, *args, **kwargs):
        layers = [layer.self_attention for layer in unwrap(engine.chunks[0]).decoder.layers]
        impls = [layer.impl for layer in layers]
        for layer in layers:
            layer.impl = "reference"
        try:
            return method(engine, *args, **kwargs)
        finally:
            for layer, impl in zip(layers, impls, strict=True):
                layer.impl = impl

    return call


@pytest.mark.parametrize(
    ("mode", "attention"),
    [
        ("full", {}),
        ("sparse", {}),
        ("sparse", {"score": Score.per_head}),
        ("sparse", {"score": Score.official_compat, "top_k": 4}),
        ("sparse", {"method": Method.nsa, "score": Score.compressed, "window": 20}),
        ("full", {"method": Method.indexer, "score": Score.indexer, "indexer": IndexerConfig(heads=2)}),
        ("sparse", {"method": Method.indexer, "score": Score.indexer, "indexer": IndexerConfig(heads=2)}),
    ],
)
def test_tokens_are_those_of_whole_forwards(placement, monkeypatch, mode, attention):
    run, texts = run_of(placement, **attention), prompts()
    if mode == "full":
        for name in ("last_logits", "score_labels"):
            monkeypatch.setattr(type(run.engine), name, by_reference(getattr(type(run.engine), name)))
    found = with_cache(run, texts, mode, 200)
    require_likeliest(run, found, LENGTHS, mode)
