"""Trains the small model in torch's deterministic mode, repeats a step and resumes one, and prints as JSON what differs, by stage and name.

The stages follow the data: gradients of the same step computed twice by one engine (an operator that does not repeat), states after loading (a
checkpoint that does not restore), gradients and gradient norm of the first step after it, states after that step. The first stage that is not empty
names the cause.
"""

import json
import sys
from pathlib import Path

import torch

from ssa_pretrain.config import Config, KernelImpl, LayerSpec, Method
from ssa_pretrain.engine.megatron.checkpoint import inner_optimizers
from ssa_pretrain.engine.megatron.engine import MegatronEngine
from ssa_pretrain.engine.megatron.optimizer import _norm
from ssa_pretrain.parallel.state import start, stop
from support.small_model import VOCAB, random_batches, small_config


def gradients(engine: MegatronEngine, step: int) -> dict[str, torch.Tensor]:
    """Returns copies of a step's gradients by parameter, and their norm."""
    engine.forward_backward(random_batches(2), step=step)
    found = {n: p.main_grad.clone() for model in engine.models for n, p in model.named_parameters()}
    engine.optimizer.prepare_grads()
    (optimizer,) = engine.optimizer.chained_optimizers
    norm = _norm(optimizer.get_main_grads_for_grad_norm(), engine.optimizer.get_grad_stats_parallel_group())
    return found | {"the gradient norm": norm}


def states(engine: MegatronEngine) -> dict[str, torch.Tensor]:
    """Returns copies of weights, fp32 weights, moments and step counts."""
    engine.optimizer.count_skipped_steps()
    found = {n: p.detach().clone() for model in engine.models for n, p in model.named_parameters()}
    for optimizer in inner_optimizers(engine.optimizer):
        for g, group in enumerate(optimizer.param_groups):
            found[f"step of group {g}"] = torch.tensor(group.get("step", 0))
            for i, p in enumerate(group["params"]):
                found[f"fp32 weight {g}.{i}"] = p.detach().clone()
                found |= {f"{k} {g}.{i}": torch.as_tensor(v).clone() for k, v in optimizer.state[p].items()}
    return found


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Returns the names whose tensors differ in a bit; NaN equals NaN."""
    return [name for name in one if not torch.equal(one[name].cpu().nan_to_num(), other[name].cpu().nan_to_num())]


def main(spec: LayerSpec, folder: Path) -> dict[str, list[str]]:
    """Returns the names that differ, by stage."""
    placement = start(Config().parallel, seed=1)
    torch.use_deterministic_algorithms(True)
    config = small_config(Method.ssa, spec, KernelImpl.auto)
    engine = MegatronEngine(config, placement, VOCAB)
    engine.train_step(random_batches(2), step=0, learning_rate=1e-3)
    engine.save(folder)
    saved, first, second = states(engine), gradients(engine, 1), gradients(engine, 1)
    other = MegatronEngine(config, placement, VOCAB)
    other.load(folder)
    found = {"a step repeated": differing(first, second), "states after loading": differing(saved, states(other))}
    found["gradients after loading"] = differing(first, gradients(other, 1))
    for each in (engine, other):
        each.train_step(random_batches(2), step=1, learning_rate=1e-3).result()
    found["states after the next step"] = differing(states(engine), states(other))
    stop()
    return found


if __name__ == "__main__":
    print(json.dumps(main(LayerSpec(sys.argv[1]), Path(sys.argv[2]))))
