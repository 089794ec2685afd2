"""Real processes over gloo for tests: start N interpreters on one worker script, wait, and show what a failed one said."""

import os
import random
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """Return a TCP port that nothing listens on, below those that the system gives to connections: a process takes it seconds later."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            port = random.randrange(15_000, 30_000)
            probe.bind(("127.0.0.1", port))
            return port


def run_workers(script: Path, world_size: int, *arguments: str, timeout: float = 600.0) -> None:
    """Run `script` in `world_size` processes that can find each other; fail with the first failing one's output."""
    common = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        # Without PYTHONSAFEPATH the worker would find its neighbours by itself.
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(Path(script).parent)]),
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), *arguments],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [worker.communicate(timeout=timeout)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, output in zip(workers, outputs, strict=True):
        if worker.returncode:
            raise AssertionError(f"a worker of {world_size} left with {worker.returncode}:\n{output[-6000:]}")
