"""Runs the ranks of a layout on this machine's GPUs, of which several ranks may share one.

    PYTHONPATH=.:kernels:tests python tests/support/gpu_ranks.py 4 -m ssa_pretrain.train experiment=ssa_1b_8k parallel.tp=2 …

NCCL refuses two ranks of one host on one GPU. Where there are fewer GPUs than ranks, each rank therefore passes for a node of its own (NCCL_HOSTID),
and messages go through the loopback. So one GPU runs every layout with the real kernels and collectives, except user buffers
(`engine.overlap_tp`); how fast, means nothing. Ranks take turns on a GPU unless its MPS daemon runs (`nvidia-cuda-mps-control -d`), which is faster.
Under MPS the failure of one job can end others on the same GPU.
The output appears at the end: rank 0's, or that of the first rank that failed. Without a GPU the ranks compute on CPUs.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from support.processes import ROOT
from support.processes import ranks as ranks_of_one_node

GRACE_SECONDS = 10.0  # for the other ranks after one has failed: they may wait for it in a collective
POLL_SECONDS = 0.1


def are_shared(world_size: int) -> bool:
    """Returns whether there are fewer GPUs than ranks."""
    return torch.cuda.device_count() < world_size


def ranks(world_size: int) -> list[dict[str, str]]:
    """Returns the variables of each rank: a GPU of its own, or as a node of its own a GPU that others use too."""
    found = ranks_of_one_node(world_size)
    if not are_shared(world_size):
        return found
    node, gpus = {"LOCAL_RANK": "0", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}, _visible()
    return [
        rank | node | {"NCCL_HOSTID": f"node{number}", "CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]}
        for number, rank in enumerate(found)
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
            if code is None:
                raise AssertionError(f"rank {rank} of {world_size} did not end in {timeout} s:\n{text[-6000:]}")
            if code:
                raise AssertionError(
                    f"a worker of {world_size} ended with exit code {code}, rank {rank}:\n{text[-6000:]}"
                )


def _run(
    command: list[str], variables: list[dict[str, str]], folder: Path, timeout: float
) -> list[tuple[int, int | None, str]]:
    """Returns rank, exit code and output of every rank in the order in which they ended; at the end those that had to be killed, without a code."""
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
    ended += [(rank, None) for rank in running]
    return [(rank, code, (folder / str(rank)).read_text(errors="replace")) for rank, code in ended]


def _environment() -> dict[str, str]:
    """Returns what all ranks share: this checkout first on the path, no multicast, which not every host allows."""
    path = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    found = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONSAFEPATH": "1", "UB_SKIPMC": "1"}
    return {"OMP_NUM_THREADS": "1", **os.environ, **found}


def _visible() -> list[str]:
    """Returns the GPUs' names as CUDA_VISIBLE_DEVICES takes them; one empty name without a GPU."""
    listed = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    count = torch.cuda.device_count()
    return listed[:count] or [str(index) for index in range(count)] or [""]


def main() -> int:
    """Runs a command, prints rank 0's output, or that of the first rank that failed, and returns its exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # an exception, so that the ranks end too
    world_size, command = int(sys.argv[1]), sys.argv[2:]
    with tempfile.TemporaryDirectory() as folder:
        ended = _run(command, ranks(world_size), Path(folder), float("inf"))
    _, code, text = next((one for one in ended if one[1]), min(ended))
    print(text)
    return 1 if code is None else code


if __name__ == "__main__":
    sys.exit(main())
