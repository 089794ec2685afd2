"""The engine on one GPU: both layer specs and both kernel implementations train alike in bf16."""

import pytest
import torch

from ssa_pretrain.config import Config, KernelImpl, LayerSpec, Method, PrecisionName
from support.errors import require_as_near, require_means_as_near
from support.small_model import VOCAB, random_batches, scorer_gradients, small_config, train

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def placement():
    """One process on one GPU."""
    from ssa_pretrain.parallel.state import start, stop

    yield start(Config().parallel, seed=1)
    stop()


@pytest.mark.parametrize("method", list(Method))
def test_specs_and_kernels_agree(placement, method):
    """Each is about as far from fp32 as the bf16 reference."""
    exact_config = small_config(method, LayerSpec.local, KernelImpl.reference)
    exact_config.precision.name = PrecisionName.fp32
    exact = train(placement, exact_config, steps=3)
    wanted = train(placement, small_config(method, LayerSpec.local, KernelImpl.reference), steps=3)
    assert wanted.means[2, 0] < wanted.means[0, 0] - 0.01
    train(placement, small_config(method, LayerSpec.local, KernelImpl.auto), steps=3).require_as_near(wanted, exact)
    pytest.importorskip("transformer_engine")
    engine = train(placement, small_config(method, LayerSpec.transformer_engine, KernelImpl.auto), steps=3)
    engine.require_as_near(wanted, exact)


def test_gradients_of_the_scorer(placement):
    """Of each layer, in the warm-up, where no choice depends on rounding. All are mostly off by the rounding of the hidden states."""

    def gradients(
        spec: LayerSpec, impl: KernelImpl, precision: PrecisionName = PrecisionName.bf16
    ) -> list[torch.Tensor]:
        config = small_config(Method.indexer, spec, impl)
        config.precision.name = precision
        return scorer_gradients(placement, config)

    exact = gradients(LayerSpec.local, KernelImpl.reference, PrecisionName.fp32)
    wanted = gradients(LayerSpec.local, KernelImpl.reference)
    assert len(exact) == len(wanted) == 4
    for spec in (LayerSpec.local, LayerSpec.transformer_engine):
        if spec is LayerSpec.transformer_engine:
            pytest.importorskip("transformer_engine")
        found = gradients(spec, KernelImpl.auto)
        for layer, (got, low, right) in enumerate(zip(found, wanted, exact, strict=True), start=1):
            require_as_near(got, low, right, factor=1.5, name=f"{spec.value}, layer {layer}")


def test_specs_and_kernels_agree_on_queries_and_keys(placement):
    """With QK-norm and a convolution of keys: the same comparison, in both layer specs."""

    def config(spec: LayerSpec, impl: KernelImpl, precision: PrecisionName = PrecisionName.bf16) -> Config:
        found = small_config(Method.ssa, spec, impl)
        found.model.qk_norm, found.attention.key_convolution, found.precision.name = True, 3, precision
        return found

    exact = train(placement, config(LayerSpec.local, KernelImpl.reference, PrecisionName.fp32), steps=3)
    wanted = train(placement, config(LayerSpec.local, KernelImpl.reference), steps=3)
    assert wanted.means[2, 0] < wanted.means[0, 0] - 0.01
    train(placement, config(LayerSpec.local, KernelImpl.auto), steps=3).require_as_near(wanted, exact)
    pytest.importorskip("transformer_engine")
    train(placement, config(LayerSpec.transformer_engine, KernelImpl.auto), steps=3).require_as_near(wanted, exact)


@pytest.mark.parametrize("spec", [LayerSpec.local, LayerSpec.transformer_engine])
def test_checkpoint_resumes(placement, spec, tmp_path):
    """The first step is bit-identical. cuDNN's attention sums dQ in a different order each time, so later steps are only close.

    A wrong count of steps or moments would move the cross entropy, which falls by 0.3 per step, far more.
    """
    from ssa_pretrain.engine import build_engine

    if spec is LayerSpec.transformer_engine:
        pytest.importorskip("transformer_engine")
    config = small_config(Method.ssa, spec, KernelImpl.auto)
    engine = build_engine(config, placement, VOCAB)
    engine.train_step(random_batches(2), step=0, learning_rate=1e-3)
    engine.save(tmp_path)
    wanted = [engine.train_step(random_batches(2), step=s, learning_rate=1e-3).result() for s in range(1, 5)]
    other = build_engine(config, placement, VOCAB)
    other.load(tmp_path)
    found = [other.train_step(random_batches(2), step=s, learning_rate=1e-3).result() for s in range(1, 5)]
    assert found[0].cross_entropy == wanted[0].cross_entropy
    assert found[0].alignment_by_layer == wanted[0].alignment_by_layer
    assert found[0].captured_mass_by_layer == wanted[0].captured_mass_by_layer
    exact_config = small_config(Method.ssa, LayerSpec.local, KernelImpl.auto)
    exact_config.precision.name, exact_config.attention.impl = PrecisionName.fp32, KernelImpl.reference
    exact = train(placement, exact_config, steps=5).means[1:, :2]
    resumed, kept = (
        torch.tensor([[r.cross_entropy, r.grad_norm] for r in run], dtype=torch.float64) for run in (found, wanted)
    )
    require_means_as_near(resumed, kept, exact)
    torch.cuda.synchronize()


@pytest.mark.parametrize("scaled", [False, True])
def test_frequencies_are_the_same_bits_as_on_a_cpu(placement, scaled):
    """transformers computes them on the CPU too; a GPU's power function is less exact."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    from ssa_pretrain.engine import build_engine
    from ssa_pretrain.engine.megatron.checkpoint import unwrap

    config = small_config(Method.full, LayerSpec.local, KernelImpl.auto)
    config.model.rope_scaling.enabled = scaled
    rotary = unwrap(build_engine(config, placement, VOCAB).chunks[0]).rotary_pos_emb
    angles = rotary(16)[1, 0, 0]
    wanted = RotaryEmbedding(
        config.model.head_dim,
        1.0,
        rotary_base=config.model.rope_theta,
        rope_scaling=scaled,
        rope_scaling_factor=config.model.rope_scaling.factor,
        use_cpu_initialization=True,
    ).inv_freq
    assert angles.is_cuda and torch.equal(angles[: len(wanted)].cpu(), wanted)
