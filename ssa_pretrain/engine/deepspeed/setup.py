"""Prepares a process for DeepSpeed, and builds the parallel state and the optimizer that DeepSpeed takes.

DeepSpeed compiles operators on first use into a folder that all its users share, and waits forever for a lock that a killed build left there. Here
the folder belongs to this project, one per host and set of versions. A build is announced. A lock that no process holds is reported and removed. On
a CPU DeepSpeed would silently build one operator, an all-reduce through shared memory; it is disabled, because gloo does the same.
"""

import logging
import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist

from ssa_pretrain.config import AdamImpl, Config, OptimizerName
from ssa_pretrain.engine.deepspeed.muon import MuonAndAdamW, build_muon
from ssa_pretrain.model.matrices import is_hidden
from ssa_pretrain.model.mup import multipliers
from ssa_pretrain.parallel.parent import end_with_parent
from ssa_pretrain.parallel.state import Placement


class TensorParallelState:
    """megatron-core's process groups behind the interface of DeepSpeed's model-parallel unit (`mpu`)."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Returns the tensor-parallel group, the only model parallelism here."""
        return self._placement.groups.tp

    def get_model_parallel_rank(self) -> int:
        """Returns this process's rank in that group."""
        return self._placement.tp_rank

    def get_model_parallel_world_size(self) -> int:
        """Returns the group's size."""
        return self._placement.groups.tp.size()

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Returns the group that ZeRO shards over."""
        return self._placement.groups.dp

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Returns the global ranks in that group."""
        return dist.get_process_group_ranks(self._placement.groups.dp)

    def get_data_parallel_rank(self) -> int:
        """Returns this process's rank in that group."""
        return self._placement.dp_rank

    def get_data_parallel_world_size(self) -> int:
        """Returns the group's size."""
        return self._placement.dp


def prepare_process(placement: Placement) -> None:
    """Sets the environment variables that DeepSpeed reads; must run before its first import."""
    os.environ.setdefault("DS_ACCELERATOR", placement.device.type)
    if "WORLD_SIZE" not in os.environ:  # one process without a launcher: ignore the variables of a pod or a job
        os.environ["LOCAL_RANK"] = str(placement.device.index or 0)
    os.environ.setdefault("LOCAL_RANK", str(placement.device.index or 0))
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(extensions_folder()))
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    if placement.device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # otherwise compiled now, silently


def extensions_folder() -> Path:
    """Returns the folder of this project's builds of DeepSpeed's operators, for this host and these versions only."""
    from importlib.metadata import version

    name = f"torch{torch.__version__}_deepspeed{version('deepspeed')}_{socket.gethostname()}"
    return Path.home() / ".cache" / "ssa_pretrain" / "torch_extensions" / name


def exit_with_launcher() -> None:
    """Makes the kernel kill this process when its launcher dies: DeepSpeed's launcher leaves its workers running when it is killed."""
    if "WORLD_SIZE" in os.environ:
        end_with_parent(os.getppid())


def build_optimizer(model: torch.nn.Module, config: Config, placement: Placement) -> torch.optim.Optimizer:
    """Returns AdamW with weight decay for matrices and none for norms, under optim.name=muon beside Muon; call it before ZeRO-3 shards the parameters.

    Each group has the factors of its rates as `lr_mult` and `wd_mult`. The rates themselves are set at every step.
    """
    named = list(model.named_parameters())
    if config.optim.name is OptimizerName.adamw:
        return _build_adamw(named, config, placement)
    adamw = _build_adamw([pair for pair in named if not is_hidden(pair[0])], config, placement)
    return MuonAndAdamW(adamw, build_muon(config, [pair for pair in named if is_hidden(pair[0])], placement))


def _build_adamw(
    named: list[tuple[str, torch.nn.Parameter]], config: Config, placement: Placement
) -> torch.optim.Optimizer:
    """Returns AdamW over groups of equal factors: matrices, norms, and under muP the layers' matrices apart.

    Torch's fused AdamW runs one kernel per flat partition on a GPU, is vectorised on a CPU, and needs no build. `deepspeed.adam=deepspeed`
    selects DeepSpeed's FusedAdam, or CPUAdam under offload.
    """
    optim, choices = config.optim, config.deepspeed
    factors, found = multipliers(config), {}
    for name, parameter in named:
        found.setdefault(factors(name, parameter.dim()), []).append(parameter)
    groups = [
        {"params": parameters, "lr_mult": lr, "wd_mult": decay, "weight_decay": optim.weight_decay * decay}
        for (lr, decay), parameters in sorted(found.items(), key=lambda group: -group[0].weight_decay)
    ]
    # Some of DeepSpeed's optimizers step over zero gradients when they are built; with lr 0 that decays no weights.
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
    """Announces that an operator will be compiled if it is not built yet, and removes a lock that a killed build left.

    Every rank calls it. Local rank 0 acts, and the others wait.
    """
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / operator
    if os.environ["LOCAL_RANK"] == "0":
        lock = folder / "lock"
        if lock.exists() and not is_held(lock):
            print(f"removing {lock}, which a killed build left", flush=True)
            lock.unlink()
        if not list(folder.glob("*.so")):
            print(f"compiling DeepSpeed's {operator} into {folder}; this takes minutes, once", flush=True)
    dist.barrier()


def is_held(lock: Path) -> bool:
    """Returns whether a process of this host has a build's lock open: torch keeps it open while it builds."""
    target = lock.resolve()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if link.readlink() == target:
                return True
        except OSError:  # the process has ended, or belongs to another user, who cannot build in this folder
            continue
    return False


def converter_environment() -> dict[str, str]:
    """Returns the environment of a process that converts a checkpoint: it is not a rank and sees no GPU."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")} | hidden
