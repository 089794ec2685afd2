"""What must hold in a process before DeepSpeed is used in it, and the two adapters it is given: parallel state and optimizer.

DeepSpeed compiles operators on first use into a folder that all its users share, and waits for ever on a lock that a killed build left there. Here
that folder is the project's own, one a host and set of versions; a build is announced; a lock that no process holds is named and removed. On a CPU
the one operator that it would build by itself, an all-reduce through shared memory, is left out: gloo does the same.
"""

import logging
import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist

from ssa_pretrain.config import AdamImpl, Config
from ssa_pretrain.parallel.parent import end_with_parent
from ssa_pretrain.parallel.state import Placement


class TensorParallelState:
    """megatron-core's process groups under the names by which DeepSpeed asks for a model-parallel unit."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Return the tensor-parallel group: the only model parallelism here."""
        return self._placement.groups.tp

    def get_model_parallel_rank(self) -> int:
        """Return the rank in it."""
        return self._placement.tp_rank

    def get_model_parallel_world_size(self) -> int:
        """Return its size."""
        return self._placement.groups.tp.size()

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Return the group that ZeRO shards over."""
        return self._placement.groups.dp

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Return its members' global ranks."""
        return dist.get_process_group_ranks(self._placement.groups.dp)

    def get_data_parallel_rank(self) -> int:
        """Return the rank in it."""
        return self._placement.dp_rank

    def get_data_parallel_world_size(self) -> int:
        """Return its size."""
        return self._placement.dp


def prepare_process(placement: Placement) -> None:
    """Set what DeepSpeed reads from its surroundings; to be called before it is imported for the first time."""
    os.environ.setdefault("DS_ACCELERATOR", placement.device.type)
    if "WORLD_SIZE" not in os.environ:  # a world of its own, whatever a pod or a job has put there
        os.environ["LOCAL_RANK"] = str(placement.device.index or 0)
    os.environ.setdefault("LOCAL_RANK", str(placement.device.index or 0))
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(extensions_folder()))
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    if placement.device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled at once, without a word


def extensions_folder() -> Path:
    """Return where this project's builds of DeepSpeed's operators lie: a folder for this host and these versions alone."""
    from importlib.metadata import version

    name = f"torch{torch.__version__}_deepspeed{version('deepspeed')}_{socket.gethostname()}"
    return Path.home() / ".cache" / "ssa_pretrain" / "torch_extensions" / name


def die_with_launcher() -> None:
    """Have the kernel end this process when the launcher that started it dies: DeepSpeed's leaves its workers behind when it is killed."""
    if "WORLD_SIZE" in os.environ:
        end_with_parent(os.getppid())


def build_optimizer(model: torch.nn.Module, config: Config, placement: Placement) -> torch.optim.Optimizer:
    """Return AdamW over the matrices, which decay, and the norms, which don't; call it before ZeRO-3 shards the parameters.

    Torch's fused AdamW is one kernel a flat partition on a GPU and vectorised on a CPU, and needs no build; `deepspeed.adam=deepspeed` takes
    DeepSpeed's FusedAdam, or CPUAdam under offload.
    """
    optim, choices = config.optim, config.deepspeed
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    # The rate is set at every step. DeepSpeed's own steps of zero gradients, which some of its optimizers take as they start, must not decay weights.
    settings = {"lr": 0.0, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}
    if choices.adam is AdamImpl.torch:
        fused = placement.device.type == "cuda" or choices.offload_optimizer
        return torch.optim.AdamW(groups, fused=fused, **settings)
    announce_build("cpu_adam" if choices.offload_optimizer else "fused_adam", placement)
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    if choices.offload_optimizer:
        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    return FusedAdam(groups, adam_w_mode=True, **settings)


def announce_build(operator: str, placement: Placement) -> None:
    """Say that an operator is about to be compiled unless it is there, and remove a lock that a killed build has left.

    Every rank calls it; the first of each host acts before the others go on.
    """
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / operator
    if os.environ["LOCAL_RANK"] == "0":
        lock = folder / "lock"
        if lock.exists() and not held(lock):
            print(f"removing {lock}, which a build that was killed has left", flush=True)
            lock.unlink()
        if not list(folder.glob("*.so")):
            print(f"compiling DeepSpeed's {operator} into {folder}; this takes minutes, once", flush=True)
    dist.barrier()


def held(lock: Path) -> bool:
    """Return whether a process of this host has a build's lock open: torch keeps it open for as long as it builds."""
    target = lock.resolve()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if link.readlink() == target:
                return True
        except OSError:  # a process that has ended, or another user's, who cannot build in this folder
            continue
    return False


def environment_of_a_converter() -> dict[str, str]:
    """Return the environment for a process beside this rank that converts a checkpoint: no rank itself, and no GPU."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")} | hidden
