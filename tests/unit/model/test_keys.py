"""A model with QK-norm and a convolution of keys against its definition in float64, its gradients, and its texts token by token."""

import numpy as np
import pytest
import torch

from ssa_pretrain.config import Config, Method, Recompute, Score
from ssa_pretrain.evaluation.generation import continue_texts
from ssa_pretrain.model.attention import SSAAttention
from support.generation_run import likeliest, prompts, run_of, with_cache
from support.model_checks import VOCAB, Oracle, gradient_and_metrics, microbatch, microbatches, small_config

OPTIONS = {"norm": (True, 0), "convolution": (False, 3), "both": (True, 5)}
options = pytest.mark.parametrize(("qk_norm", "taps"), OPTIONS.values(), ids=OPTIONS)


@pytest.fixture(scope="module")
def placement():
    """One process."""
    from ssa_pretrain.parallel.state import start, stop

    yield start(Config().parallel, seed=1)
    stop()


def config_with(qk_norm: bool, taps: int, **more) -> Config:
    """Returns the small model with the options."""
    config = small_config(**more)
    config.model.qk_norm, config.attention.key_convolution = qk_norm, taps
    return config


def build(config: Config, placement):
    """Returns an engine whose norms and filters are drawn far from 1 and 0."""
    from ssa_pretrain.engine import build_engine
    from ssa_pretrain.engine.megatron.checkpoint import unwrap

    engine = build_engine(config, placement, VOCAB)
    weights = dict(unwrap(engine.chunks[0]).named_parameters())
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, weight in weights.items():
            if "self_attention" in name and "linear" not in name:
                weight.copy_(weight + 0.5 * torch.randn(weight.shape, generator=generator))
    return engine, weights


@options
def test_model_equals_the_definition(placement, qk_norm, taps):
    config = config_with(qk_norm, taps, gate=taps != 3)
    engine, weights = build(config, placement)
    named = [name for name in weights if "layernorm.weight" in name and "self_attention" in name]
    assert len(named) == 4 * qk_norm and any("key_convolution" in name for name in weights) == bool(taps)
    batch = microbatch()
    for mode in ("full", "sparse"):
        found = engine.evaluate([batch], mode=mode)
        wanted = Oracle(weights, config).metrics(batch, mode)
        # fp32 has 24 mantissa bits and each value is a mean over hundreds of numbers; two layers of products stay within 1e-5.
        np.testing.assert_allclose(
            [found.cross_entropy, *found.alignment_by_layer, *found.captured_mass_by_layer], wanted, rtol=1e-5
        )
    plain = {k: v for k, v in weights.items() if "_layernorm" not in k or "self_attention" not in k}
    plain.pop("decoder.layers.0.self_attention.key_convolution.weight", None)
    others = Oracle(plain, config).metrics(batch, "sparse")
    assert abs(others[0] / wanted[0] - 1) > 1e-3, "the options must matter, or the test proves nothing"


def newest_blocks(_, q, k, layout):
    """Returns each query's own block and the one before it."""
    own = (layout.query_position // layout.block_size)[:, None, None]
    blocks = torch.cat([own - 1, own], dim=-1)
    return torch.where(own == 0, torch.tensor([0, -1], dtype=torch.int32), blocks).expand(-1, k.shape[1], -1).int()


@options
@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_gradient_of_the_new_weights_is_the_slope_of_the_loss(placement, monkeypatch, qk_norm, taps, mode):
    """Along their own gradient the loss rises by its norm; the other weights stay."""
    config = config_with(qk_norm, taps)
    config.attention.full_ratio, config.attention.alignment_weight = float(mode == "full"), 0.0
    monkeypatch.setattr(SSAAttention, "select", newest_blocks)  # a choice by keys makes the loss jump
    engine, weights = build(config, placement)
    gradients, *_ = gradient_and_metrics(engine, batches := microbatches())
    new = [
        (weight, gradient)
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
        if "self_attention" in name and "linear" not in name
    ]
    norm = float(torch.sqrt(sum(g.double().pow(2).sum() for _, g in new)))

    def loss_at(distance: float) -> float:
        with torch.no_grad():
            for weight, gradient in new:
                weight += distance * gradient / norm
            judged = engine.evaluate(batches, mode=mode).cross_entropy
            for weight, gradient in new:
                weight -= distance * gradient / norm
        return judged

    assert (loss_at(2e-3) - loss_at(-2e-3)) / 4e-3 == pytest.approx(norm, rel=0.01)
    assert all(float(g.abs().max()) > 1e-3 * norm for _, g in new)


def test_recomputation_changes_no_bit(placement):
    found = []
    for recompute in (Recompute.none, Recompute.full, Recompute.selective):
        config = config_with(True, 3)
        config.engine.recompute = recompute
        engine, _ = build(config, placement)
        found.append(gradient_and_metrics(engine, microbatches()))
    for gradients, *metrics in found[1:]:
        assert all(map(torch.equal, gradients, found[0][0])) and metrics == list(found[0][1:])


def test_weights_begin_as_one_and_as_drawn_and_only_filters_decay(placement):
    from ssa_pretrain.engine import build_engine
    from ssa_pretrain.engine.megatron.checkpoint import unwrap

    config = config_with(True, 5)
    engine = build_engine(config, placement, VOCAB)
    weights = dict(unwrap(engine.chunks[0]).named_parameters())
    for name, weight in weights.items():
        if name.endswith(("q_layernorm.weight", "k_layernorm.weight")):
            assert torch.equal(weight, torch.ones(8))
        elif "key_convolution" in name:
            assert weight.shape == (16, 1, 5) and float(weight.std()) == pytest.approx(0.2, rel=0.3)
    groups = [group for o in engine.optimizer.chained_optimizers for group in o.optimizer.param_groups]
    undecayed = sum(p.numel() for group in groups if group["wd_mult"] == 0.0 for p in group["params"])
    assert undecayed == 2 * 2 * 32 + 32 + 2 * 2 * 8, "norms of layers, the last one, and those of heads"


@options
def test_texts_continue_from_a_cache_as_by_whole_forwards(placement, monkeypatch, qk_norm, taps):
    """Texts shorter than the filters too, and of lengths on both sides of a block's end."""
    run = run_of(placement, qk_norm=qk_norm, key_convolution=taps)
    texts = prompts([1, 2, 47, 130])
    found = {mode: with_cache(run, texts, mode, 24) for mode in ("full", "sparse")}
    assert found["full"] != found["sparse"]
    monkeypatch.setattr(SSAAttention, "continues_from_cache", lambda: False)
    for mode, wanted in found.items():
        assert continue_texts(run, texts, mode=mode, num_new=24, choose=likeliest, multiple=16) == wanted


@pytest.mark.parametrize("score", [Score.per_head])
def test_moba_is_the_sparse_stream(placement, score):
    config = config_with(True, 3)
    config.attention.method, config.attention.score, config.attention.full_ratio = Method.moba, score, 0.0
    engine, _ = build(config, placement)
    judged = engine.evaluate([microbatch()], mode="sparse")
    stepped = engine.train_step([microbatch()], step=0, learning_rate=0.0).result()
    assert stepped.cross_entropy == pytest.approx(judged.cross_entropy, rel=1e-6)
