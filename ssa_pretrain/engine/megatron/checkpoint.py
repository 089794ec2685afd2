"""Weights and optimizer through megatron-core's dist_checkpointing, readable on any layout.

Without Transformer Engine and Apex, core 0.16 runs torch's AdamW under its distributed optimizer and cannot resume by itself. It asserts a step
count on an optimizer that has not stepped. It lets all parameters share one `step` tensor, which then grows by the number of parameters at each
step. So `_init_states` gives every state a value before core looks at it, and after loading each parameter gets a count of its own.
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

METADATA = {
    "distrib_optim_sharding_type": optimizer_shards.SHARDING,
    "chained_optim_avoid_prefix": True,
}  # core modifies the dict that it is given, so it gets copies


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
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [o.optimizer for o in chained if o.optimizer is not None]


def _require_states(optimizer) -> None:
    """Gives an optimizer that has taken no step, because all were skipped, the states that a checkpoint holds."""
    if any(not inner.state for inner in inner_optimizers(optimizer)):
        _init_states(optimizer)


def _init_states(optimizer) -> None:
    """Gives torch AdamW's states the values of step 0, so that core finds the entries that it will overwrite."""
    for inner in inner_optimizers(optimizer):
        if not isinstance(inner, torch.optim.AdamW):
            continue
        for group in inner.param_groups:
            group["step"] = 0.0
            for parameter in group["params"]:
                state = inner.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)


@torch.no_grad()
def _load_optimizer(optimizer, loaded: dict) -> None:
    loaded.pop("param_state", None)  # a distributed optimizer's shards, which are in their places
    optimizer.load_state_dict(loaded)
    for state in (state for inner in inner_optimizers(optimizer) for state in inner.state.values()):
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
