"""Copies megatron-core's training state to host memory, and writes it from a thread while training continues.

The files are those of a synchronous save. The collectives run on a group of the writing threads, because training uses the default group at the
same time.

Each rank copies what it owns: its shards of the distributed optimizer, and the weights of which it holds the main replica. No rank waits for
another. Core's gathering of the optimizer's shards, which a synchronous save does first, happens later in the thread. It takes the copies
instead of the live tensors, and goes through host memory (gloo, to data rank 0) instead of the GPUs. So a data rank 0 needs host memory for its copies
and once more for the whole optimizer state of its tensor and pipeline ranks.

Source: megatron-core 0.16, optimizer/distrib_optimizer.py (`sharded_state_dict`).
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from ssa_pretrain.checkpoint import writer
from ssa_pretrain.checkpoint.staging import HostCopies

MOMENTS = ("param", "exp_avg", "exp_avg_sq")  # that core saves of each parameter
THROUGH_HOST = {"distrib_optim_fully_reshardable_mem_efficient": True}
Shards = dict[torch.nn.Parameter, dict[str, Tensor]]


def take(
    model: ShardedStateDict, optimizer, copies: HostCopies, metadata: dict[str, Any]
) -> Callable[[Path, dist.ProcessGroup], None]:
    """Queues the copies of a rank's state and returns the function that writes them.

    Args:
        model: the sharded state of the model's chunks, with live tensors.
        optimizer: core's chained optimizer.
        copies: receive the tensors; the caller waits for them before it writes.
        metadata: of the checkpoint's content.
    """
    state = _copied("model", model, copies)
    distributed = optimizer.chained_optimizers[0]
    if not isinstance(distributed, DistributedOptimizer):
        live = optimizer.sharded_state_dict(model, metadata=dict(metadata))
        state["optimizer"] = _copied("optimizer", live, copies)
        return lambda folder, group: writer.write(folder, state, dict(metadata), group)
    common = copies.tree("optimizer", distributed.state_dict())
    shards = _own_shards(distributed, copies)

    def write(folder: Path, group: dist.ProcessGroup) -> None:
        moments = _gathered(distributed, shards, model, dict(metadata))
        kind = metadata["distrib_optim_sharding_type"]
        whole = common | {"param_state": moments or {}, "param_state_sharding_type": kind}
        writer.write(folder, state | {"optimizer": whole}, dict(metadata), group)

    return write


def _copied(name: str, live: ShardedStateDict, copies: HostCopies) -> ShardedStateDict:
    """Returns a sharded state with host copies of the tensors that this rank writes; those of other replicas stay live, and are not read."""
    number = iter(range(1 << 62))  # a buffer's name is its place, which does not change from save to save

    def one(leaf: Any) -> Any:
        key = f"{name}.{next(number)}"
        if isinstance(leaf, ShardedTensor | ShardedTensorFactory):
            return replace(leaf, data=copies.tensor(key, leaf.data)) if is_main_replica(leaf.replica_id) else leaf
        if isinstance(leaf, ShardedObject):
            return replace(leaf, data=copies.tree(key, leaf.data)) if is_main_replica(leaf.replica_id) else leaf
        return leaf if isinstance(leaf, ShardedBase) else copies.tree(key, leaf)

    return dict_list_map_outplace(one, live)


def _own_shards(distributed: DistributedOptimizer, copies: HostCopies) -> Shards:
    """Returns copies of this rank's shards of the fp32 weights and moments, by parameter."""
    found: Shards = {}
    for by_dtype in distributed.gbuf_ranges:
        for buckets in by_dtype.values():
            for parameter in (p for bucket in buckets for p in bucket["param_map"]):
                live = distributed._get_main_param_and_optimizer_states(parameter)
                place = len(found)
                found[parameter] = {key: copies.tensor(f"shard.{place}.{key}", live[key]) for key in MOMENTS}
    return found


def _gathered(
    distributed: DistributedOptimizer, shards: Shards, model: ShardedStateDict, metadata: dict[str, Any]
) -> ShardedStateDict | None:
    """Returns the optimizer's whole tensors on data rank 0, gathered from all ranks' copies; None elsewhere."""
    stand_in = copy.copy(distributed)
    stand_in._get_main_param_and_optimizer_states = shards.__getitem__
    return stand_in.sharded_param_state_fully_reshardable(model, metadata=metadata | THROUGH_HOST)
