"""Weights and optimizer through megatron-core's dist_checkpointing, readable on any layout.

Core 0.16 without Transformer Engine or Apex runs torch's AdamW under its distributed optimizer, and then cannot resume on its own: it asserts a
step count on an optimizer that never stepped, looks for `step` among the parameters' shards, and leaves one `step` tensor shared by all parameters,
which then grows by the number of parameters at each step. `_prime` gives every state a value before core looks at it; `_take_steps` hides the
counts while the shards are loaded and gives each parameter its own.
"""

from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.distributed import DistributedDataParallel

from ssa_pretrain.engine.checkpoint_writer import ThreadedStrategy

METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}  # core adds to what it is handed: copies


def save(folder: Path, chunks: list[DistributedDataParallel], optimizer) -> None:
    """Write weights and optimizer into `folder`, which exists and is empty."""
    state = _model_state(chunks)
    state["optimizer"] = optimizer.sharded_state_dict(state, metadata=dict(METADATA))
    dist_checkpointing.save(state, str(folder), sharded_strategy=ThreadedStrategy(), content_metadata=dict(METADATA))


def wrote(folder: Path) -> bool:
    """Return whether `save` wrote a folder."""
    return (folder / "metadata.json").is_file()


def load(folder: Path, chunks: list[DistributedDataParallel], optimizer) -> None:
    """Restore weights, and the optimizer unless it is None, from a folder written by `save`."""
    state = _model_state(chunks)
    if optimizer is not None:
        _prime(optimizer)
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=True, metadata=dict(METADATA))
    loaded = dist_checkpointing.load(state, str(folder))
    for i, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(loaded[_model_key(i, chunks)], strict=True)
    if optimizer is not None:
        _load_optimizer(optimizer, loaded["optimizer"])


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """Return the GPTModel below core's wrappers, whose parameter names do not depend on them."""
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


def _inner_optimizers(optimizer) -> list[torch.optim.Optimizer]:
    """Return the torch optimizers below core's wrappers."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [o.optimizer for o in chained]


def _prime(optimizer) -> None:
    """Give torch AdamW's states the values of step 0, so that core finds what it is about to overwrite."""
    for inner in _inner_optimizers(optimizer):
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
    shards = loaded.pop("param_state", None)
    optimizer.load_state_dict(loaded)
    steps = _take_steps(optimizer)
    if shards is not None:
        (distributed,) = optimizer.chained_optimizers
        distributed.load_parameter_state_from_fully_reshardable(shards)
    for state, step in steps:
        state["step"] = step


def _take_steps(optimizer) -> list[tuple[dict, torch.Tensor]]:
    """Remove torch AdamW's step counts, which core would look for among the loaded shards; return each with a copy of its own."""
    states = [state for inner in _inner_optimizers(optimizer) for state in inner.state.values()]
    return [(state, state.pop("step").clone()) for state in states if isinstance(state.get("step"), torch.Tensor)]
