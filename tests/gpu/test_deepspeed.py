"""engine=deepspeed on one GPU: each ZeRO stage trains in bf16 as the megatron engine does, resumes exactly, and offloads its optimizer."""

import numpy as np
import pytest
import torch
from small_model import LENGTH, VOCAB, random_batches

from ssa_pretrain.config import Config, EngineName, LayerSpec, PrecisionName

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.gpu

MICROBATCHES = 2


def settings(spec: LayerSpec, stage: int | None, *, offload: bool = False) -> Config:
    """Return a four-layer model of the 1B model's head shape, on the megatron engine (no stage) or on DeepSpeed."""
    config = Config()
    model = config.model
    model.num_layers, model.hidden_size, model.ffn_hidden_size = 4, 512, 1024
    model.num_attention_heads, model.num_kv_heads, model.head_dim = 16, 1, 64
    config.data.sequence_length = LENGTH
    config.training.micro_batch_size = 2
    config.training.global_batch_tokens = MICROBATCHES * 2 * LENGTH
    config.engine.layer_spec = spec
    config.precision.name = PrecisionName.bf16
    if stage is not None:
        config.engine.name = EngineName.deepspeed
        config.deepspeed.zero_stage, config.deepspeed.offload_optimizer = stage, offload
        config.precision.grad_reduce_in_fp32 = stage > 0
    return config


@pytest.fixture(scope="module")
def placement():
    """One process on one GPU."""
    from ssa_pretrain.parallel.state import start, stop

    yield start(Config().parallel, seed=1)
    stop()


def figures(placement, config: Config) -> np.ndarray:
    """Return cross entropy, grad norm, alignment and captured mass of four steps."""
    from ssa_pretrain.engine import build_engine

    engine = build_engine(config, placement, VOCAB)
    found = []
    for step in range(4):
        result = engine.train_step(random_batches(MICROBATCHES), step=step, learning_rate=1e-3)
        found.append(
            [result.cross_entropy, result.grad_norm, *result.alignment_by_layer, *result.captured_mass_by_layer]
        )
    return np.array(found)


@pytest.fixture(scope="module", params=[LayerSpec.local, LayerSpec.transformer_engine])
def reference(request, placement):
    """The megatron engine's figures on a layer spec."""
    if request.param is LayerSpec.transformer_engine:
        pytest.importorskip("transformer_engine")
    return request.param, figures(placement, settings(request.param, None))


@pytest.mark.parametrize(("stage", "offload"), [(0, False), (1, False), (2, False), (3, False), (2, True)])
def test_a_stage_trains_as_the_megatron_engine_does(placement, reference, stage, offload):
    spec, wanted = reference
    found = figures(placement, settings(spec, stage, offload=offload))
    assert wanted[3, 0] < wanted[0, 0] - 0.01
    # bf16 keeps 8 bits: a mean over thousands of tokens agrees far better, a norm of gradients a little less well.
    np.testing.assert_allclose(found[:, 0], wanted[:, 0], rtol=1e-3)
    np.testing.assert_allclose(found[:, 1:], wanted[:, 1:], rtol=3e-2)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_checkpoint_resumes(placement, stage, tmp_path):
    """The first step is the same to the bit; cuDNN's attention adds dQ up in an order of its own each time, so later ones nearly are."""
    from ssa_pretrain.engine import build_engine

    config = settings(LayerSpec.auto, stage)
    engine = build_engine(config, placement, VOCAB)
    engine.train_step(random_batches(MICROBATCHES), step=0, learning_rate=1e-3)
    engine.save(tmp_path)
    wanted = [engine.train_step(random_batches(MICROBATCHES), step=s, learning_rate=1e-3) for s in range(1, 5)]
    other = build_engine(config, placement, VOCAB)
    other.load(tmp_path)
    found = [other.train_step(random_batches(MICROBATCHES), step=s, learning_rate=1e-3) for s in range(1, 5)]
    assert found[0].cross_entropy == wanted[0].cross_entropy
    assert found[0].alignment_by_layer == wanted[0].alignment_by_layer
    assert found[0].captured_mass_by_layer == wanted[0].captured_mass_by_layer
    np.testing.assert_allclose([r.grad_norm for r in found], [r.grad_norm for r in wanted], rtol=1e-2)
    np.testing.assert_allclose([r.cross_entropy for r in found], [r.cross_entropy for r in wanted], rtol=1e-3)
    torch.cuda.synchronize()
