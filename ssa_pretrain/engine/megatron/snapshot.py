"""Copies megatron-core's training state to host memory, and writes it from a thread while training continues.

The files are those of a synchronous save. Each rank copies and writes what it owns: its shards of the distributed optimizer (optimizer_shards.py), and the
weights of which it holds the main replica. No rank waits for another. The collectives of the writing threads run on a group of their own, because
training uses the default group at the same time.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

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

from ssa_pretrain.checkpoint import writer
from ssa_pretrain.checkpoint.staging import HostCopies


def take(
    state: ShardedStateDict, copies: HostCopies, metadata: dict[str, Any]
) -> Callable[[Path, dist.ProcessGroup], None]:
    """Queues the copies of a rank's state and returns the function that writes them.

    Args:
        state: the sharded state of weights and optimizer, with live tensors.
        copies: receive the tensors; the caller waits for them before it writes.
        metadata: of the checkpoint's content.
    """
    copied = _copied(state, copies)
    return lambda folder, group: writer.write(folder, copied, dict(metadata), group)


def _copied(live: ShardedStateDict, copies: HostCopies) -> ShardedStateDict:
    """Returns a sharded state with host copies of the tensors that this rank writes; those of other replicas stay live, and are not read."""
    number = iter(range(1 << 62))  # a buffer's name is its place, which does not change from save to save

    def one(leaf: Any) -> Any:
        key = str(next(number))
        if isinstance(leaf, ShardedTensor | ShardedTensorFactory):
            return replace(leaf, data=copies.tensor(key, leaf.data)) if is_main_replica(leaf.replica_id) else leaf
        if isinstance(leaf, ShardedObject):
            return replace(leaf, data=copies.tree(key, leaf.data)) if is_main_replica(leaf.replica_id) else leaf
        return leaf if isinstance(leaf, ShardedBase) else copies.tree(key, leaf)

    return dict_list_map_outplace(one, live)
