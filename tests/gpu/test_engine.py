"""The engine on one GPU: both layer specs and both kernel implementations train alike in bf16, and a step waits for nothing it need not."""

import numpy as np
import pytest
import torch

from ssa_pretrain.config import Config, KernelImpl, LayerSpec, Method, PrecisionName
from ssa_pretrain.data.batches import Batch, collate
from ssa_pretrain.data.rows import Row

pytestmark = pytest.mark.gpu

VOCAB, LENGTH = 1024, 1024


def small_config(method: Method, spec: LayerSpec, impl: KernelImpl) -> Config:
    """Return a four-layer model of the 1B model's head shape."""
    config = Config()
    model = config.model
    model.num_layers, model.hidden_size, model.ffn_hidden_size = 4, 512, 1024
    model.num_attention_heads, model.num_kv_heads, model.head_dim = 16, 1, 64
    config.attention.method, config.attention.impl = method, impl
    config.data.sequence_length = LENGTH
    config.engine.layer_spec = spec
    config.precision.name = PrecisionName.bf16
    return config


def random_batches(count: int) -> list[Batch]:
    """Return microbatches of two rows with uneven documents."""
    generator = np.random.default_rng(0)
    found = []
    for index in range(count):
        rows = []
        for _ in range(2):
            starts = np.zeros(LENGTH + 1, dtype=bool)
            starts[generator.choice(np.arange(1, LENGTH), size=3, replace=False)] = True
            rows.append(Row(generator.integers(0, VOCAB, LENGTH + 1), starts))
        found.append(collate(rows, index=index))
    return found


@pytest.fixture(scope="module")
def placement():
    """One process on one GPU."""
    from ssa_pretrain.parallel.state import start, stop

    yield start(Config().parallel, seed=1)
    stop()


def losses(placement, method: Method, spec: LayerSpec, impl: KernelImpl) -> np.ndarray:
    """Return cross entropy, grad norm, alignment and captured mass of three steps."""
    from ssa_pretrain.engine import build_engine

    engine = build_engine(small_config(method, spec, impl), placement, VOCAB)
    found = []
    for step in range(3):
        result = engine.train_step(random_batches(2), step=step, learning_rate=1e-3)
        found.append(
            [result.cross_entropy, result.grad_norm, *result.alignment_by_layer, *result.captured_mass_by_layer]
        )
    return np.array(found)


@pytest.mark.parametrize("method", list(Method))
def test_specs_and_kernels_agree(placement, method):
    wanted = losses(placement, method, LayerSpec.local, KernelImpl.reference)
    assert wanted[2, 0] < wanted[0, 0] - 0.01
    kernels = losses(placement, method, LayerSpec.local, KernelImpl.auto)
    # bf16 keeps 8 bits: a mean over thousands of tokens agrees far better, a norm of gradients a little less well.
    np.testing.assert_allclose(kernels[:, 0], wanted[:, 0], rtol=1e-3)
    np.testing.assert_allclose(kernels[:, 1:], wanted[:, 1:], rtol=3e-2)
    pytest.importorskip("transformer_engine")
    engine = losses(placement, method, LayerSpec.transformer_engine, KernelImpl.auto)
    np.testing.assert_allclose(engine[:, 0], wanted[:, 0], rtol=1e-3)
    np.testing.assert_allclose(engine[:, 1:], wanted[:, 1:], rtol=3e-2)


@pytest.mark.parametrize("spec", [LayerSpec.local, LayerSpec.transformer_engine])
def test_a_checkpoint_resumes_exactly(placement, spec, tmp_path):
    from ssa_pretrain.engine import build_engine

    if spec is LayerSpec.transformer_engine:
        pytest.importorskip("transformer_engine")
    config = small_config(Method.ssa, spec, KernelImpl.auto)
    engine = build_engine(config, placement, VOCAB)
    engine.train_step(random_batches(2), step=0, learning_rate=1e-3)
    engine.save(tmp_path)
    wanted = [engine.train_step(random_batches(2), step=s, learning_rate=1e-3) for s in range(1, 5)]
    other = build_engine(config, placement, VOCAB)
    other.load(tmp_path)
    found = [other.train_step(random_batches(2), step=s, learning_rate=1e-3) for s in range(1, 5)]
    assert found == wanted
    torch.cuda.synchronize()
