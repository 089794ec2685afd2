"""An hour of training with a kill every five minutes, against the same run without a fault, step by step and bit by bit.

One process trains a small model on real text and saves beside training. It is killed at random moments: by kill -9, by kill -9 while a save is being
written, and by kill -9 together with a flipped bit in the newest checkpoint. Each time the same command is run again, as a batch system would do. A second run of the
same settings is left alone. Both record a digest of all weights and moments after each step, also after those that are trained twice.

The share of time spent training counts the time of each step that is in the final metrics once. Starts, loading, stalls by saves, and steps that were
lost and trained again are the rest. The steps take long because their batches are large; nothing sleeps.

    PYTHONPATH=tests nice -n 15 python -m faults.soak --corpus DIR --folder DIR --minutes 60
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from faults.tally import RESULTS, Tally
from support.processes import ROOT, SUPPORT, environment
from support.training import records

NAME = "soak"
EVERY = 300.0  # seconds between kills
KINDS = ("kill", "kill in a save", "kill and flip", "kill")
SETTINGS = (
    "experiment=quickstart",
    "model.num_layers=2",
    "data.sequence_length=256",
    "training.steps=100000",
    "training.global_batch_tokens=2048",
    "checkpoint.interval=5",
    "checkpoint.asynchronous=true",
    "checkpoint.weights=false",
    "evaluation.rows=2",
    "evaluation.at_start=false",
    "evaluation.interval=0",
    "logging.wandb.mode=off",
)


class Trainer:
    """A training run in a folder, as one real process at a time.

    Args:
        folder: of the run, its digests and its log.
        corpus: the dataset.
        niceness: by which the process gives way to others.
    """

    def __init__(self, folder: Path, corpus: Path, *, niceness: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.run, self.states, self.log = folder / "run", folder / "states", folder / "log.txt"
        overrides = [*SETTINGS, f"data.path={corpus}", f"output_dir={self.run}"]
        faults = json.dumps({"states": str(self.states)})
        self._command = [
            "nice",
            "-n",
            str(niceness),
            sys.executable,
            str(SUPPORT / "faulty_training.py"),
            faults,
            *overrides,
        ]
        self.process = self.start()

    def start(self) -> subprocess.Popen:
        """Starts the same command, again or for the first time."""
        with self.log.open("a") as file:
            self.process = subprocess.Popen(self._command, env=environment(), cwd=ROOT, stdout=file, stderr=file)
        return self.process

    def digests(self) -> list[list]:
        """Returns [step, digest of the weights, digest of the whole state] of every step, in the order in which they were trained."""
        path = self.states.with_name(f"{self.states.name}.0")
        lines = path.read_text().splitlines() if path.exists() else []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:  # cut off by the kill, and the next line is appended to it
                continue
        return found

    def progress(self) -> int:
        """Returns a number that grows with each step that is trained, for the first time or again."""
        path = self.states.with_name(f"{self.states.name}.0")
        return path.stat().st_size if path.exists() else 0

    def checkpoints(self) -> list[Path]:
        """Returns the published checkpoints, oldest first."""
        return sorted((self.run / "checkpoints").glob("step_*"))


def kill(trainer: Trainer, kind: str, generator: random.Random) -> int:
    """Kills the process in one of the ways; returns the steps that the newest intact checkpoint lacks."""
    if kind == "kill in a save":
        deadline = time.monotonic() + 120
        while not any((trainer.run / "checkpoints").glob(".step_*.tmp")) and time.monotonic() < deadline:
            time.sleep(0.005)
    trainer.process.kill()
    trainer.process.wait()
    published, last = trainer.checkpoints(), trainer.digests()[-1][0]
    if kind == "kill and flip":
        flip(published.pop(), generator)
    return last - int(published[-1].name.removeprefix("step_"))


def flip(folder: Path, generator: random.Random) -> None:
    """Flips a random bit of a random file of a checkpoint."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
    path = generator.choices(files, weights=[p.stat().st_size for p in files])[0]
    place = generator.randrange(path.stat().st_size)
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ (1 << generator.randrange(8))]))


def soak(folder: Path, corpus: Path, minutes: float, every: float = EVERY) -> Tally:
    """Returns what an hour (or another time) of kills gave."""
    shutil.rmtree(folder, ignore_errors=True)
    tally, generator = Tally(), random.Random(0)
    whole, begin = Trainer(folder / "whole", corpus, niceness=4), time.monotonic()
    faulty = Trainer(folder / "faulty", corpus)
    try:
        kills = 0
        while time.monotonic() < begin + 60 * minutes - every / 2:
            due = begin + every * (kills + 1) + generator.uniform(-0.1, 0.1) * every
            while time.monotonic() < min(due, begin + 60 * minutes):
                time.sleep(0.2)
                if faulty.process.poll() is not None:
                    raise RuntimeError(f"the run ended by itself with {faulty.process.returncode}")
            if time.monotonic() >= begin + 60 * minutes - every / 2:
                break
            kind = KINDS[kills % len(KINDS)]
            lost, known = kill(faulty, kind, generator), faulty.progress()
            kills, killed = kills + 1, time.monotonic()
            faulty.start()
            while faulty.progress() == known and faulty.process.poll() is None:
                time.sleep(0.2)
            tally.recover.append(time.monotonic() - killed)
            wrong = None if faulty.process.poll() is None else f"{kind}: did not start again"
            tally.add(wrong, code=-signal.SIGKILL, lost=lost)
        faulty.process.send_signal(signal.SIGTERM)
        code = faulty.process.wait()
        seconds = time.monotonic() - begin
        last = faulty.digests()[-1][0]
        deadline = time.monotonic() + 60 * minutes
        while whole.digests()[-1][0] < last and whole.process.poll() is None and time.monotonic() < deadline:
            time.sleep(5.0)
    finally:
        for trainer in (whole, faulty):
            if trainer.process.poll() is None:
                trainer.process.terminate()
                trainer.process.wait()
    if code != 7:
        tally.failures.append(f"SIGTERM at the end: exit code {code}")
    _compare(tally, whole, faulty, seconds)
    return tally


def _compare(tally: Tally, whole: Trainer, faulty: Trainer, seconds: float) -> None:
    """Compares every step of both runs, and notes the share of the time that was spent training."""
    expected = {step: digests for step, *digests in whole.digests()}
    found = faulty.digests()
    last = min(found[-1][0], max(expected))
    different = [step for step, *digests in found if step <= last and digests != expected[step]]
    ours, theirs = records(faulty.run, "train")[:last], records(whole.run, "train")[:last]
    if different:
        tally.failures.append(f"{len(different)} steps differ in weights or moments, the first is {different[0]}")
    if ours != theirs:
        tally.failures.append("the metrics differ")
    lines = (faulty.run / "metrics.jsonl").read_text().splitlines()
    kept = {r["step"]: r["seconds"] for r in map(json.loads, lines) if r["kind"] == "train"}
    if sorted(kept) != list(range(1, found[-1][0] + 1)):
        tally.failures.append("a step is missing in the metrics, or is there twice")
    tally.figures |= {
        "minutes": round(seconds / 60, 1),
        "kills": tally.tries,
        "steps": found[-1][0],
        "steps compared": last,
        "steps trained twice": len(found) - len({step for step, *_ in found}),
        "steps that differ": len(different),
        "share of the time training": round(sum(kept.values()) / seconds, 4),
        "load average": round(os.getloadavg()[2], 1),
    }
    if different or ours != theirs:
        tally.good = 0


def main() -> None:
    """Runs the soak of the command line and writes its file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=EVERY, help="seconds between kills")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    begin = time.monotonic()
    tally = soak(given.folder, given.corpus, given.minutes, given.every)
    tally.write(NAME, begin, given.results)
    print(json.dumps(tally.figures), tally.failures)


if __name__ == "__main__":
    main()
