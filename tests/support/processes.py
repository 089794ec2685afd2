"""Processes for tests, forked from one that has imported torch and megatron-core: those imports take longer than most tests.

The parent is `multiprocessing`'s fork server. It runs no operation and joins no process group, so its children differ from new processes only
in what is already imported. Tests of the start itself, of imports and of signals to a launcher use real processes.
"""

import atexit
import gc
import multiprocessing
import os
import random
import runpy
import socket
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = Path(__file__).resolve().parent
ON_GPUS = os.environ.get("SSA_TEST_ON_GPUS") == "1"  # `make test-ranks`: workers compute on GPUs and talk by NCCL
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    ["torch", "hydra", "ssa_pretrain.settings.compose", "ssa_pretrain.trainer", "ssa_pretrain.engine.megatron.engine"]
)


@dataclass(frozen=True, slots=True)
class Ended:
    """A process that has ended: its exit code (negative for a signal) and its output."""

    code: int
    stdout: str
    stderr: str


def free_port() -> int:
    """Returns a free TCP port below the range that the system gives to connections: a process binds it only seconds later."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            port = random.randrange(15_000, 30_000)
            probe.bind(("127.0.0.1", port))
            return port


def environment() -> dict[str, str]:
    """Returns the environment of a process that trains: one thread, no GPU, this checkout first on the path."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(SUPPORT.parent)])
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def run_workers(script: Path, world_size: int, *arguments: str, timeout: float = 600.0) -> None:
    """Runs `script` in `world_size` processes that can find each other; fails with the output of the first process that fails."""
    if ON_GPUS:
        from support import gpu_ranks

        assert not gpu_ranks.are_shared(1), "SSA_TEST_ON_GPUS=1 (make test-ranks) needs a GPU that torch can use"
        gpu_ranks.run([str(script), *arguments], world_size, timeout=timeout)
        return
    for ended in run_ranks([str(script), *arguments], ranks(world_size), timeout=timeout):
        if ended.code:
            output = (ended.stdout + ended.stderr)[-6000:]
            raise AssertionError(f"a worker of {world_size} ended with exit code {ended.code}:\n{output}")


def ranks(world_size: int) -> list[dict[str, str]]:
    """Returns the variables that a launcher on one node sets for each process."""
    common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def run_ranks(command: list[str], variables: list[dict[str, str]], *, timeout: float) -> list[Ended]:
    """Runs one process per set of variables to its end; none is stopped because another has failed.

    Args:
        command: a script's path or `-m` and a module, then arguments.
        variables: each process's environment, on top of `environment()`.
        timeout: seconds for all of them; processes that still run then are killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        try:
            processes += start_ranks(command, variables, Path(folder))
            deadline = time.monotonic() + timeout
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            late = [process for process in processes if process.is_alive()]
            for process in late:
                process.kill()
                process.join()
        texts = [tuple(path.read_text() for path in _outputs(Path(folder), n)) for n in range(len(variables))]
    assert not late, f"{len(late)} of {len(processes)} processes did not end in {timeout} s:\n{texts}"
    return [Ended(process.exitcode, *text) for process, text in zip(processes, texts, strict=True)]


def start_ranks(
    command: list[str], variables: list[dict[str, str]], folder: Path
) -> list[multiprocessing.context.ForkServerProcess]:
    """Starts one process per set of variables, as `run_ranks`, and returns them. What they print is in files of `folder`."""
    started = []
    for number, more in enumerate(variables):
        files = _outputs(folder, number)
        for path in files:
            path.touch()
        process = FORKSERVER.Process(target=_become, args=(command, environment() | more, *files))
        process.start()
        started.append(process)
    return started


def _outputs(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"{number}.out", folder / f"{number}.err"


def _become(command: list[str], variables: dict[str, str], stdout: Path, stderr: Path) -> None:
    """Becomes a new process with this command: its environment, folder, output, threads, and the functions that run at its end."""
    import torch

    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    torch.set_num_threads(1)
    gc.freeze()  # core collects garbage at each save; what has been imported is none, and takes it a third of a second
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            warnings.simplefilter("ignore")
            sys.argv = command
            sys.path.insert(0, str(Path(command[0]).parent))
            runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
