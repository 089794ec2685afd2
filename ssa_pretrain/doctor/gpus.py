"""The doctor's checks of GPUs: the driver, what torch can use, whether each GPU computes correctly, NCCL.

`nvidia-smi` runs as its own process, because a broken driver can hang it. A machine without GPUs is in order: runs compute on the CPU there.
"""

import os
import shutil
import subprocess
from glob import glob

from ssa_pretrain.doctor.findings import Finding, fail, ok, warn

QUERY = ("index", "name", "driver_version", "memory.used", "memory.total", "ecc.errors.uncorrected.volatile.total")
SMI_SECONDS = 30.0
BUSY_MIB = 1024
SIZE = 1024  # of the matrices of the computation that is checked
SLOWING = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_IB_DISABLE": "1", "CUDA_LAUNCH_BLOCKING": "1"}


def driver() -> list[Finding]:
    """GPUs, driver, memory in use and memory errors, from nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        if glob("/dev/nvidia[0-9]*"):
            return [warn("driver", "there are GPUs, but no nvidia-smi", "put the driver's programs on the PATH")]
        return [ok("gpu", "none: runs compute on the CPU")]
    command = [program, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return [fail("driver", f"nvidia-smi does not answer in {SMI_SECONDS:g} s", "restart the node")]
    if done.returncode:
        text = " ".join((done.stdout + done.stderr).split())[:160]
        return [fail("driver", f"nvidia-smi fails: {text}", "install or restart the driver")]
    return read_query(done.stdout)


def read_query(text: str) -> list[Finding]:
    """Returns the findings of nvidia-smi's lines for QUERY."""
    rows = [[value.strip() for value in line.split(",")] for line in text.splitlines() if line.strip()]
    if not rows:
        return [fail("gpu", "nvidia-smi lists none", "check the driver, and docker run --gpus all")]
    names = sorted({row[1] for row in rows})
    found = [ok("gpu", f"{len(rows)} x {', '.join(names)}, driver {rows[0][2]}")]
    if len(names) > 1:
        found.append(
            warn("gpu", "different GPUs in one node", "the slowest sets the speed; CUDA_VISIBLE_DEVICES chooses")
        )
    for index, _, _, used, total, errors in rows:
        if used.isdigit() and int(used) > BUSY_MIB:
            text = f"GPU {index}: {used} of {total} MiB are in use"
            found.append(warn("gpu memory", text, "nvidia-smi names the processes; end what is left of earlier runs"))
        if errors.isdigit() and int(errors) > 0:
            text = f"GPU {index}: {errors} uncorrected memory errors since the last restart"
            found.append(fail("gpu memory", text, "restart the node; replace the GPU if they come back"))
    return found


def torch_and_cuda() -> list[Finding]:
    """Whether torch can use the GPUs, the versions of CUDA and NCCL, and a product of matrices on each GPU."""
    import torch
    from torch.cuda import nccl

    visible = len(glob("/dev/nvidia[0-9]*"))
    if not torch.cuda.is_available():
        if visible and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            build = torch.version.cuda or "a CPU build"
            remedy = "install a CUDA build of torch that this driver supports, or set CUDA_VISIBLE_DEVICES= for the CPU"
            return [fail("torch and gpu", f"torch ({build}) can use none of {visible} GPUs", remedy)]
        return [ok("torch and gpu", f"torch {torch.__version__} on the CPU, {torch.get_num_threads()} threads")]
    count = torch.cuda.device_count()
    nccl_version = ".".join(map(str, nccl.version()))
    toolkit = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    found = [ok("torch and gpu", f"{count} GPUs, {toolkit}, NCCL {nccl_version}")]
    found += unsupported({torch.cuda.get_device_name(i): torch.cuda.get_device_capability(i) for i in range(count)})
    wrong = [index for index in range(count) if not _computes(index)]
    if wrong:
        text = f"GPU {', '.join(map(str, wrong))} computes a product of matrices wrongly"
        found.append(fail("gpu result", text, "take the GPU out of service"))
    apart = [f"{a}-{b}" for a in range(count) for b in range(a) if not torch.cuda.can_device_access_peer(a, b)]
    if apart:
        text = f"{len(apart)} pairs of GPUs cannot reach each other's memory, such as {apart[0]}"
        found.append(warn("peer access", text, "expect slow tensor parallelism; check nvidia-smi topo -m"))
    return found


def unsupported(capabilities: dict[str, tuple[int, int]]) -> list[Finding]:
    """Returns the findings of GPUs, by name, that the kernels do not support."""
    import torch

    if torch.version.hip:
        text = f"{', '.join(capabilities)}: no training run was tested on AMD's GPUs"
        return [
            fail(
                "gpu support",
                text,
                "use NVIDIA GPUs of compute capability 8.0 or later, or HIP_VISIBLE_DEVICES= for the CPU",
            )
        ]
    return [
        fail(
            "gpu support",
            f"{name} has compute capability {major}.{minor}, and the attention kernels need 8.0 (A100) or later",
            "use a newer GPU, or attention.impl=reference",
        )
        for name, (major, minor) in capabilities.items()
        if (major, minor) < (8, 0)
    ]


def environment() -> list[Finding]:
    """Variables of the environment that slow a run down or change where it computes."""
    found = [
        warn("environment", f"{name}={value}", f"unset {name}, unless it is there to find an error")
        for name, value in SLOWING.items()
        if os.environ.get(name) == value
    ]
    if (devices := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None and glob("/dev/nvidia[0-9]*"):
        found.append(ok("environment", f"CUDA_VISIBLE_DEVICES={devices}"))
    return found


def _computes(index: int) -> bool:
    """Returns whether a GPU multiplies small whole numbers exactly."""
    import torch

    generator = torch.Generator().manual_seed(index)
    a, b = (torch.randint(-8, 9, (SIZE, SIZE), generator=generator).double() for _ in range(2))
    return torch.equal((a.to(index) @ b.to(index)).cpu(), a @ b)
