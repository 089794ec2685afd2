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

__all__ = [
    "ROOT",
    "command",
    "descendants",
    "environment",
    "records",
    "run",
    "run_command",
    "train",
    "wait_for_checkpoint",
    "wait_for_step",
]

TIMES = ("tokens_per_second", "tflops_per_second", "mfu", "seconds", "eta_seconds", "peak_memory_gib")


def command(module: str, *overrides: str, processes: int = 1) -> list[str]:
    """Returns the command that runs a module, under torchrun if there are several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return [sys.executable, *launcher, "-m", module, *overrides]


def launched(script: str, *arguments: str, restarts: int = 0) -> list[str]:
    """Returns the command of a launcher for two processes, with at most so many restarts."""
    count = {"torchrun.sh": "--nproc-per-node", "deepspeed.sh": "--num-gpus"}[script]
    flags = ["--python", sys.executable, count, "2", "--max-restarts", str(restarts), "--restart-wait", "1"]
    return [str(ROOT / "launchers" / script), *flags, *arguments]


def rank_of(pid: int) -> str:
    """Returns the rank of a process; empty if it is none."""
    pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((p[5:].decode() for p in pairs if p.startswith(b"RANK=")), "")


def is_alive(pid: int) -> bool:
    """Returns whether a process runs: it is neither gone nor a zombie."""
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def signals_act_as_usual() -> None:
    """Restores default signal handling in a new process: whoever started the tests may ignore signals, as nohup does."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def run(module: str, *overrides: str, processes: int = 1, timeout: float = 500) -> subprocess.CompletedProcess:
    """Runs a module to its end, whatever its exit code. For several processes, returns the first exit code that is not 0 and all output."""
    variables = ranks(processes) if processes > 1 else [{}]
    ended = run_ranks(["-m", module, *overrides], variables, timeout=timeout)
    return subprocess.CompletedProcess(
        [module, *overrides],
        next((one.code for one in ended if one.code), 0),
        "".join(one.stdout for one in ended),
        "".join(one.stderr for one in ended),
    )


def run_command(arguments: list[str], *, timeout: float = 500) -> subprocess.CompletedProcess:
    """Runs a command as a real process, with its launcher."""
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
    """Trains to the end; fails with the output of the processes."""
    done = run("ssa_pretrain.train", *overrides, processes=processes, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Returns a run's records of one kind, without the values that depend on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines if line["kind"] == kind]


def descendants(pid: int) -> list[int]:
    """Returns a process's descendants, parents first. torchrun puts its workers into sessions of their own."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            found += [int(child) for child in task.read_text().split()]
    return found[1:]


def wait_for_step(
    process: subprocess.Popen, folder: Path, step: int, *, seconds: float, output: Callable[[], str] = str
) -> None:
    """Waits until `step` is in the metrics of a run that is still running; fails with its `output` if it ends or takes longer."""
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + seconds
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert process.poll() is None, f"the run ended before step {step}: {output()}"
        assert time.monotonic() < deadline, f"the run did not reach step {step}: {output()}"
        time.sleep(0.05)


def wait_for_checkpoint(process: subprocess.Popen, folder: Path, step: int, *, seconds: float) -> None:
    """Waits until a run that is still running has published the checkpoint of a step, which it writes beside the next steps."""
    deadline = time.monotonic() + seconds
    while not (folder / "checkpoints" / f"step_{step:08d}").is_dir():
        assert process.poll() is None, f"the run ended before it had saved step {step}"
        assert time.monotonic() < deadline, f"the run did not save step {step}"
        time.sleep(0.05)
