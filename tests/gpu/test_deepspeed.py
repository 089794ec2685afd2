"""engine=deepspeed on one GPU: each ZeRO stage trains in bf16 like the megatron engine, resumes exactly, and offloads its optimizer."""

import pytest
import torch

from ssa_pretrain.config import Config, EngineName, KernelImpl, LayerSpec, PrecisionName
from support.errors import require_means_as_near
from support.small_model import LENGTH, VOCAB, random_batches, train

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.gpu

MICROBATCHES = 2  # what small_model.train gives to a step


def settings(spec: LayerSpec, stage: int | None, *, offload: bool = False) -> Config:
    """Returns a four-layer model of the 1B model's head shape, on the megatron engine (no stage) or on DeepSpeed."""
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


def exact_settings() -> Config:
    """Returns the settings of the same model in fp32."""
    config = settings(LayerSpec.local, None)
    config.precision.name, config.attention.impl = PrecisionName.fp32, KernelImpl.reference
    return config


@pytest.fixture(scope="module")
def exact(placement):
    """Returns the megatron engine's results in fp32."""
    return train(placement, exact_settings(), steps=4)


@pytest.fixture(scope="module", params=[LayerSpec.local, LayerSpec.transformer_engine])
def reference(request, placement):
    """Returns the megatron engine's results in bf16 for a layer spec."""
    if request.param is LayerSpec.transformer_engine:
        pytest.importorskip("transformer_engine")
    return request.param, train(placement, settings(request.param, None), steps=4)


@pytest.mark.parametrize(("stage", "offload"), [(0, False), (1, False), (2, False), (3, False), (2, True)])
def test_zero_stage_equals_megatron_engine(placement, reference, exact, stage, offload):
    """DeepSpeed's bf16 results are about as far from fp32 as the megatron engine's."""
    spec, wanted = reference
    found = train(placement, settings(spec, stage, offload=offload), steps=4)
    assert wanted.means[3, 0] < wanted.means[0, 0] - 0.01
    found.require_as_near(wanted, exact)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_checkpoint_resumes(placement, stage, tmp_path):
    """The first step is bit-identical. cuDNN's attention sums dQ in a different order each time, so later steps are only close."""
    from ssa_pretrain.engine import build_engine

    config = settings(LayerSpec.auto, stage)
    engine = build_engine(config, placement, VOCAB)
    engine.train_step(random_batches(MICROBATCHES), step=0, learning_rate=1e-3)
    engine.save(tmp_path)
    wanted = [engine.train_step(random_batches(MICROBATCHES), step=s, learning_rate=1e-3).result() for s in range(1, 5)]
    other = build_engine(config, placement, VOCAB)
    other.load(tmp_path)
    found = [other.train_step(random_batches(MICROBATCHES), step=s, learning_rate=1e-3).result() for s in range(1, 5)]
    assert found[0].cross_entropy == wanted[0].cross_entropy
    assert found[0].alignment_by_layer == wanted[0].alignment_by_layer
    assert found[0].captured_mass_by_layer == wanted[0].captured_mass_by_layer
    exact_config = exact_settings()
    exact = train(placement, exact_config, steps=5).means[1:, :2]
    resumed, kept = (
        torch.tensor([[r.cross_entropy, r.grad_norm] for r in run], dtype=torch.float64) for run in (found, wanted)
    )
    require_means_as_near(resumed, kept, exact)
    torch.cuda.synchronize()
