"""FP8 with every recipe: losses fall and stay near fp32's, as those of bf16 do."""

import numpy as np
import pytest
import torch

from ssa_pretrain.config import Config, Fp8Recipe, KernelImpl, LayerSpec, Method, PrecisionName
from support.errors import require_as_near
from support.small_model import LENGTH, VOCAB, random_batches, small_config

pytestmark = pytest.mark.gpu
STEPS = 30


@pytest.fixture(scope="module")
def placement():
    """One process on one GPU."""
    pytest.importorskip("transformer_engine")
    from ssa_pretrain.parallel.state import start, stop

    yield start(Config().parallel, seed=1)
    stop()


def losses(placement, precision: PrecisionName, recipe: Fp8Recipe) -> np.ndarray:
    from ssa_pretrain.engine import build_engine

    impl = KernelImpl.reference if precision is PrecisionName.fp32 else KernelImpl.auto
    config = small_config(Method.ssa, LayerSpec.transformer_engine, impl)
    config.precision.name, config.precision.fp8_recipe = precision, recipe
    engine = build_engine(config, placement, VOCAB)
    batches = random_batches(2)
    return np.array(
        [engine.train_step(batches, step=s, learning_rate=1e-3).result().cross_entropy for s in range(STEPS)]
    )


@pytest.mark.parametrize("recipe", list(Fp8Recipe))
def test_fp8_follows_bf16(placement, recipe):
    """bf16 has 8 mantissa bits and FP8 4: until the loss has halved, FP8 is at most 16 times as far from fp32.

    Once the model has memorised the batch, the loss is small and the curves diverge.
    """
    exact = losses(placement, PrecisionName.fp32, recipe)
    wanted = losses(placement, PrecisionName.bf16, recipe)
    found = losses(placement, PrecisionName.fp8, recipe)
    assert np.isfinite(found).all() and found[-1] < found[0] - 0.1
    early = exact > exact[0] / 2
    ours, theirs, right = (torch.from_numpy(curve[early]) for curve in (found, wanted, exact))
    require_as_near(ours / right, theirs / right, torch.ones_like(right), factor=16.0)


def test_fp8_samples_from_prompts_of_any_length(placement):
    """Sampling packs prompts that grow by a token at a time; FP8 products need multiples of 8."""
    from ssa_pretrain.engine import build_engine
    from ssa_pretrain.evaluation.generation import TOKENS_MULTIPLE
    from ssa_pretrain.evaluation.packing import pack_texts

    config = small_config(Method.ssa, LayerSpec.transformer_engine, KernelImpl.auto)
    config.precision.name = PrecisionName.fp8
    engine = build_engine(config, placement, VOCAB)
    for length in (33, 40):
        logits = engine.last_logits(pack_texts([[1] * length, [2] * 7], TOKENS_MULTIPLE, LENGTH), mode="sparse")
        assert logits[:2].isfinite().all()
