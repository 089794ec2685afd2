"""The engine on one GPU: both layer specs and both kernel implementations train alike in bf16, and a step waits for nothing it need not."""

import numpy as np
import pytest
import torch
from small_model import VOCAB, random_batches, small_config

from ssa_pretrain.config import Config, KernelImpl, LayerSpec, Method

pytestmark = pytest.mark.gpu


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
    check(kernels, wanted)
    pytest.importorskip("transformer_engine")
    engine = losses(placement, method, LayerSpec.transformer_engine, KernelImpl.auto)
    check(engine, wanted)


def check(found: np.ndarray, wanted: np.ndarray) -> None:
    """Fail unless the first step agrees closely; Adam's first updates have the size of the rate whatever the gradient, so noise moves the later ones."""
    np.testing.assert_allclose(found[:, 0], wanted[:, 0], rtol=1e-3)
    np.testing.assert_allclose(found[0, 1:], wanted[0, 1:], rtol=2e-2)
    np.testing.assert_allclose(found[1:, 1:], wanted[1:, 1:], rtol=1e-1)


@pytest.mark.parametrize("spec", [LayerSpec.local, LayerSpec.transformer_engine])
def test_a_checkpoint_resumes(placement, spec, tmp_path):
    """The first step is the same to the bit; cuDNN's attention adds dQ up in an order of its own each time, so later ones nearly are.

    A wrong count of steps or moments would move the cross entropy, which falls by 0.3 a step, far more.
    """
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
    assert found[0].cross_entropy == wanted[0].cross_entropy
    assert found[0].alignment_by_layer == wanted[0].alignment_by_layer
    assert found[0].captured_mass_by_layer == wanted[0].captured_mass_by_layer
    np.testing.assert_allclose([r.grad_norm for r in found], [r.grad_norm for r in wanted], rtol=1e-2)
    np.testing.assert_allclose([r.cross_entropy for r in found], [r.cross_entropy for r in wanted], rtol=1e-3)
    torch.cuda.synchronize()
