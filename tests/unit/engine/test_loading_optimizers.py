"""Optimizers of the megatron-core engine that load a checkpoint: moments and step count are the checkpoint's, the groups' settings the run's.

Transformer Engine's FusedAdam needs a GPU. Here a stand-in for it has its groups, its count of steps and its loading, and core is told that it is there.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

from ssa_pretrain.config import Config
from support.layout_worker import LENGTH, VOCAB, batches, configure

RATE = 1e-2
SMALL = {"model.num_layers": 1, "attention.method": "full", "training.global_batch_tokens": LENGTH}
KINDS = {  # of core's wrappers
    "distributed": {"engine.distributed_optimizer": True},
    "whole": {"engine.distributed_optimizer": False},
    "whole_bf16": {"engine.distributed_optimizer": False, "precision.name": "bf16"},
}
RATES = {"optim.lr": 2e-3, "optim.min_lr": 1e-4}
CONSTANTS = {"optim.beta1": 0.5, "optim.beta2": 0.6, "optim.eps": 1e-3}
NEWER_KEYS = ("max_lr", "min_lr", "wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")


class FusedAdamStandIn(torch.optim.Optimizer):
    """AdamW with FusedAdam's groups: `bias_correction`, and an integer `step` that a group has after its first step."""

    def __init__(self, params, lr, betas, eps, weight_decay, *, adam_w_mode: bool, capturable: bool = False) -> None:
        assert adam_w_mode and not capturable
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": True}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Updates every group."""
        for group in self.param_groups:
            assert group["bias_correction"]
            group["step"] = group.get("step", 0) + 1
            assert type(group["step"]) is int  # the kernel takes no other
            (beta1, beta2), count = group["betas"], group["step"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                for name in () if state else ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(p)
                assert state.keys() == {"exp_avg", "exp_avg_sq"}
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].lerp_(p.grad.square(), 1 - beta2)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                divisor = (state["exp_avg_sq"] / (1 - beta2**count)).sqrt() + group["eps"]
                p.sub_(group["lr"] / (1 - beta1**count) * state["exp_avg"] / divisor)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes moments only."""
        assert all(state.keys() == {"exp_avg", "exp_avg_sq"} for state in state_dict["state"].values())
        super().load_state_dict(state_dict)


@pytest.fixture(scope="module")
def placement():
    """One process."""
    from ssa_pretrain.parallel.state import start, stop

    yield start(Config().parallel, seed=1)
    stop()


@contextmanager
def fused_adam() -> Iterator[None]:
    """Lets core build the stand-in, and save and load it as FusedAdam."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "Adam", FusedAdamStandIn)
        patch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", False)
        patch.setattr(distrib_optimizer, "Adam", FusedAdamStandIn)
        patch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
        patch.setattr(distrib_optimizer, "USING_TE_OPTIMIZER", True)
        yield


ADAMS = {"torch": nullcontext, "fused": fused_adam}


def build(placement, settings: dict) -> Any:
    """Returns a new engine."""
    from ssa_pretrain.engine import build_engine

    return build_engine(configure(SMALL | settings), placement, VOCAB)


def train(engine, *steps: int) -> None:
    """Takes steps."""
    for step in steps:
        engine.train_step(batches(engine.config, 0, 1, step), step=step, learning_rate=RATE).result()


def groups(engine) -> list[dict[str, Any]]:
    """Returns the settings of the optimizer's groups."""
    found = engine.optimizer.param_groups
    return [{key: value for key, value in group.items() if key not in ("params", "step")} for group in found]


def counts(engine) -> set[float]:
    """Returns AdamW's step counts."""
    from ssa_pretrain.engine.megatron.checkpoint import inner_optimizers

    (inner,) = inner_optimizers(engine.optimizer)
    if isinstance(inner, torch.optim.AdamW):
        return {float(state["step"]) for state in inner.state.values()}
    return {group["step"] for group in inner.param_groups}


def weights(engine) -> torch.Tensor:
    """Returns a copy of the weights."""
    return torch.cat([p.detach().flatten() for model in engine.models for p in model.parameters()])


def moments(folder) -> list[str]:
    """Returns the names of the second moments in a checkpoint."""
    names = FileSystemReader(folder).read_metadata().state_dict_metadata
    return [name for name in names if "exp_avg_sq" in name]


@pytest.mark.parametrize("kind", ("distributed", "whole"))
def test_core_that_finds_groups_by_their_rates_finds_them(kind, placement, tmp_path, monkeypatch):
    """core 0.19 looks for a group with the run's max_lr and min_lr among the saved ones; core 0.16 can be told to."""
    from megatron.core.optimizer import distrib_optimizer, optimizer

    for module in (distrib_optimizer, optimizer):
        monkeypatch.setattr(module, "param_group_identifier_keys", NEWER_KEYS)
    first, branch = build(placement, KINDS[kind]), build(placement, KINDS[kind] | RATES)
    train(first, 0)
    first.save(tmp_path)
    branch.load(tmp_path)
    for engine in (first, branch):
        train(engine, 1)
    assert torch.equal(weights(branch), weights(first)), "the rate of a step is an argument"
    assert {(group["max_lr"], group["min_lr"]) for group in groups(branch)} == {tuple(RATES.values())}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adam", ADAMS)
def test_branch_steps_with_its_own_constants(adam, kind, placement, tmp_path):
    with ADAMS[adam]():
        first, branch = build(placement, KINDS[kind]), build(placement, KINDS[kind] | RATES | CONSTANTS)
        wanted = groups(branch)
        train(first, 0)
        first.save(tmp_path)
        branch.load(tmp_path)
        assert {(group["betas"], group["eps"]) for group in groups(branch)} == {((0.5, 0.6), 1e-3)}
        assert groups(branch) == wanted
        for group in first.optimizer.param_groups:  # the same change by hand
            group |= {"betas": (0.5, 0.6), "eps": 1e-3}
        for engine in (first, branch):
            train(engine, 1)
        assert torch.equal(weights(branch), weights(first)) and counts(branch) == {2}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("writes", "reads"), [("torch", "fused"), ("fused", "torch")])
def test_adamw_continues_what_the_other_implementation_wrote(writes, reads, kind, placement, tmp_path):
    """After two steps the count is an integer per group for one, and a tensor per parameter for the other; a third step shows both."""
    with ADAMS[writes]():
        first = build(placement, KINDS[kind])
        train(first, 0, 1)
        first.save(tmp_path)
        before = weights(first)
        train(first, 2)
    with ADAMS[reads]():
        second = build(placement, KINDS[kind])
        wanted = groups(second)
        second.load(tmp_path)
        assert groups(second) == wanted and torch.equal(weights(second), before)
        train(second, 2)
    assert counts(second) == counts(first) == {3}
    moved, theirs = weights(second) - before, weights(first) - before
    assert (moved - theirs).norm() < (2**-7 if "bf16" in kind else 1e-4) * theirs.norm()


@pytest.mark.parametrize("kind", ("distributed", "whole"))
@pytest.mark.parametrize("adam", ADAMS)
def test_checkpoint_before_the_first_step_has_moments(adam, kind, placement, tmp_path):
    """Every step so far was skipped on purpose."""
    with ADAMS[adam]():
        first, second = build(placement, KINDS[kind]), build(placement, KINDS[kind])
        first.save(tmp_path)
        train(second, 0)
        second.load(tmp_path)
        assert counts(second) == {0}
        for engine in (first, second):
            train(engine, 0)
        assert torch.equal(weights(second), weights(first)) and counts(second) == {1}
    assert moments(tmp_path)


def test_muon_keeps_its_own_settings(placement, tmp_path):
    muon = {"optim.name": "muon"}
    first, branch = build(placement, muon), build(placement, muon | RATES | CONSTANTS)
    wanted = groups(branch)
    train(first, 0)
    first.save(tmp_path)
    branch.load(tmp_path)
    assert [group.keys() for group in groups(branch)] == [group.keys() for group in wanted]
    assert groups(branch) == wanted and any(group.get("betas") == (0.5, 0.6) for group in wanted)
