"""Runs the ranks of a layout on this machine's GPUs, of which several ranks may share one.

    PYTHONPATH=.:kernels:tests python tests/support/gpu_ranks.py 4 -m ssa_pretrain.train experiment=ssa_1b_8k parallel.tp=2 …

NCCL refuses two ranks of one host on one GPU. Where there are fewer GPUs than ranks, each rank therefore is a node of its own (NCCL_HOSTID), and
messages go through the loopback. So one GPU runs every layout with the real kernels and collectives; how fast, means nothing. Ranks of different
processes take turns on a GPU unless its MPS daemon runs (`nvidia-cuda-mps-control -d`), which is faster.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from support.processes import ROOT, free_port

GRACE_SECONDS = 10.0  # for the other ranks after one has failed: they may wait for it in a collective
POLL_SECONDS = 0.1


def are_shared(world_size: int) -> bool:
    """Returns whether some ranks share a GPU."""
    return torch.cuda.device_count() < world_size


def ranks(world_size: int) -> list[dict[str, str]]:
    """Returns the variables of each rank: a GPU of its own, or as a node of its own a GPU that others use too."""
    common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if not are_shared(world_size):
        return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
    common |= {"LOCAL_RANK": "0", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
    gpus = _visible()
    return [
        common | {"RANK": str(rank), "NCCL_HOSTID": f"node{rank}", "CUDA_VISIBLE_DEVICES": gpus[rank % len(gpus)]}
        for rank in range(world_size)
    ]


def run(command: list[str], world_size: int, *, timeout: float) -> None:
    """Runs a command in every rank; fails with the output of the first rank that fails.

    Args:
        command: a script's path or `-m` and a module, then arguments.
        world_size: ranks.
        timeout: seconds for all of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        for rank, code, text in _run(command, ranks(world_size), Path(folder), timeout):
            if code:
                raise AssertionError(
                    f"a worker of {world_size} ended with exit code {code}, rank {rank}:\n{text[-6000:]}"
                )


def _run(
    command: list[str], variables: list[dict[str, str]], folder: Path, timeout: float
) -> list[tuple[int, int, str]]:
    """Returns rank, exit code and output of every rank in the order in which they ended, those that had to be killed at the end."""
    deadline, running, ended = time.monotonic() + timeout, {}, []
    try:
        for rank, own in enumerate(variables):
            with (folder / str(rank)).open("w") as file:
                running[rank] = subprocess.Popen(
                    [sys.executable, *command], cwd=ROOT, env=_environment() | own, stdout=file, stderr=file
                )
        while running and time.monotonic() < deadline:
            for rank in [rank for rank, process in running.items() if process.poll() is not None]:
                ended.append((rank, running.pop(rank).returncode))
                if ended[-1][1]:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            time.sleep(POLL_SECONDS)
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    ended += [(rank, process.returncode) for rank, process in running.items()]
    return [(rank, code, (folder / str(rank)).read_text(errors="replace")) for rank, code in ended]


def _environment() -> dict[str, str]:
    """Returns what all ranks share: this checkout first on the path, no multicast, which not every host allows."""
    path = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    found = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONSAFEPATH": "1", "UB_SKIPMC": "1"}
    return {"OMP_NUM_THREADS": "1", **os.environ, **found}


def _visible() -> list[str]:
    """Returns the GPUs' names as CUDA_VISIBLE_DEVICES takes them; one empty name without a GPU."""
    listed = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return listed or [str(index) for index in range(torch.cuda.device_count())] or [""]


def main() -> int:
    """Runs a command, prints rank 0's output, or that of the first rank that failed, and returns its exit code."""
    world_size, command = int(sys.argv[1]), sys.argv[2:]
    with tempfile.TemporaryDirectory() as folder:
        ended = _run(command, ranks(world_size), Path(folder), float("inf"))
    _, code, text = next((one for one in ended if one[1]), min(ended))
    print(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
