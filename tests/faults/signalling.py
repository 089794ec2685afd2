"""Rows about signals: requests to stop at any moment, too little time to save, and a launcher that is killed."""

import os
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

from faults.rows import Row
from faults.stage import SETTINGS, Child, Stage, damaged, steps_of
from faults.tally import Tally
from ssa_pretrain.checkpoint import publish
from support.processes import environment
from support.training import descendants, is_alive, launched, records, wait_for_step

STEPS = 100_000


def has_step(folder: Path, step: int) -> bool:
    """Returns whether a step is in a run's metrics."""
    path = folder / "metrics.jsonl"
    return path.exists() and f'"step": {step},' in path.read_text()


def stopped_well(folder: Path, child: Child) -> str | None:
    """Returns what is wrong unless a run saved its last step and said so."""
    if child.code != 7:
        return f"exit code {child.code}: {child.text()[-500:]}"
    last = max((r["step"] for r in records(folder, "train")), default=0)
    if not last:
        return None if "stopped before training began" in child.text() else f"no step: {child.text()[-300:]}"
    if steps_of(folder)[-1:] != [last]:
        return f"stopped after step {last}, checkpoints {steps_of(folder)}"
    return "; ".join(damaged(folder)) or None


def stops(stage: Stage, *, numbers: tuple[signal.Signals, ...], full: int) -> Tally:
    """Sends a signal at a random moment of training, evaluating and saving; some runs are continued."""
    tally, whole = Tally(), stage.new_folder()
    tries = stage.tries(full, 4)
    settings = {"training__steps": STEPS, "evaluation__interval": 3, "checkpoint__interval": 2}
    first = stage.train(stage.config(whole, **settings))
    first.until(lambda: has_step(whole, stage.tries(60, 15)))
    first.kill()
    first.wait()
    expected = {r["step"]: r for r in records(whole, "train")}
    for number in range(tries):
        folder = stage.new_folder()
        config = stage.config(folder, **settings, checkpoint__asynchronous=number % 2 == 1)
        child = stage.train(config)
        child.until(lambda folder=folder: has_step(folder, 1))
        time.sleep(stage.random.uniform(0.0, 0.4))
        begin = time.monotonic()
        child.kill(numbers[number % len(numbers)])
        code = child.wait()
        tally.detect.append(time.monotonic() - begin)
        problem = stopped_well(folder, child)
        found = records(folder, "train")
        if number % max(1, tries // 10) == 0 and not problem:
            config.training.stop_at_step = found[-1]["step"] + 2
            again = stage.train(config)
            problem = None if again.wait() == 0 else f"the rerun ended with {again.code}"
            found = records(folder, "train")
        if any(record != expected.get(record["step"], record) for record in found):
            problem = problem or "the curve differs"
        tally.add(problem, code=code, lost=0)
    return tally


def early_stops(stage: Stage) -> Tally:
    """Sends SIGTERM while the run is being built."""
    tally = Tally()
    for _ in range(stage.tries(40, 3)):
        folder = stage.new_folder()
        marker = folder.with_suffix(".begun")
        child = stage.train(stage.config(folder, training__steps=STEPS), before=marker.touch)
        child.until(marker.exists)
        time.sleep(stage.random.uniform(0.0, 0.2))
        child.kill(signal.SIGTERM)
        code = child.wait()
        if not (folder / "metrics.jsonl").exists():
            problem = (
                None
                if code == 7 and "stopped before training began" in child.text()
                else f"exit code {code}: {child.text()[-300:]}"
            )
        else:
            problem = stopped_well(folder, child)
        tally.add(problem, code=code)
    return tally


def too_little_time(stage: Stage) -> Tally:
    """SIGTERM, and kill -9 before the save can be done; and a second Ctrl-C during the save."""

    def slow() -> None:
        read = publish.file_sha256
        publish.file_sha256 = lambda path: time.sleep(0.3) or read(path)

    tally = Tally()
    for number in range(stage.tries(20, 4)):
        folder, twice = stage.new_folder(), number % 2 == 1
        child = stage.train(stage.config(folder, training__steps=STEPS, checkpoint__interval=3), before=slow)
        child.until(lambda folder=folder: has_step(folder, 5))
        child.kill(signal.SIGINT if twice else signal.SIGTERM)
        time.sleep(0.4)
        child.kill(signal.SIGINT if twice else signal.SIGKILL)
        code = child.wait()
        wrong = "; ".join(damaged(folder)) or (
            None if code == (130 if twice else -9) else f"exit code {code}: {child.text()[-300:]}"
        )
        last = records(folder, "train")[-1]["step"]
        lost = last - max(steps_of(folder), default=0)
        tally.add(wrong or (f"{lost} steps lost" if lost > 3 + 2 else None), code=code, lost=lost)
    return tally


def killed_launcher(stage: Stage) -> Tally:
    """Kills the launcher by kill -9, or one of its ranks, in real processes."""
    tally = Tally()
    for script in ("torchrun.sh", "deepspeed.sh")[: stage.tries(2, 1)]:
        folder = stage.new_folder()
        overrides = [*SETTINGS, f"data.path={stage.corpus}", f"output_dir={folder}", "training.steps=100000"]
        log = folder.with_suffix(".txt")
        with (
            log.open("w") as file,
            subprocess.Popen(launched(script, *overrides), env=environment(), stdout=file, stderr=file) as launcher,
        ):
            wait_for_step(launcher, folder, 3, seconds=200, output=lambda log=log: log.read_text()[-2000:])
            family = descendants(launcher.pid)
            begin = time.monotonic()
            os.kill(launcher.pid, signal.SIGKILL)
            launcher.wait()
            while any(is_alive(pid) for pid in family) and time.monotonic() < begin + 10:
                time.sleep(0.05)
        left = [pid for pid in family if is_alive(pid)]
        tally.detect.append(time.monotonic() - begin)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        tally.add(
            f"{script}: {len(left)} of {len(family)} processes are left after 10 s" if left else None,
            code=launcher.returncode,
        )
    return tally


ROWS = [
    Row(
        "sigterm",
        "SIGTERM at a random moment of training, evaluating or saving, with saves beside training and not",
        "the last step is saved (7); the curve is bit-identical, also after a rerun",
        partial(stops, numbers=(signal.SIGTERM,), full=200),
        must_fail=True,
    ),
    Row(
        "sigint_sighup",
        "Ctrl-C or SIGHUP, likewise",
        "the same",
        partial(stops, numbers=(signal.SIGINT, signal.SIGHUP), full=40),
        must_fail=True,
    ),
    Row(
        "sigterm_early",
        "SIGTERM while the run is being built",
        "7, with a sentence; nothing is damaged",
        early_stops,
        must_fail=True,
    ),
    Row(
        "too_little_time",
        "kill -9 0.4 s after SIGTERM, while the save takes longer; a second Ctrl-C during the save",
        "checkpoints stay intact; the second Ctrl-C leaves at once (130); no more is lost than one interval and the steps since",
        too_little_time,
        must_fail=True,
    ),
    Row(
        "killed_launcher",
        "kill -9 of launchers/torchrun.sh and launchers/deepspeed.sh, each with two ranks",
        "no process is left after 10 s",
        killed_launcher,
        must_fail=True,
    ),
]
