"""Helpers for tests that train for real: the commands of the README as processes, on the quickstart's corpus."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.processes import ROOT, environment, ranks, run_ranks

__all__ = ["ROOT", "command", "descendants", "environment", "records", "run", "run_command", "train", "wait_for_step"]

TIMES = ("tokens_per_second", "tflops_per_second", "mfu", "seconds", "eta_seconds")


def command(module: str, *overrides: str, processes: int = 1) -> list[str]:
    """Return the command that runs a module, under torchrun for several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return [sys.executable, *launcher, "-m", module, *overrides]


def launched(script: str, *arguments: str) -> list[str]:
    """Returns the command of a launcher for two processes."""
    count = {"torchrun.sh": "--nproc-per-node", "deepspeed.sh": "--num-gpus"}[script]
    return [str(ROOT / "launchers" / script), "--python", sys.executable, count, "2", *arguments]


def is_alive(pid: int) -> bool:
    """Returns whether a process runs: neither gone nor a zombie."""
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def signals_act_as_usual() -> None:
    """To be run in a new process: signals that whoever started the tests ignores, as nohup does, are not ignored there."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def run(module: str, *overrides: str, processes: int = 1, timeout: float = 500) -> subprocess.CompletedProcess:
    """Run a module to its end, whatever it returns; for several processes, return the first exit code that is not 0 and all that they wrote."""
    variables = ranks(processes) if processes > 1 else [{}]
    ended = run_ranks(["-m", module, *overrides], variables, timeout=timeout)
    return subprocess.CompletedProcess(
        [module, *overrides],
        next((one.code for one in ended if one.code), 0),
        "".join(one.stdout for one in ended),
        "".join(one.stderr for one in ended),
    )


def run_command(arguments: list[str], *, timeout: float = 500) -> subprocess.CompletedProcess:
    """Run a command as a process of its own, launcher and all."""
    return subprocess.run(
        arguments,
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def train(*overrides: str, processes: int = 1, timeout: float = 500) -> None:
    """Train to the end or fail with what the process said."""
    done = run("ssa_pretrain.train", *overrides, processes=processes, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Return a run's records of one kind, without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines if line["kind"] == kind]


def descendants(pid: int) -> list[int]:
    """Return a process's descendants, parents first: torchrun puts its workers into sessions of their own."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            found += [int(child) for child in task.read_text().split()]
    return found[1:]


def wait_for_step(
    process: subprocess.Popen, folder: Path, step: int, *, seconds: float, said: Callable[[], str] = str
) -> None:
    """Wait until `step` is in the metrics of a run that goes on; fail with what it `said` if it ends, or takes longer."""
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + seconds
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert process.poll() is None, f"the run ended before step {step}: {said()}"
        assert time.monotonic() < deadline, f"the run never reached step {step}: {said()}"
        time.sleep(0.05)
