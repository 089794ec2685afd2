"""A step that is not finite, on a GPU: the device skips it without a wait, bit for bit, and it counts nowhere; a run without one trains as before."""

import itertools
from copy import deepcopy

import numpy as np
import pytest
import torch

from ssa_pretrain.config import Config, KernelImpl, LayerSpec, Method, OptimizerName
from support.errors import relative
from support.small_model import VOCAB, random_batches, small_config

pytestmark = pytest.mark.gpu
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
KINDS = [(True, OptimizerName.adamw), (False, OptimizerName.adamw), (True, OptimizerName.muon)]


@pytest.fixture(scope="module")
def placement():
    """One process on one GPU."""
    from ssa_pretrain.parallel.state import start, stop

    yield start(Config().parallel, seed=1)
    stop()


def build(placement, *, distributed: bool = True, optimizer: OptimizerName = OptimizerName.adamw):
    """Returns a new engine of the small model with the plain layers, so that only the optimizer may differ."""
    from ssa_pretrain.engine import build_engine

    config = small_config(Method.ssa, LayerSpec.local, KernelImpl.auto)
    config.engine.distributed_optimizer, config.optim.name = distributed, optimizer
    config.training.max_skipped_steps = 10
    return build_engine(config, placement, VOCAB)


def spoil_gradients(engine, steps: set[int]) -> None:
    """Makes one element of one gradient NaN in these updates, counted from 1; queued like everything else in a step."""
    forward_backward, done = engine.forward_backward, []

    def spoiled(batches, *, step):
        sums = forward_backward(batches, step=step)
        done.append(step)
        if len(done) in steps:
            engine.chunks[0].buffers[0].grad_data[:1].fill_(torch.nan)
        return sums

    engine.forward_backward = spoiled


def inner(engine) -> list:
    """Returns the torch or Transformer Engine optimizers inside core's."""
    from ssa_pretrain.engine.megatron.checkpoint import inner_optimizers

    return inner_optimizers(engine.optimizer)


def tensors(engine) -> list[torch.Tensor]:
    """Returns copies of all weights, fp32 weights and moments."""
    found = [p.detach().clone() for model in engine.models for p in model.parameters()]
    for optimizer in inner(engine):
        found += [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
        found += [state[name].clone() for state in optimizer.state.values() for name in MOMENTS if name in state]
    return found


def counts(engine) -> set[int]:
    """Returns Adam's step counts: torch's are beside the moments, Transformer Engine's in the groups. Loading leaves one in torch's groups too."""
    engine.optimizer.count_skipped_steps()
    states = {int(state["step"]) for o in inner(engine) for state in o.state.values() if "step" in state}
    return states or {int(group["step"]) for o in inner(engine) for group in o.param_groups if "step" in group}


def step(engine, number: int):
    """Queues a step."""
    return engine.train_step(random_batches(2), step=number, learning_rate=1e-3)


@pytest.mark.parametrize(("distributed", "optimizer"), KINDS)
def test_skipped_step_changes_no_bit_and_counts_nowhere(placement, distributed, optimizer):
    engine = build(placement, distributed=distributed, optimizer=optimizer)
    spoil_gradients(engine, {1, 4, 5})
    results, before = [], []
    for number in range(7):
        results.append(step(engine, number).result())
        before.append(tensors(engine))
    same = [all(torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(before)]
    assert [result.was_skipped for result in results] == [True, False, False, True, True, False, False]
    assert same == [False, False, True, True, False, False]
    assert all(tensor.isfinite().all() for tensor in before[-1])
    assert counts(engine) == {4}


@pytest.mark.parametrize(("distributed", "optimizer"), KINDS)
def test_skip_adds_no_wait_for_the_device(placement, distributed, optimizer):
    engine = build(placement, distributed=distributed, optimizer=optimizer)
    spoil_gradients(engine, {6, 8, 9})
    for number in range(4):
        step(engine, number)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = [step(engine, number) for number in range(4, 10)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [p.result().was_skipped for p in pending] == [False, True, False, True, True, False]


def test_bias_corrections_do_not_count_skipped_steps(placement):
    """With the same gradients, three taken steps and five of which two are skipped end in the same bits."""
    engines = [build(placement), build(placement)]
    generator = torch.Generator(device="cuda").manual_seed(0)
    gradient = torch.randn(engines[0].chunks[0].buffers[0].grad_data.shape, generator=generator, device="cuda")
    for engine, kinds in zip(engines, ("taken taken taken", "taken skipped skipped taken taken"), strict=True):
        for kind in kinds.split():
            engine.chunks[0].zero_grad_buffer()
            engine.optimizer.zero_grad()
            data = engine.chunks[0].buffers[0].grad_data
            data.copy_(gradient)
            if kind == "skipped":
                data[:1].fill_(torch.inf)
            engine.update(1e-3)
    assert all(torch.equal(a, b) for a, b in zip(tensors(engines[0]), tensors(engines[1]), strict=True))
    assert counts(engines[0]) == counts(engines[1]) == {3}


def test_update_equals_the_one_without_a_flag(placement):
    """Transformer Engine's kernel with a flag rounds the bias corrections on the device; nothing else may differ from its kernel without one."""
    pytest.importorskip("transformer_engine")
    flagged, plain = build(placement), build(placement)
    for optimizer in inner(plain):
        transformer_engine_torch = pytest.importorskip("transformer_engine_torch")

        optimizer.multi_tensor_adam = transformer_engine_torch.multi_tensor_adam
    generator = torch.Generator(device="cuda").manual_seed(0)
    for _ in range(20):
        gradient = torch.randn(flagged.chunks[0].buffers[0].grad_data.shape, generator=generator, device="cuda")
        for engine in (flagged, plain):
            engine.chunks[0].zero_grad_buffer()
            engine.optimizer.zero_grad()
            engine.chunks[0].buffers[0].grad_data.copy_(gradient)
            engine.update(1e-3)
    for one, other in zip(tensors(flagged), tensors(plain), strict=True):
        assert relative(one.float(), other.float()) < 20 * torch.finfo(torch.float32).eps or one.dtype == torch.bfloat16


@pytest.mark.parametrize("optimizer", OptimizerName)
@pytest.mark.parametrize("skipped", [set(), {1}, {2, 3}])
def test_checkpoint_after_skipped_steps_resumes(placement, tmp_path, skipped, optimizer):
    engine = build(placement, optimizer=optimizer)
    spoil_gradients(engine, skipped)
    for number in range(3):
        step(engine, number)
    engine.save(tmp_path)
    saved, steps = tensors(engine), deepcopy(counts(engine))
    other = build(placement, optimizer=optimizer)
    spoil_gradients(other, {1})
    step(other, 0)
    other.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(saved, tensors(other), strict=True))
    assert counts(other) == steps == {3 - len(skipped)}
    found, wanted = (step(e, 3).result() for e in (other, engine))
    assert found.cross_entropy == wanted.cross_entropy and np.isfinite(found.grad_norm)
    assert counts(other) == {4 - len(skipped)}


def test_weights_that_are_not_finite_are_found(placement):
    engine = build(placement)
    step(engine, 0)
    assert engine.first_not_finite() is None
    name, weight = list(engine.models[0].named_parameters())[2]
    with torch.no_grad():
        weight.view(-1)[-1] = torch.inf
    assert engine.first_not_finite() == name
