"""What the rules know about the machine: GPU, libraries, launcher. Read from files and the environment, without importing torch.

A run checks again once torch is loaded and stops if torch disagrees about the GPU.
"""

import os
import re
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from ssa_pretrain.settings.problems import ConfigError, Problem, secrets_of


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine a configuration is checked against. None means unknown: rules that read the field are skipped.

    Attributes:
        world_size: processes that the launcher started.
        has_gpu: a GPU is visible and torch can use it.
        has_transformer_engine: Transformer Engine is installed.
        has_deepspeed: DeepSpeed is installed.
        has_wandb: W&B's client is installed.
        has_tensorboard: TensorBoard is installed.
        has_trackio: trackio is installed.
        has_files: data and checkpoints are on this machine and can be checked.
        splits: the splits of the data that the command reads.
        locks_folder: the command will lock output_dir for a run.
        slurm_tasks: processes that srun started without a launcher to join them; else 1.
        entry: name of the entry point, used in advice.
        secrets: the secrets in the environment, which no setting may contain.
    """

    world_size: int | None = None
    has_gpu: bool | None = None
    has_transformer_engine: bool | None = None
    has_deepspeed: bool | None = None
    has_wandb: bool | None = None
    has_tensorboard: bool | None = None
    has_trackio: bool | None = None
    has_files: bool = True
    splits: tuple[str, ...] = ("train", "heldout")
    slurm_tasks: int = 1
    entry: str = "train"
    locks_folder: bool = False
    secrets: tuple[str, ...] = field(default=(), repr=False)

    def unknown(self) -> "Machine":
        """Returns another machine to plan for: only the number of processes is known."""
        return Machine(world_size=self.world_size, has_files=False, secrets=self.secrets)


def this_machine() -> Machine:
    """Returns the machine of this process.

    Raises:
        ConfigError: the launcher's environment variables are invalid.
    """
    return Machine(
        world_size=launcher_number("WORLD_SIZE", default=1),
        has_gpu=has_gpu(),
        has_transformer_engine=find_spec("transformer_engine") is not None,
        has_deepspeed=find_spec("deepspeed") is not None,
        has_wandb=_has_package("wandb"),
        has_tensorboard=_has_package("tensorboard"),
        has_trackio=_has_package("trackio"),
        slurm_tasks=_slurm_tasks(),
        secrets=secrets_of(os.environ),
    )


def has_gpu() -> bool:
    """Returns whether the driver exposes a GPU and torch was built with CUDA."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1", "NoDevFiles")
    torch = find_spec("torch")
    if hidden or torch is None or not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg")):
        return False
    version = Path(torch.submodule_search_locations[0]) / "version.py" if torch.submodule_search_locations else None
    return version is not None and re.search(r"^cuda\b.*=\s*['\"]", version.read_text(), re.MULTILINE) is not None


def _has_package(name: str) -> bool:
    """Returns whether a package is installed. A folder of that name, such as ./wandb, has no origin."""
    found = find_spec(name)
    return found is not None and found.origin is not None


def launcher_number(name: str, *, default: int) -> int:
    """Returns a number that the launcher set in the environment.

    Args:
        name: the environment variable.
        default: value if the variable is not set; also the smallest valid one.

    Raises:
        ConfigError: the variable is not a whole number from `default` on.
    """
    given = os.environ.get(name, str(default))
    if given.isdecimal() and int(given) >= default:
        return int(given)
    rule = f"in the environment must be a whole number from {default} on"
    raise ConfigError([Problem(name, given, rule, f"unset {name}, or start with launchers/torchrun.sh, which sets it")])


def _slurm_tasks() -> int:
    """Returns the number of tasks of this Slurm step, or of the job outside a step; 1 if a launcher joins the processes."""
    if "WORLD_SIZE" in os.environ:
        return 1
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1"))
    return int(tasks) if tasks.isdigit() else 1
