"""The devices that jobs run on: the GPUs of this machine with their free memory, from nvidia-smi, or the CPU. torch is not imported."""

import os
import shutil
import subprocess
from dataclasses import dataclass

import yaml

from ssa_pretrain.config import CONF
from ssa_pretrain.config.hardware import HardwareConfig
from ssa_pretrain.config.machine import has_gpu
from ssa_pretrain.errors import UsageError

QUERY = "--query-gpu=index,name,memory.total,memory.free"
SMI_SECONDS = 30.0
CPU = "cpu"


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU, or the CPU.

    Attributes:
        index: as CUDA_VISIBLE_DEVICES takes it; "cpu" for the CPU.
        name: as the driver reports it.
        free_bytes: memory that is free before the first job; infinite on a CPU, whose memory nobody plans.
    """

    index: str
    name: str = "CPU"
    free_bytes: float = float("inf")

    @property
    def is_gpu(self) -> bool:
        """Whether it is a GPU."""
        return self.index != CPU

    def environment(self) -> dict[str, str]:
        """Returns the variables that make a process use this device only."""
        return {"CUDA_VISIBLE_DEVICES": self.index} if self.is_gpu else {}


def devices(asked: str = "") -> list[Device]:
    """Returns the devices to use.

    Args:
        asked: indices with commas between them; empty: those of CUDA_VISIBLE_DEVICES, or all.

    Raises:
        UsageError: there is no such GPU.
    """
    if not has_gpu():
        if asked:
            raise UsageError(
                f"--gpus={asked} must be GPUs of this machine, which has none; leave it out to use the CPU"
            )
        return [Device(CPU)]
    found = {device.index: device for device in _query()}
    visible = asked or os.environ.get("CUDA_VISIBLE_DEVICES", "")
    wanted = [index.strip() for index in visible.split(",")] if visible else list(found)
    if wrong := [index for index in wanted if index not in found]:
        raise UsageError(f"--gpus={','.join(wrong)} must be among {','.join(found)}")
    return [found[index] for index in wanted]


def planned(hardware: str, gpus: str) -> list[Device]:
    """Returns empty GPUs of another machine, to plan for.

    Args:
        hardware: a file of conf/hardware/.
        gpus: indices with commas; empty: one.

    Raises:
        UsageError: there is no such file.
    """
    names = sorted(path.stem for path in (CONF / "hardware").glob("*.yaml"))
    if hardware not in names:
        raise UsageError(f"--hardware={hardware} must be one of {', '.join(names)}")
    known = HardwareConfig(**yaml.safe_load((CONF / "hardware" / f"{hardware}.yaml").read_text(encoding="utf-8")))
    return [Device(index.strip(), known.gpu, known.memory_gib * 2**30) for index in (gpus or "0").split(",")]


def hardware_of(device: Device) -> HardwareConfig:
    """Returns what the planner knows about a device: the file of conf/hardware whose GPU it is, else an H100."""
    for path in sorted((CONF / "hardware").glob("*.yaml")):
        hardware = HardwareConfig(**yaml.safe_load(path.read_text(encoding="utf-8")))
        if hardware.gpu == device.name:
            return hardware
    return HardwareConfig()


def _query() -> list[Device]:
    """Returns the GPUs that nvidia-smi lists. Raises UsageError if it does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        raise UsageError("nvidia-smi must be on the PATH: it reports the free memory of each GPU")
    command = [program, QUERY, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS, check=True)
    except (subprocess.SubprocessError, OSError) as error:
        raise UsageError(f"nvidia-smi must answer: {error}") from None
    return read_query(done.stdout)


def read_query(text: str) -> list[Device]:
    """Returns the GPUs of nvidia-smi's lines for QUERY."""
    rows = [[value.strip() for value in line.split(",")] for line in text.splitlines() if line.strip()]
    return [Device(index, name, int(free) * 2**20) for index, name, _, free in rows]
