"""Writes megatron-core's sharded checkpoints from threads of the rank itself; no process is started.

megatron-core saves through forked writers, which report to a manager process by a queue. A writer that is killed leaves its rank waiting for
that queue for ever, and a rank that is killed leaves the manager behind. Here torch's own `FileSystemWriter` writes the same format, and what is
written side by side is written by threads: copying, checksums and the writing itself run without Python's lock. Torch can start threads too, but
loses what they raise, and would publish a checkpoint without a file that did not fit the disk.

Source: megatron-core 0.16, dist_checkpointing/strategies/torch.py (`TorchDistSaveShardedStrategy`), whose planner and translation are used.
"""

import heapq
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

NUM_THREADS = 4  # and files per rank; two forked processes wrote as fast as four threads


class ThreadedStrategy(SaveShardedStrategy):
    """Saves shards in core's format "torch_dist", version 1, within this process."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    @property
    def can_handle_sharded_objects(self) -> bool:
        """Whether objects that are not tensors are saved too."""
        return True

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        """Write a state dict's shards; every rank calls it.

        Raises:
            CheckpointException: on every rank, if any could not write its part.
        """
        shards, *_ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        save(
            mcore_to_pyt_state_dict(shards, False),
            storage_writer=ThreadedWriter(Path(checkpoint_dir)),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


class ThreadedWriter(FileSystemWriter):
    """torch's writer with up to NUM_THREADS files written side by side, any of whose failures is raised."""

    def __init__(self, folder: Path) -> None:
        # Torch copies ahead on a CUDA stream only where its writer is the only thread.
        super().__init__(folder, thread_count=1, per_thread_copy_ahead=0)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Return what was written of this rank's plan."""
        write_one, prefix = super().write_data, plan.storage_data.prefix

        def write(number: int, items: list[WriteItem]) -> list[WriteResult]:
            storage = replace(plan.storage_data, prefix=f"{prefix}{number}_")
            try:
                return write_one(replace(plan, items=items, storage_data=storage), planner).wait()
            except (
                RuntimeError
            ) as error:  # "unexpected pos 704 vs 598", raised while torch handles the system's own error
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None

        files = spread(plan.items, NUM_THREADS)
        device = torch.cuda.current_device()
        with ThreadPoolExecutor(NUM_THREADS, initializer=_use, initargs=(device,)) as threads:
            written = list(threads.map(write, range(len(files)), files))
        done: Future[list[WriteResult]] = Future()
        done.set_result([result for results in written for result in results])
        return done


def spread(items: list[WriteItem], num_files: int) -> list[list[WriteItem]]:
    """Return items by the file that takes them: the largest first, each into the file with the fewest bytes so far; no file is empty."""
    files: list[list[WriteItem]] = [[] for _ in range(num_files)]
    loads = [(0, number) for number in range(num_files)]
    for item in sorted(items, key=_bytes, reverse=True):
        load, number = heapq.heappop(loads)
        files[number].append(item)
        heapq.heappush(loads, (load + _bytes(item), number))
    return [file for file in files if file]


def _bytes(item: WriteItem) -> int:
    """A tensor shard's size; 0 of another object."""
    shard = item.tensor_data
    return math.prod(shard.chunk.sizes) * shard.properties.dtype.itemsize if shard is not None else 0


def _use(device: int | torch.device) -> None:
    """Set a thread's GPU to its rank's: a thread begins with the first one, and would take memory there."""
    if torch.cuda.is_available():
        torch.cuda.set_device(device)
