"""What the kernels' configurations depend on: a GPU's maker, its compute capability, and the shared memory that one program can have.

Every choice by device goes through `gpu_of`, so that the choices for a GPU that is not present can be made and compiled too
(kernels/bench/compile.py does it, for all of `KNOWN_GPUS`). Choices are made from what a GPU has, not from its name.

Source of the sizes: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" (maximum shared memory per thread block);
AMD Instinct MI300 CDNA3 ISA Reference Guide (64 KB of LDS per work-group).
"""

from dataclasses import dataclass
from functools import cache

import torch

KIB = 1024


@dataclass(frozen=True, slots=True)
class Gpu:
    """What kernels need to know of a GPU."""

    backend: str  # of Triton: "cuda" for NVIDIA, "hip" for AMD, "interpreter" on a CPU
    capability: int  # 10 x NVIDIA's compute capability, 0 elsewhere
    shared_bytes: int  # shared memory of one program

    @property
    def has_mma_v2(self) -> bool:
        """Whether the kernels that are written for NVIDIA's mma.sync and cp.async run (compute capability 8.0 and later)."""
        return self.backend == "cuda" and self.capability >= 80

    @property
    def starts_early(self) -> bool:
        """Whether a kernel's programs can start while the kernel before ends (compute capability 9.0 and later)."""
        return self.backend == "cuda" and self.capability >= 90


INTERPRETER = Gpu("interpreter", 0, 227 * KIB)  # plans as Hopper does

# The architectures that the kernels are compiled for in tests, by Triton's name.
KNOWN_GPUS = {
    "sm_80": Gpu("cuda", 80, 163 * KIB),  # A100
    "sm_89": Gpu("cuda", 89, 99 * KIB),  # L40S, L4; the A10 and others of 8.6 have the same limits
    "sm_90": Gpu("cuda", 90, 227 * KIB),  # H100, H200
    "sm_100": Gpu("cuda", 100, 227 * KIB),  # B200, GB200
    "sm_103": Gpu("cuda", 103, 227 * KIB),  # B300, GB300
    "sm_120": Gpu("cuda", 120, 99 * KIB),  # RTX PRO 6000 Blackwell, RTX 5090
    "gfx942": Gpu("hip", 0, 64 * KIB),  # MI300X
}


@cache
def gpu_of(device: torch.device) -> Gpu:
    """Returns what kernels need to know of a device; on a CPU, of Triton's interpreter."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    # AMD has no limit beyond the one without opting in.
    shared_bytes = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    if torch.version.hip:
        return Gpu("hip", 0, shared_bytes)
    return Gpu("cuda", 10 * properties.major + properties.minor, shared_bytes)


@cache
def multiprocessors(device: torch.device) -> int:
    """Returns the number of multiprocessors; 4 for Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def means_warps(gpu: Gpu, keys: int, dim: int) -> int:
    """Returns the warps of the kernels that sum a block of `keys` padded keys and `dim` padded features: the order of the sums depends on it."""
    if dim > 128:
        return 1 if keys * dim <= 8192 else 8
    return 4 if gpu.capability >= 100 and keys * dim > 8192 else 1
