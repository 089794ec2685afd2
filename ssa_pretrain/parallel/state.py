"""This process's start and stop, its parallel degrees and its process groups. The only module that uses megatron-core's parallel state."""

import datetime
import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from ssa_pretrain.config import ParallelConfig
from ssa_pretrain.config.machine import has_gpu
from ssa_pretrain.parallel import cpu_backend
from ssa_pretrain.parallel.store import hosted_store, is_loopback, keep_on_loopback
from ssa_pretrain.settings.problems import ConfigError, Problem


@dataclass(frozen=True, slots=True)
class Placement:
    """This process's coordinates.

    Attributes:
        rank, world_size: over all processes.
        device: the device that this process computes on.
        groups: megatron-core's process groups.
        tp_rank, pp_rank, dp_rank: coordinates along the mesh axes.
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
    def is_rank_0(self) -> bool:
        """Whether this process does the work that only one process may do, such as writing records."""
        return self.rank == 0


def start(parallel: ParallelConfig, *, seed: int) -> Placement:
    """Joins the process group and builds megatron-core's groups; a process without a launcher is a world of one.

    Args:
        parallel: degrees; tp * pp * cp must divide the world size.
        seed: for megatron-core's random states, which our code never draws from.

    Raises:
        ConfigError: torch cannot use the GPU, there are fewer GPUs than processes, or another program uses the rendezvous port.
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
    """Returns this process's rank on its node; 0 if no launcher has set WORLD_SIZE, whatever else the environment contains."""
    return int(os.environ.get("LOCAL_RANK", "0")) if "WORLD_SIZE" in os.environ else 0


def _require_usable(on_gpu: bool, local_rank: int) -> None:
    """Raises ConfigError if this process would compute on a CPU although there is a GPU, or has no GPU for its local rank."""
    if on_gpu and local_rank >= (count := torch.cuda.device_count()):
        rule = f"has no GPU: this process sees {count} GPU{'s' if count > 1 else ''}"
        advice = f"start at most {count} processes per node, or check CUDA_VISIBLE_DEVICES"
        raise ConfigError([Problem("LOCAL_RANK", local_rank, rule, advice)])
    if on_gpu and torch.version.hip:
        rule = "is AMD's: no training run was tested on one, though the operators of ssa_kernels compile for gfx942 (MI300X)"
        advice = "try an NVIDIA GPU, or HIP_VISIBLE_DEVICES= to compute on the CPU"
        raise ConfigError(
            [Problem(f"this machine's GPU, {torch.cuda.get_device_name(local_rank)},", None, rule, advice)]
        )
    if on_gpu or not has_gpu():
        return
    try:
        torch.cuda.init()
        reason = "it finds none"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
    advice = "check nvidia-smi and CUDA_VISIBLE_DEVICES, or set CUDA_VISIBLE_DEVICES= to compute on the CPU"
    raise ConfigError([Problem("this machine's GPU", None, f"cannot be used by torch: {reason}", advice)])


@contextmanager
def joined(parallel: ParallelConfig, *, seed: int) -> Iterator[Placement]:
    """Yields this process's placement and leaves the process group at the end.

    Leaving waits for the other processes. A process that fails does not wait: the others may be in a collective that needs it, and their launcher
    ends them once it has exited.
    """
    placement = start(parallel, seed=seed)
    try:
        yield placement
    except BaseException:
        if placement.world_size == 1:
            stop()
        raise
    stop()


def reset_layout() -> None:
    """Drops the degrees so that `start` can set others; the processes stay joined, because a launcher's store remembers earlier members."""
    parallel_state.destroy_model_parallel()


def stop() -> None:
    """Leaves the process group."""
    reset_layout()
    if dist.is_initialized():
        dist.destroy_process_group()


def timeout(parallel: ParallelConfig) -> datetime.timedelta:
    """Returns how long a rank waits for the others in a collective."""
    return datetime.timedelta(minutes=parallel.timeout_minutes)


def limit_waiting(parallel: ParallelConfig) -> None:
    """Sets the configured timeout on every process group, including those that libraries built with torch's default."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout(parallel), group)


def _join(backend: str, limit: datetime.timedelta) -> None:
    if "WORLD_SIZE" not in os.environ:  # no launcher, no network: a store inside this process
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=limit)
        return
    try:
        dist.init_process_group(backend, **_meeting_point(limit), timeout=limit)
    except (dist.DistNetworkError, OSError) as error:
        if "EADDRINUSE" not in str(error) and getattr(error, "errno", None) != errno.EADDRINUSE:
            raise
        rule = f"is in use by another program on {socket.gethostname()}"
        advice = "try another: --master-port of launchers/deepspeed.sh, MASTER_PORT elsewhere"
        raise ConfigError([Problem("MASTER_PORT", os.environ.get("MASTER_PORT"), rule, advice)]) from None


def _meeting_point(limit: datetime.timedelta) -> dict[str, Any]:
    """Returns the arguments that make torch use the store of rank 0, on one interface; none if a launcher or another rank hosts the store."""
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if is_loopback(host):
        keep_on_loopback()
    hosted_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if hosted_by_launcher or os.environ.get("RANK") != "0" or not host or not port.isdecimal():
        return {}
    world_size = int(os.environ["WORLD_SIZE"])
    hosted = hosted_store(host, int(port), world_size=world_size, timeout=limit)
    # Torch's own prefix, which the other ranks use.
    store = dist.PrefixStore("default_pg", hosted)  # pyright: ignore[reportPrivateImportUsage]
    return {"store": store, "rank": 0, "world_size": world_size}
