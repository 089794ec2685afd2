"""kill -9 of a rank during a run of the 1B model, and the launcher's restart from the newest checkpoint.

The run trains on random tokens and saves asynchronously. Once a checkpoint is complete and a later step is done, one rank is killed. Reported: the
seconds until that step is done again, and how far the losses of the steps that were done twice are from each other.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scaling.cases import SIZES, fixed_rows
from benchmarks.scaling.jobs import ROOT, Host, environment, kill
from support.small_datasets import write_dataset
from support.training import descendants, rank_of, wait_for_checkpoint, wait_for_step

INTERVAL, STEPS = 2, 8  # steps between checkpoints; steps in all
KILLED_AFTER = 5


def killed_and_restarted(host: Host, seconds: float) -> list[dict[str, Any]]:
    """Returns the result of one run, or its error.

    Args:
        host: where it runs, with data parallelism over all of its GPUs.
        seconds: after which the run counts as failed.
    """
    size, folder = SIZES[host.size], host.scratch / "killed"
    rows, length = fixed_rows("8k", host.gpus), size.lengths["8k"]
    write_random(host.scratch / "data", tokens=(STEPS + 2) * rows * length, longest=4 * length)
    command = [
        str(ROOT / "launchers" / "torchrun.sh"),
        *("--python", sys.executable, "--nproc-per-node", str(host.gpus), "--max-restarts", "1", "--restart-wait", "1"),
        *size.settings,
        f"data.path={host.scratch / 'data'}",
        "data.weights={}",
        f"data.sequence_length={length}",
        f"output_dir={folder}",
        "training.total_tokens=0",
        f"training.steps={STEPS}",
        f"training.global_batch_tokens={rows * length}",
        f"training.micro_batch_size={size.rows['8k']}",
        "evaluation.interval=0",
        "evaluation.at_start=false",
        "evaluation.rows=2",
        f"checkpoint.interval={INTERVAL}",
        "checkpoint.asynchronous=true",
    ]
    result: dict[str, Any] = {"case": "kill -9 of a rank", "layout": f"dp{host.gpus}", "length": "8k", "kind": "kill"}
    begin = time.monotonic()
    with (host.folder / "killed.log").open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            before = _kill_last_rank(process, folder, seconds)
            killed = time.monotonic()
            while losses(folder).keys() <= before.keys() and process.poll() is None:
                time.sleep(0.05)
                if time.monotonic() - begin > seconds:
                    raise AssertionError(f"no new step {time.monotonic() - killed:.0f} s after the kill")
            result["seconds_to_new_step"] = time.monotonic() - killed
            result["exit_code"] = process.wait(max(1.0, seconds - (time.monotonic() - begin)))
        except (AssertionError, subprocess.TimeoutExpired) as error:
            return [result | {"error": str(error).partition("\n")[0][:300]}]
        finally:
            if process.poll() is None:
                kill(process)
    if "restart 1 of 1" not in (host.folder / "killed.log").read_text(errors="replace"):
        return [result | {"error": "the launcher did not start the run again"}]
    after = losses(folder)
    again = [(before[step], after[step]) for step in before if step in after]
    result["difference"] = max(abs(a - b) / abs(b) for a, b in again)
    return [result | {"gpus": host.gpus, "steps": len(after), "losses": [[after[s], 0.0] for s in sorted(after)]}]


def _kill_last_rank(process: subprocess.Popen, folder: Path, seconds: float) -> dict[int, float]:
    """Kills the last rank once there are a checkpoint and later steps; returns the losses by step until then."""
    wait_for_checkpoint(process, folder, INTERVAL, seconds=seconds)
    wait_for_step(process, folder, KILLED_AFTER, seconds=seconds)
    ranks = _ranks(process.pid)
    before = losses(folder)
    os.kill(ranks[max(ranks)], signal.SIGKILL)
    return before


def _ranks(launcher: int) -> dict[int, int]:
    """Returns the process of each rank. A rank comes before what it has started, such as compilers, which may end while this reads."""
    for _ in range(50):
        found: dict[int, int] = {}
        with suppress(OSError):
            for pid in descendants(launcher):
                if rank := rank_of(pid):
                    found.setdefault(int(rank), pid)
            return found
        time.sleep(0.05)
    raise AssertionError("the ranks could not be read from /proc")


def losses(folder: Path) -> dict[int, float]:
    """Returns the cross entropy by step of a run's metrics so far."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return {record["step"]: record["cross_entropy"] for record in records if record["kind"] == "train"}


def write_random(folder: Path, *, tokens: int, longest: int) -> None:
    """Writes a dataset of random tokens below 500, in documents of random lengths."""
    generator = np.random.default_rng(0)

    def documents(count: int) -> list[np.ndarray]:
        ends = np.cumsum(generator.integers(1, longest, 2 + 4 * count // longest))
        return np.split(generator.integers(1, 500, count), ends[ends < count])

    write_dataset(folder, {"random": documents(tokens)}, {"random": documents(16 * longest)}, vocab_size=500)
