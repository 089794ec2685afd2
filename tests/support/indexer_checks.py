"""The trained scorer inside the model, against plain mathematics: a float64 Llama that chooses by the engine's index weights.

`tests/unit/model/test_llama.py` runs these tests in the process of model_checks.py.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from ssa_pretrain.config import Config, Method, Score
from support.model_checks import (
    DIM,
    GROUPS,
    HEADS,
    VOCAB,
    Oracle,
    microbatch,
    microbatches,
    placement,  # noqa: F401  a fixture
    small_config,
)

INDEX_HEADS = 2


def indexer_config(method: Method = Method.indexer, *, warmup: int = 0, **settings) -> Config:
    """Returns the small model with a trained scorer."""
    config = small_config()
    attention = config.attention
    attention.method, attention.score, attention.full_ratio = method, Score.indexer, 0.0
    attention.indexer.heads, attention.indexer.warmup_steps = INDEX_HEADS, warmup
    for name, value in settings.items():
        setattr(attention, name, value)
    return config


class IndexOracle(Oracle):
    """The float64 Llama with the scorer's choice; `noted` has loss and captured mass by (layer, document, query, kv head)."""

    def __init__(self, weights: dict[str, Tensor], config: Config) -> None:
        super().__init__(weights, config)
        self.noted: dict[tuple[int, int, int, int], tuple[float, float]] = {}
        self.document = 0

    def layer(self, x: Tensor, number: int, main: str):
        """Also projects the index queries and keys of the layer."""
        self.document += number == 0
        name = f"decoder.layers.{number}."
        mixed = self.norm(x, name + "input_layernorm.weight") @ self.w[name + "self_attention.linear_index.weight"].T
        mixed = mixed.view(len(x), GROUPS, INDEX_HEADS + 1, DIM)
        self.iq = self.rope(mixed[:, :, :-1].reshape(len(x), -1, DIM)).view(len(x), GROUPS, INDEX_HEADS, DIM)
        self.ik, self.number = self.rope(mixed[:, :, -1]), number
        return super().layer(x, number, main)

    def by_block(self, q: Tensor, k: Tensor) -> Tensor:
        """Returns the mean mass by block of some queries [n, DIM] of one token over the keys [t + 1, DIM] up to it."""
        size = self.config.attention.block_size
        probabilities = (q @ k.T / math.sqrt(DIM)).softmax(-1).mean(0)
        return torch.stack([part.sum() for part in probabilities.split(size)])

    def chosen(self, q: Tensor, k: Tensor, t: int, group: int) -> list[int]:
        """Returns the keys of the blocks that the scorer chooses, and notes the loss."""
        size, top_k = self.config.attention.block_size, self.config.attention.top_k
        own = t // size
        predicted = self.by_block(self.iq[t, group], self.ik[: t + 1, group])
        blocks = [own, *sorted(range(own), key=lambda b: (float(predicted[b]), b), reverse=True)[: top_k - 1]]
        heads = slice(group * HEADS // GROUPS, (group + 1) * HEADS // GROUPS)
        target = self.by_block(q[t, heads], k[: t + 1, group])
        loss = float((target * (target / predicted).log()).sum()) if own >= top_k else 0.0
        self.noted[self.number, self.document, t, group] = loss, float(target[blocks].sum())
        return [j for b in sorted(blocks) for j in range(b * size, min((b + 1) * size, t + 1))]

    def index_means(self) -> tuple[list[float], list[float]]:
        """Returns the means of loss and captured mass by layer."""
        layers = range(self.config.model.num_layers)
        values = [np.mean([value for key, value in self.noted.items() if key[0] == n], axis=0) for n in layers]
        return [float(loss) for loss, _ in values], [float(mass) for _, mass in values]


def engine_and_weights(config: Config, placement):  # noqa: F811
    from ssa_pretrain.engine import build_engine
    from ssa_pretrain.engine.megatron.checkpoint import unwrap

    engine = build_engine(config, placement, VOCAB)
    return engine, dict(unwrap(engine.chunks[0]).named_parameters())


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_evaluation_chooses_by_the_scorer(placement, mode):  # noqa: F811
    config = indexer_config()
    engine, weights = engine_and_weights(config, placement)
    found = engine.evaluate([microbatch()], mode=mode)
    wanted = IndexOracle(weights, config).metrics(microbatch(), mode)
    np.testing.assert_allclose(
        [found.cross_entropy, *found.alignment_by_layer, *found.captured_mass_by_layer], wanted, rtol=1e-5
    )
    other = Oracle(weights, config).metrics(microbatch(), mode)
    assert abs(other[-1] - wanted[-1]) > 1e-3, "mean-pooled keys choose other blocks, or the test proves nothing"


@pytest.mark.parametrize(
    ("method", "warmup", "main"), [("indexer", 1, "full"), ("indexer", 0, "sparse"), ("ssa", 0, "sparse")]
)
def test_step_measures_the_definition(placement, method, warmup, main):  # noqa: F811
    config = indexer_config(Method(method), warmup=warmup)
    engine, weights = engine_and_weights(config, placement)
    oracle = IndexOracle(weights, config)
    cross_entropy, *by_layer = oracle.metrics(microbatch(), main)
    found = engine.train_step([microbatch()], step=0, learning_rate=0.0).result()
    losses, masses = oracle.index_means()
    assert found.full_share == float(main == "full")
    np.testing.assert_allclose(found.cross_entropy, cross_entropy, rtol=1e-5)
    np.testing.assert_allclose(found.index_loss_by_layer, losses, rtol=1e-5)
    np.testing.assert_allclose(found.captured_mass_by_layer, masses, rtol=1e-5)
    assert min(losses) > 1e-2
    if method == "indexer":
        assert found.alignment_by_layer == [], "the other stream is not computed"
    else:
        np.testing.assert_allclose([*found.alignment_by_layer, *found.captured_mass_by_layer], by_layer, rtol=1e-5)


def gradients(config: Config, placement, step: int = 0) -> dict[str, Tensor]:  # noqa: F811
    engine, weights = engine_and_weights(config, placement)
    engine.forward_backward(microbatches(), step=step)
    return {name: weight.main_grad.clone() for name, weight in weights.items()}


@pytest.mark.parametrize("method", ["indexer", "ssa"])
def test_scorer_and_model_do_not_disturb_each_other(placement, method):  # noqa: F811
    """The model's gradients are the same to the bit whatever the index loss weighs, and the scorer's are proportional to its weight."""
    config = indexer_config(Method(method), warmup=1)
    once = gradients(config, placement)
    config.attention.indexer.loss_weight = 1000.0
    often = gradients(config, placement)
    config.attention.alignment_weight = 0.0
    unaligned = gradients(config, placement)
    for name, gradient in once.items():
        if "linear_index" in name:
            assert float(gradient.norm()) > 0
            torch.testing.assert_close(often[name], 1000.0 * gradient, rtol=1e-4, atol=1e-6 * float(often[name].max()))
            assert torch.equal(often[name], unaligned[name]), "alignment does not reach the scorer"
        else:
            assert torch.equal(often[name], gradient), name


@pytest.mark.parametrize("warmup", [0, 1])
def test_gradient_is_that_of_the_index_loss(placement, warmup):  # noqa: F811
    """Along the gradient the index losses must rise by its norm: all queries count, and the full stream does not move with the scorer."""
    config = indexer_config(warmup=warmup, top_k=2)
    config.model.num_layers = 1  # the layers after a sparse one would move with its choice
    engine, weights = engine_and_weights(config, placement)
    engine.forward_backward(microbatches(), step=0)
    (weight,) = (weight for name, weight in weights.items() if "linear_index" in name)
    gradient, norm = weight.main_grad.clone(), float(weight.main_grad.norm())

    def loss_at(distance: float) -> float:
        with torch.no_grad():
            weight.add_(distance * gradient / norm)
            sums = engine.forward_backward(microbatches(), step=0)
            weight.sub_(distance * gradient / norm)
        return engine.microbatches.step_result(sums, torch.zeros(())).result().index_loss_by_layer[0]

    assert (loss_at(5e-3) - loss_at(-5e-3)) / 1e-2 == pytest.approx(norm, rel=0.01)


def test_scorer_learns_full_attention_in_the_warm_up(placement):  # noqa: F811
    engine, _ = engine_and_weights(indexer_config(warmup=1000), placement)
    found = [engine.train_step(microbatches(), step=n, learning_rate=1e-2).result() for n in range(30)]
    assert np.mean(found[-1].index_loss_by_layer) < 0.3 * np.mean(found[0].index_loss_by_layer)
    assert np.mean(found[-1].captured_mass_by_layer) > np.mean(found[0].captured_mass_by_layer)


def test_step_without_a_query_to_choose_for_leaves_the_scorer(placement):  # noqa: F811
    """Blocks that cover every document: the loss is 0, and the scorer's gradient too, but it takes part in the backward."""
    found = gradients(indexer_config(top_k=16), placement)
    assert all(float(gradient.abs().max()) == 0.0 for name, gradient in found.items() if "linear_index" in name)
    assert all(float(gradient.norm()) > 0 for name, gradient in found.items() if "linear_qkv" in name)


def test_attention_by_head_uses_the_scorer(placement):  # noqa: F811
    from ssa_pretrain.evaluation.heads import head_sums

    engine, _ = engine_and_weights(indexer_config(), placement)
    seen = []

    def observe(layer, q, k, packed, mask_T, **_):
        sums = head_sums(q, k, layer.select(q, k, packed.documents), packed.documents, torch.ones(len(q)))
        seen.append(float(sums[0].sum()) / (len(q) * HEADS))

    found = engine.evaluate([microbatch()], mode="sparse", observe=observe)
    assert seen == pytest.approx(found.captured_mass_by_layer, rel=1e-5)


def test_checkpoint_and_common_weights_hold_the_scorer(placement, tmp_path):  # noqa: F811
    build = partial(engine_and_weights, indexer_config(), placement)
    engine, weights = build()
    engine.train_step(microbatches(), step=0, learning_rate=1e-2).result()
    engine.save(tmp_path)
    engine.save_weights(tmp_path)
    expected = engine.last_logits(microbatches()[0], mode="sparse")
    for load in ("load", "load_weights"):
        other, loaded = build()
        getattr(other, load)(tmp_path)
        assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())
        assert torch.equal(other.last_logits(microbatches()[0], mode="sparse"), expected)


def test_scorer_begins_beside_weights_without_one(placement, tmp_path):  # noqa: F811
    """A run may start from a model with full attention; an evaluation of such weights with a scorer is refused."""
    from ssa_pretrain.checkpoint.weights import WeightsError
    from ssa_pretrain.engine.megatron.model import MegatronModel

    trained, weights = engine_and_weights(small_config(), placement)
    trained.train_step(microbatches(), step=0, learning_rate=1e-2).result()
    trained.save(tmp_path)
    trained.save_weights(tmp_path)
    engine, loaded = engine_and_weights(indexer_config(), placement)
    before = {name: weight.clone() for name, weight in loaded.items()}
    engine.load_weights(tmp_path)
    for name, weight in loaded.items():
        assert torch.equal(weight, before[name] if "linear_index" in name else weights[name]), name
    with pytest.raises(WeightsError, match="linear_index"):
        MegatronModel(indexer_config(), placement, VOCAB).load_weights(tmp_path / "weights")


def test_plan_counts_the_parameters_of_the_scorer(placement):  # noqa: F811
    from ssa_pretrain.planning.memory import count_parameters

    config = indexer_config()
    _, weights = engine_and_weights(config, placement)
    total, largest = count_parameters(config, config.model.padded_vocab_size(VOCAB))
    assert total == largest == sum(weight.numel() for weight in weights.values())
