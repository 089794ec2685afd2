"""Muon on one GPU: its iterations in bf16, and whole steps under Transformer Engine's layers and core's own."""

import pytest
import torch

from ssa_pretrain.config import Config, KernelImpl, LayerSpec, Method, OptimizerName, PrecisionName
from ssa_pretrain.engine.muon import orthogonalise
from support.errors import require_as_near
from support.small_model import small_config, train

pytestmark = pytest.mark.gpu
SETTINGS = ((3.4445, -4.775, 2.0315), 5, 1e-7)


@pytest.fixture(scope="module")
def placement():
    """One process on one GPU."""
    from ssa_pretrain.parallel.state import start, stop

    yield start(Config().parallel, seed=1)
    stop()


@pytest.mark.parametrize("shape", [(2048, 2048), (128, 2048), (8192, 2048)])
def test_orthogonalisation_is_as_near_to_fp64_as_torchs(shape):
    matrix = torch.randn(shape, device="cuda")
    exact = orthogonalise(matrix.double(), *SETTINGS)
    weight = torch.nn.Parameter(torch.zeros(shape, device="cuda"))
    weight.grad = matrix.clone()
    torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
    theirs = -weight.detach() / max(1.0, shape[0] / shape[1]) ** 0.5
    require_as_near(orthogonalise(matrix.bfloat16(), *SETTINGS), theirs, exact, factor=1.05)


def test_both_layer_specs_train_as_near_to_fp32(placement):
    """Transformer Engine's layers in bf16 are about as far from fp32 as core's own, after three steps of Muon."""
    pytest.importorskip("transformer_engine")
    runs = []
    for spec, precision in (
        (LayerSpec.transformer_engine, PrecisionName.bf16),
        (LayerSpec.local, PrecisionName.bf16),
        (LayerSpec.local, PrecisionName.fp32),
    ):
        impl = KernelImpl.reference if precision is PrecisionName.fp32 else KernelImpl.auto
        config = small_config(Method.full, spec, impl)
        config.precision.name, config.optim.name = precision, OptimizerName.muon
        runs.append(train(placement, config, steps=3))
    found, baseline, exact = runs
    found.require_as_near(baseline, exact)
