"""Measures on one GPU what an asynchronous save of the 1B model costs training, and kills and resumes a run in torch's deterministic mode.

    PYTHONPATH=.:kernels:tests python tests/benchmarks/save_stall.py --only stall --json FILE     # about 100 s
    PYTHONPATH=.:kernels:tests python tests/benchmarks/save_stall.py --only resume --json FILE    # about 60 s

stall. The real trainer runs ssa_1b_8k with the smallest step that it has, one microbatch of 2 x 8,192 tokens, because a stall weighs most there, and saves
every 100 steps. The cost of a save is the time for which the host stood still and what the save adds to the steps beside it, over 100 steps of the
time that steps took before the first save. The device's copies are queued before the next step, so they lengthen that step and are not counted a second
time. The first save also locks the pages that its copies go to; the second shows what each later one costs. The goal is 3%. The last save of a run
is not asynchronous: its stall is printed for comparison.

resume. A small model with the kernels is trained by `faulty_training.py`, killed by kill -9 and run again. Digests of all weights and moments after
each step are compared with those of a run without a kill.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np

from support.processes import ROOT, SUPPORT, free_port
from support.small_datasets import write_dataset

INTERVAL, LAST, GOAL = 100, 270, 0.03
SETTINGS = ("evaluation.rows=2", "evaluation.at_start=false", "evaluation.interval=0", "logging.wandb.mode=off")
SMALL = (
    "experiment=ssa_1b_8k",
    "model.num_layers=4",
    "model.hidden_size=512",
    "model.ffn_hidden_size=1024",
    "model.num_attention_heads=16",
    "model.num_kv_heads=1",
    "data.sequence_length=1024",
    "training.global_batch_tokens=4096",
    "training.micro_batch_size=2",
    "training.steps=16",
    "training.total_tokens=0",
    "checkpoint.interval=4",
    "checkpoint.asynchronous=true",
)


def write_corpus(folder: Path) -> Path:
    """Writes random documents and returns their folder."""
    generator = np.random.default_rng(0)
    documents = [generator.integers(1, 30_000, 4000) for _ in range(1500)]
    write_dataset(folder, {"random": documents}, {"random": documents[:20]})
    return folder


def measure_stall(folder: Path, corpus: Path) -> dict[str, float]:
    """Returns what the saves of the 1B model cost."""
    from ssa_pretrain import trainer
    from ssa_pretrain.checkpoint.staging import HostCopies
    from ssa_pretrain.cli import resolve_config
    from ssa_pretrain.config.machine import this_machine
    from ssa_pretrain.libraries import hide_library_warnings

    hide_library_warnings()
    overrides = [
        "experiment=ssa_1b_8k",
        f"data.path={corpus}",
        f"output_dir={folder / 'run'}",
        "training.global_batch_tokens=16384",
        "training.steps=1000",
        "training.total_tokens=0",
        f"training.stop_at_step={LAST}",
        f"checkpoint.interval={INTERVAL}",
        "checkpoint.asynchronous=true",
        "checkpoint.keep=1",
    ]
    copies: list[float] = []
    device_seconds = HostCopies.device_seconds

    def noted(self: HostCopies) -> float:
        copies.append(device_seconds(self))
        return copies[-1]

    with mock.patch.object(HostCopies, "device_seconds", noted):
        trainer.train(resolve_config("train", [*overrides, *SETTINGS], this_machine()))
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    seconds = {r["step"]: r["seconds"] for r in lines if r["kind"] == "train"}
    saves = {r["step"]: r for r in lines if r["kind"] == "checkpoint"}
    base = statistics.mean(seconds[step] for step in range(31, INTERVAL + 1))
    found = {"step_seconds": base, "median_step_seconds": statistics.median(list(seconds.values())[30:INTERVAL])}
    for name, step, copying in zip(("first", "second"), (INTERVAL, 2 * INTERVAL), copies, strict=False):
        beside = [seconds[s] for s in range(step + 1, min(step + INTERVAL, LAST) + 1)]
        extra = sum(beside) - base * len(beside)
        stall, write = saves[step]["stall_seconds"], saves[step]["write_seconds"]
        found |= {
            f"{name}_stall_seconds": stall,
            f"{name}_copy_seconds": copying,
            f"{name}_slower_steps_seconds": extra,
            f"{name}_write_seconds": write,
            f"{name}_cost": (stall - copying + extra) / (INTERVAL * base),
            f"{name}_stall_share": stall / (INTERVAL * base),
        }
        if write > base * len(beside):
            print(f"the {name} save took longer than the {len(beside)} steps beside it, so its cost is not complete")
    return found | {"waited_save_seconds": saves[LAST]["stall_seconds"], "bytes": saves[LAST]["bytes"]}


def check_resume(folder: Path, corpus: Path) -> dict[str, object]:
    """Returns whether a killed run ends with the states of one that was not killed, step by step."""
    environment = {
        **os.environ,
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        ),
    }

    def start(name: str) -> subprocess.Popen:
        faults = json.dumps({"deterministic": True, "states": str(folder / f"{name}.states")})
        overrides = [*SMALL, *SETTINGS, f"data.path={corpus}", f"output_dir={folder / name}"]
        command = [sys.executable, str(SUPPORT / "faulty_training.py"), faults, *overrides]
        return subprocess.Popen(command, env=environment | {"MASTER_PORT": str(free_port())}, cwd=ROOT)

    def states(name: str) -> list[list]:
        path = folder / f"{name}.states.0"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    whole = start("whole")
    assert whole.wait() == 0, "the run without a kill failed"
    killed = start("killed")
    while killed.poll() is None and len(states("killed")) < 10:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "the run ended before it was killed"
    before = len(states("killed"))
    assert start("killed").wait() == 0, "the rerun failed"
    expected = {step: digests for step, *digests in states("whole")}
    found = states("killed")
    different = sorted({step for step, *digests in found if digests != expected[step]})
    return {
        "killed_after_step": before,
        "steps": len(expected),
        "trained_twice": len(found) - len(expected),
        "different_steps": different,
    }


def main() -> None:
    """Runs the parts of the command line; exit code 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["stall", "resume"])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/save_stall"), help="on storage with 50 GB free")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    shutil.rmtree(given.folder, ignore_errors=True)
    given.folder.mkdir(parents=True)
    corpus, found = write_corpus(given.folder / "corpus"), {}
    missed = []
    if given.only != "resume":
        found["stall"] = measured = measure_stall(given.folder, corpus)
        missed += [f"a save costs {measured['second_cost']:.1%}"] if measured["second_cost"] > GOAL else []
        shutil.rmtree(given.folder / "run")
    if given.only != "stall":
        found["resume"] = checked = check_resume(given.folder, corpus)
        missed += [f"steps {checked['different_steps']} differ"] if checked["different_steps"] else []
    print(json.dumps(found, indent=1))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))
    print("missed: " + "; ".join(missed) if missed else "all goals met")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
