"""Transformer Engine's FusedAdam loads a checkpoint of torch's AdamW and the reverse, and one from before the first step. On a CPU: tests/unit/engine."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

from ssa_pretrain.config import Config, KernelImpl, LayerSpec, Method
from support.small_model import VOCAB, random_batches, small_config

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def placement():
    """One process on one GPU with Transformer Engine."""
    pytest.importorskip("transformer_engine")
    from ssa_pretrain.parallel.state import start, stop

    yield start(Config().parallel, seed=1)
    stop()


@contextmanager
def torch_adamw():
    """Lets core build, save and load torch's AdamW, as it does without Transformer Engine."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", True)
        patch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", False)
        patch.setattr(distrib_optimizer, "USING_TE_OPTIMIZER", False)
        yield


ADAMS = {"torch": torch_adamw, "fused": nullcontext}


def build(placement, *, distributed: bool):
    """Returns a new engine of the small model with the plain layers."""
    from ssa_pretrain.engine import build_engine

    config = small_config(Method.full, LayerSpec.local, KernelImpl.auto)
    config.engine.distributed_optimizer, config.training.max_skipped_steps = distributed, 10
    return build_engine(config, placement, VOCAB)


def train(engine, *steps: int) -> None:
    """Takes steps."""
    for step in steps:
        engine.train_step(random_batches(2), step=step, learning_rate=1e-3).result()


def weights(engine) -> torch.Tensor:
    """Returns a copy of the fp32 weights."""
    return torch.cat([p.detach().flatten() for group in engine.optimizer.param_groups for p in group["params"]])


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize(("writes", "reads"), [("torch", "fused"), ("fused", "torch")])
def test_adamw_continues_what_the_other_implementation_wrote(placement, tmp_path, writes, reads, distributed):
    """A lost moment or step count moves the weights by a different length."""
    with ADAMS[writes]():
        first = build(placement, distributed=distributed)
        train(first, 0, 1)
        first.save(tmp_path)
        before = weights(first)
        train(first, 2)
    with ADAMS[reads]():
        second = build(placement, distributed=distributed)
        second.load(tmp_path)
        assert torch.equal(weights(second), before)
        train(second, 2)
    moved, theirs = weights(second) - before, weights(first) - before
    assert (moved - theirs).norm() < 1e-2 * theirs.norm()


@pytest.mark.parametrize("distributed", [True, False])
def test_checkpoint_before_the_first_step_has_moments(placement, tmp_path, distributed):
    """Every step so far was skipped on purpose; another engine that had taken one forgets it."""
    first, second = (build(placement, distributed=distributed) for _ in range(2))
    first.save(tmp_path)
    before = weights(first)
    train(second, 0)
    second.load(tmp_path)
    for engine in (first, second):
        train(engine, 0)
    moved, theirs = weights(second) - before, weights(first) - before
    assert (moved - theirs).norm() < 1e-2 * theirs.norm()
