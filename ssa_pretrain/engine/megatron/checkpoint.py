"""Weights and optimizer through megatron-core's dist_checkpointing, readable on any layout.

Without Transformer Engine and Apex, core 0.16 runs torch's AdamW under its distributed optimizer and cannot resume by itself. It asserts a step
count on an optimizer that has not stepped. It lets all parameters share one `step` tensor, which then grows by the number of parameters at each
step. So `_init_states` gives every state a value before core looks at it, and after loading each parameter gets a count of its own.

An optimizer takes moments and step count from a checkpoint, and keeps the settings of its own groups: a branch, or a resume with other rates, may change
them. Core restores the saved ones, and core 0.19 does not find a saved group whose learning rates are others than the run's. Torch's AdamW and
Transformer Engine's FusedAdam read each other's checkpoints.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.distributed import DistributedDataParallel

from ssa_pretrain.checkpoint import writer
from ssa_pretrain.checkpoint.staging import HostCopies
from ssa_pretrain.checkpoint.unpickling import require_safe_extra_state, restricted
from ssa_pretrain.engine.megatron import optimizer_shards, snapshot
from ssa_pretrain.engine.muon import SplitMuon

METADATA = {
    "distrib_optim_sharding_type": optimizer_shards.SHARDING,
    "chained_optim_avoid_prefix": True,
}  # core modifies the dict that it is given, so it gets copies
RATES = ("max_lr", "min_lr")  # settings of a group by which core 0.19 finds it in a checkpoint, and which may change
LOADED = ("params", "step")  # what a group takes over from a checkpoint


def save(folder: Path, chunks: list[DistributedDataParallel], optimizer) -> None:
    """Writes weights and optimizer into an existing, empty folder."""
    writer.write(folder, _state(chunks, optimizer), dict(METADATA))


def copy_state(
    chunks: list[DistributedDataParallel], optimizer, copies: HostCopies
) -> Callable[[Path, dist.ProcessGroup], None]:
    """Copies weights and optimizer to host memory. Returns the function that writes what `save` writes, for a thread of every rank."""
    return snapshot.take(_state(chunks, optimizer), copies, METADATA)


def is_core_checkpoint(folder: Path) -> bool:
    """Returns whether `save` wrote a folder."""
    return (folder / "metadata.json").is_file()


def load(folder: Path, chunks: list[DistributedDataParallel], optimizer) -> None:
    """Restores the weights, and the optimizer unless it is None, from a folder that `save` wrote.

    Raises:
        UnsafePickle: the folder's files name a global that `save` never writes.
    """
    with restricted(folder):
        _load(folder, chunks, optimizer)


def _load(folder: Path, chunks: list[DistributedDataParallel], optimizer) -> None:
    state = _model_state(chunks)
    if optimizer is not None:
        _init_states(optimizer)
        state["optimizer"] = optimizer_shards.state_of(optimizer, state, METADATA, is_loading=True)
    loaded = dist_checkpointing.load(state, str(folder))
    for i, chunk in enumerate(chunks):
        weights = loaded[_model_key(i, chunks)]
        require_safe_extra_state(weights, folder)
        unwrap(chunk).load_state_dict(weights, strict=True)
    if optimizer is not None:
        _load_optimizer(optimizer, loaded["optimizer"])


def _state(chunks: list[DistributedDataParallel], optimizer) -> ShardedStateDict:
    """Returns the sharded state of weights and optimizer, with live tensors."""
    _require_states(optimizer)
    model = _model_state(chunks)
    return model | {"optimizer": optimizer_shards.state_of(optimizer, model, METADATA)}


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """Returns the GPTModel inside core's wrappers; its parameter names do not depend on them."""
    while hasattr(module, "module"):
        module = module.module
    return module


def _model_key(i: int, chunks: list) -> str:
    return "model" if len(chunks) == 1 else f"model{i}"


def _model_state(chunks: list[DistributedDataParallel]) -> ShardedStateDict:
    return {
        _model_key(i, chunks): unwrap(chunk).sharded_state_dict(metadata=dict(METADATA))
        for i, chunk in enumerate(chunks)
    }


def inner_optimizers(optimizer) -> list[torch.optim.Optimizer]:
    """Returns the torch optimizers inside core's wrappers."""
    return [wrapper.optimizer for wrapper in _wrappers(optimizer)]


def _wrappers(optimizer) -> list:
    """Returns core's wrappers that hold an optimizer."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [wrapper for wrapper in chained if wrapper.optimizer is not None]


def _require_states(optimizer) -> None:
    """Gives an optimizer that has taken no step, because all were skipped, the states that a checkpoint holds."""
    if any(not inner.state for inner in inner_optimizers(optimizer)):
        _init_states(optimizer)


def _init_states(optimizer) -> None:
    """Gives AdamW's states that do not exist yet the values of step 0: core finds the entries that it saves, or will overwrite.

    torch's AdamW or Transformer Engine's FusedAdam. Muon does this itself (muon.py).
    """
    for wrapper in _wrappers(optimizer):
        inner = wrapper.optimizer
        if isinstance(inner, SplitMuon):
            continue
        wrapper.init_state_fn(inner, wrapper.config)
        for group in inner.param_groups:
            group.setdefault("step", 0)
            for parameter in group["params"] if isinstance(inner, torch.optim.AdamW) else ():
                inner.state[parameter].setdefault("step", torch.zeros((), dtype=torch.float32))


@torch.no_grad()
def _load_optimizer(optimizer, loaded: dict) -> None:
    """Loads moments and step count; the groups keep their own settings."""
    inners = inner_optimizers(optimizer)
    own = [[{k: v for k, v in group.items() if k not in LOADED} for group in inner.param_groups] for inner in inners]
    loaded.pop("param_state", None)  # a distributed optimizer's shards, which are in their places
    adamw = loaded.get("optimizer", loaded)  # core's fp32 wrapper has no level above it
    if "param_groups" in adamw:  # Muon's checkpoint has none
        is_torch = any(isinstance(inner, torch.optim.AdamW) for inner in inners)
        _adapt(adamw, own[0][0] if own and own[0] else {}, is_torch=is_torch)
    optimizer.load_state_dict(loaded)
    for inner, settings in zip(inners, own, strict=True):
        for group, mine in zip(inner.param_groups, settings, strict=True):
            kept = {key: group[key] for key in LOADED if key in group}
            group.clear()
            group.update(mine | kept)
        for state in inner.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()


def _adapt(saved: dict, own: dict, *, is_torch: bool) -> None:
    """Makes saved groups ones that core finds for the run's, and puts the step count where the run's kind of AdamW keeps it.

    Args:
        saved: AdamW's part of a checkpoint; modified.
        own: the settings of one of the run's groups; their rates are equal.
        is_torch: torch's AdamW, which keeps a count per parameter; else FusedAdam, which keeps an integer per group.
    """
    groups, state = saved["param_groups"], saved.get("state")  # a distributed optimizer's state is elsewhere
    step = max((group.get("step", 0) for group in groups), default=0)
    if state is not None:  # torch's count is the one beside the moments; core leaves out 0
        step = state.pop("common_step", step)
        if is_torch:
            state["common_step"] = torch.tensor(float(step))
    for group in groups:
        group.update({key: own[key] for key in RATES if key in own}, step=int(step))
