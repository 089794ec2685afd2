"""Writes megatron-core's sharded checkpoints from threads of the rank itself; starts no process.

megatron-core saves through forked writers that report to a manager process through a queue. If a writer is killed, its rank waits for the queue
forever; if a rank is killed, the manager process stays. Here torch's own `FileSystemWriter` writes the same format, and threads write several files
at once: copying, checksums and writing run without Python's lock. Torch can start threads too, but it loses their exceptions and would publish a
checkpoint that lacks a file when the disk is full.

The steps are those of core's `dist_checkpointing.save`, repeated here because that function runs its collectives on the default group, and from
0.19 on uses no writer but its own. The files are the same with every version of core: what is not sharded lies in `common.pt`, which all of them read.

Source: megatron-core 0.16, dist_checkpointing/serialization.py (`save`) and strategies/torch.py (`TorchDistSaveShardedStrategy`), whose planner and
translation are used.
"""

import heapq
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.serialization import _CONTENT_METADATA_KEY
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.validation import validate_sharding_integrity
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ssa_pretrain.checkpoint.storage import patiently
from ssa_pretrain.parallel.agreement import agree

COMMON = "common.pt"  # core's name of the file with everything that is not sharded
NUM_THREADS = 4  # and files per rank; four threads write as fast as two forked processes


def write(
    folder: Path, state: ShardedStateDict, metadata: dict[str, Any], group: dist.ProcessGroup | None = None
) -> None:
    """Writes a sharded state in core's format "torch_dist", version 1, within this process; every rank calls it.

    Args:
        folder: exists and is empty.
        state: the rank's part. Core's factories in it are applied, which changes it.
        metadata: of the checkpoint's content; core keeps it.
        group: of all ranks, for the collectives of the thread that saves; None: the default group.

    Raises:
        CheckpointException, AgreedFailure: on every rank, if any rank could not write its part.
        CheckpointingException: on rank 0, if a shard would be missing or written twice.
    """
    parts = save_preprocess(state | {_CONTENT_METADATA_KEY: metadata}, validate_access_integrity=False)
    sharded, common = cast(tuple[ShardedStateDict, Any], parts)
    _require_each_shard_once(sharded, group)
    shards, *_ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    save(
        mcore_to_pyt_state_dict(shards, False),
        storage_writer=ThreadedWriter(folder),
        planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        process_group=group,
    )

    def write_rest() -> None:
        if dist.get_rank() == 0:
            torch.save(common, folder / COMMON)
            save_config(CheckpointingConfig("torch_dist", 1), str(folder))

    agree(write_rest, group)


class ThreadedWriter(FileSystemWriter):
    """Torch's writer with up to NUM_THREADS files written at once; raises the failure of any of them."""

    def __init__(self, folder: Path) -> None:
        # Torch copies ahead on a CUDA stream only if its writer is the only thread.
        super().__init__(folder, thread_count=1, per_thread_copy_ahead=0)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's plan and returns the results, already done."""
        write_one, prefix = super().write_data, plan.storage_data.prefix

        def write_once(number: int, items: list[WriteItem]) -> list[WriteResult]:
            storage = replace(plan.storage_data, prefix=f"{prefix}{number}_")
            try:
                return write_one(replace(plan, items=items, storage_data=storage), planner).wait()
            except RuntimeError as error:  # "unexpected pos 704 vs 598" hides the operating system's own error
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None

        def write(number: int, items: list[WriteItem]) -> list[WriteResult]:
            what = f"writing file {prefix}{number}_0 of {self.path}"
            return patiently(lambda: write_once(number, items), what)  # a new try begins with an empty file

        files = spread(plan.items, NUM_THREADS)
        device = torch.cuda.current_device()
        with ThreadPoolExecutor(NUM_THREADS, initializer=_set_device, initargs=(device,)) as threads:
            written = list(threads.map(write, range(len(files)), files))
        done: Future[list[WriteResult]] = Future()
        done.set_result([result for results in written for result in results])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes the list of all ranks' shards, on rank 0; a new try begins with an empty file."""
        patiently(lambda: super(ThreadedWriter, self).finish(metadata, results), f"writing {self.path}/.metadata")


def _require_each_shard_once(sharded: ShardedStateDict, group: dist.ProcessGroup | None) -> None:
    places: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(places, [shard.without_data() for shard in nested_values(sharded)], group=group)
    validate_sharding_integrity(places)


def spread(items: list[WriteItem], num_files: int) -> list[list[WriteItem]]:
    """Returns the items of each file: largest first, each to the file with the fewest bytes so far; no file is empty."""
    files: list[list[WriteItem]] = [[] for _ in range(num_files)]
    loads = [(0, number) for number in range(num_files)]
    for item in sorted(items, key=_bytes, reverse=True):
        load, number = heapq.heappop(loads)
        files[number].append(item)
        heapq.heappush(loads, (load + _bytes(item), number))
    return [file for file in files if file]


def _bytes(item: WriteItem) -> int:
    """Returns a tensor shard's size; 0 for another object."""
    shard = item.tensor_data
    return math.prod(shard.chunk.sizes) * shard.properties.dtype.itemsize if shard is not None else 0


def _set_device(device: int | torch.device) -> None:
    """Sets a thread's GPU to its rank's: threads start with GPU 0 and would allocate memory there."""
    if torch.cuda.is_available():
        torch.cuda.set_device(device)
