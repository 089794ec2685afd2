"""A rank's part of the distributed optimizer as parts of whole tensors, so that it is saved and loaded without a gather.

The distributed optimizer flattens all parameters into buffers, and each data rank owns the fp32 weights and moments of one range of them. Core's
checkpoint format `fully_reshardable` stores whole tensors with the shape of the parameter. Core gets them by gathering all ranges on data rank 0, or on
all ranks, so a rank needs host memory for the whole optimizer state and one rank writes it. But a range of a flattened tensor is a
few boxes of the tensor: the rest of its first row, whole rows, and the beginning of its last row. torch's distributed checkpoints store any boxes of a
tensor, so each rank writes its own. The keys and the values are core's, and either reads what the other wrote.

Source: megatron-core 0.16, optimizer/distrib_optimizer.py (`sharded_param_state_fully_reshardable`), whose names are used.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

STATES = ("param", "exp_avg", "exp_avg_sq")  # that core saves of each parameter
SHARDING = "fully_reshardable"
Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes


def state_of(optimizer, model: ShardedStateDict, metadata: dict[str, Any], *, is_loading: bool = False) -> Any:
    """Returns the sharded state of core's chained optimizer, with live tensors that loading overwrites in place.

    Args:
        optimizer: core's chained optimizer; its moments exist.
        model: the sharded state of the model's chunks, with live tensors.
        metadata: of the checkpoint's content.
        is_loading: whether the state is to be read.
    """
    distributed = optimizer.chained_optimizers[0]
    if not isinstance(distributed, DistributedOptimizer):
        return optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=dict(metadata))
    shards = {"param_state": _shards(distributed, model), "param_state_sharding_type": SHARDING}
    return distributed.state_dict() | shards


def _shards(distributed: DistributedOptimizer, model: ShardedStateDict) -> dict[str, list[ShardedTensor]]:
    """Returns the boxes of each state that this rank owns."""
    leaves, _ = extract_sharded_tensors_and_factories(model)
    places = {leaf.data: leaf for leaf in nested_values(leaves)}
    found: dict[str, list[ShardedTensor]] = {state: [] for state in STATES}
    for by_dtype in distributed.gbuf_ranges:
        for buckets in by_dtype.values():
            for parameter, ranges in (item for bucket in buckets for item in bucket["param_map"].items()):
                live = distributed._get_main_param_and_optimizer_states(parameter)
                for state, own in found.items():
                    own.extend(_boxes_of(places[parameter], state, live[state], ranges["param"].start))
    return found


def _boxes_of(
    leaf: ShardedTensor | ShardedTensorFactory, state: str, shard: Tensor, start: int
) -> Iterator[ShardedTensor]:
    """Yields the boxes of a parameter's state that a rank owns.

    Args:
        leaf: the parameter's place in the model's whole tensors.
        state: one of `STATES`.
        shard: (N,), live: the elements `start` to `start + N` of the flattened parameter.
        start: see `shard`.
    """
    key, replica = f"optimizer.state.{state}.{leaf.key}", (*leaf.replica_id[:-1], 0)  # no data rank has a replica
    stand_in = torch.empty(leaf.data.shape, dtype=shard.dtype, device="meta")
    if isinstance(leaf, ShardedTensorFactory):  # the two halves of a SwiGLU's weight are apart in the whole tensor
        parts = nested_values(leaf.build_fn(key, stand_in, replica, None))
    else:
        parts = [replace(leaf, key=key, data=stand_in, dtype=shard.dtype, replica_id=replica)]
    for part in parts:
        assert part.data.is_contiguous(), part
        begin, prepended = part.data.storage_offset(), part.prepend_axis_num
        first = max(start, begin)
        last = min(start + shard.numel(), begin + part.data.numel())
        for offsets, sizes in boxes(tuple(part.data.shape), first - begin, last - begin):
            data = shard[first - start :][: math.prod(sizes)].view((1,) * prepended + sizes)
            first += data.numel()
            corner = (0,) * prepended + offsets
            yield replace(
                part,
                data=data,
                local_shape=tuple(data.shape),
                global_offset=tuple(a + b for a, b in zip(part.global_offset, corner, strict=True)),
                axis_fragmentations=None,  # core's word for: the parts form no grid
                prepend_axis_num=0,
            )


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Yields the fewest boxes, in order, whose elements are those from `start` to `stop` of a flattened tensor of this shape."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    inner = math.prod(shape[1:])
    row, last_row = start // inner, stop // inner
    if start % inner:
        middle = min(stop, (row + 1) * inner)
        yield from _in_row(row, boxes(shape[1:], start - row * inner, middle - row * inner))
        row, start = row + 1, middle
    if row < last_row:
        yield (row, *(0,) * (len(shape) - 1)), (last_row - row, *shape[1:])
        start = last_row * inner
    if start < stop:
        yield from _in_row(last_row, boxes(shape[1:], 0, stop - start))


def _in_row(row: int, found: Iterable[Box]) -> Iterator[Box]:
    return (((row, *offsets), (1, *sizes)) for offsets, sizes in found)
