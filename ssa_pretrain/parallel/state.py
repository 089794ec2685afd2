"""The process's place in the machine: start, degrees, process groups, stop. The only module that talks to megatron-core's parallel state."""

import datetime
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from ssa_pretrain.config import ParallelConfig
from ssa_pretrain.config.machine import has_gpu
from ssa_pretrain.parallel import cpu_backend
from ssa_pretrain.settings.problems import ConfigError, Problem


@dataclass(frozen=True, slots=True)
class Placement:
    """Where this process stands.

    Attributes:
        rank, world_size: over all processes.
        device: what this process computes on.
        groups: megatron-core's process groups.
        tp_rank, pp_rank, dp_rank: coordinates.
        dp: data-parallel degree.
    """

    rank: int
    world_size: int
    device: torch.device
    groups: ProcessGroupCollection
    tp_rank: int
    pp_rank: int
    dp_rank: int
    dp: int

    @property
    def is_first(self) -> bool:
        """Whether this process writes what only one may write."""
        return self.rank == 0


def start(parallel: ParallelConfig, *, seed: int) -> Placement:
    """Join the process group and build megatron-core's groups; a process without a launcher is a world of one.

    Args:
        parallel: degrees; tp * pp * cp must divide the world size.
        seed: for megatron-core's random states, which nothing of ours draws from.

    Raises:
        ConfigError: there is a GPU and torch cannot use it, there are fewer than processes, or another program has the port where they meet.
    """
    on_gpu = torch.cuda.is_available()
    local_rank = launched_local_rank()
    _require_usable(on_gpu, local_rank)
    if on_gpu:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        cpu_backend.install()
    if not dist.is_initialized():
        _join("nccl" if on_gpu else "gloo", timeout(parallel))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        distributed_timeout_minutes=parallel.timeout_minutes,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Placement(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=device,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp=parallel_state.get_data_parallel_world_size(),
    )


def launched_local_rank() -> int:
    """Returns this process's number on its node; 0 where no launcher has set WORLD_SIZE, whatever else the environment holds."""
    return int(os.environ.get("LOCAL_RANK", "0")) if "WORLD_SIZE" in os.environ else 0


def _require_usable(on_gpu: bool, local_rank: int) -> None:
    """Raise ConfigError rather than compute on a CPU where a GPU is meant, or on another process's GPU."""
    if on_gpu and local_rank >= (count := torch.cuda.device_count()):
        rule = f"finds {count} GPU{'s' if count > 1 else ''} that this process may see"
        advice = f"start at most {count} processes on a node, or look at CUDA_VISIBLE_DEVICES"
        raise ConfigError([Problem("LOCAL_RANK", local_rank, rule, advice)])
    if on_gpu or not has_gpu():
        return
    try:
        torch.cuda.init()
        reason = "it sees none"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
    advice = "look at nvidia-smi and CUDA_VISIBLE_DEVICES, or set CUDA_VISIBLE_DEVICES= to compute on the CPU"
    raise ConfigError([Problem("this machine's GPU", None, f"cannot be used by torch: {reason}", advice)])


@contextmanager
def joined(parallel: ParallelConfig, *, seed: int) -> Iterator[Placement]:
    """Give this process's placement and leave the process group at the end.

    Leaving waits for the others. A process that fails does not: they may wait for it inside an operation of their own, and whoever started the
    processes ends them once it has left.
    """
    placement = start(parallel, seed=seed)
    try:
        yield placement
    except BaseException:
        if placement.world_size == 1:
            stop()
        raise
    stop()


def leave_layout() -> None:
    """Give up the degrees, so that `start` can set others; the processes stay joined, since a launcher's store remembers who joined before."""
    parallel_state.destroy_model_parallel()


def stop() -> None:
    """Leave the process group."""
    leave_layout()
    if dist.is_initialized():
        dist.destroy_process_group()


def timeout(parallel: ParallelConfig) -> datetime.timedelta:
    """Returns how long a rank waits for the others in a collective."""
    return datetime.timedelta(minutes=parallel.timeout_minutes)


def limit_waiting(parallel: ParallelConfig) -> None:
    """Gives every process group the configured timeout, also those that libraries have made with torch's own."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout(parallel), group)


def _join(backend: str, limit: datetime.timedelta) -> None:
    if "WORLD_SIZE" not in os.environ:  # no launcher, no network: a store inside this process
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=limit)
        return
    try:
        dist.init_process_group(backend, timeout=limit)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        rule = f"where the ranks meet is in use by another program on {socket.gethostname()}"
        advice = "try another: --master-port of launchers/deepspeed.sh, MASTER_PORT elsewhere"
        raise ConfigError([Problem("MASTER_PORT", os.environ.get("MASTER_PORT"), rule, advice)]) from None
