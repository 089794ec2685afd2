"""Runs jobs in processes of their own: side by side on different GPUs, within a time limit, keeping what was measured before a failure.

A job whose processes fail is started again without the case that failed, once per case. A case that was not measured is a result with its reason.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.scaling.cases import Case, Job

ROOT = Path(__file__).resolve().parents[3]
POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """Where jobs run.

    Attributes:
        gpus: of the host; on CPUs, the most processes of a job.
        size: name in SIZES.
        folder: for logs and results.
        scratch: for checkpoints and data, removed again.
    """

    gpus: int
    size: str
    folder: Path
    scratch: Path


@dataclass(slots=True)
class Running:
    """A job's processes, and the cases that they have not measured yet."""

    job: Job
    devices: list[str]
    left: list[Case]
    stem: Path
    starts: int = 0
    process: subprocess.Popen | None = field(default=None)


def run_jobs(part: str, jobs: list[Job], host: Host, seconds: float) -> list[dict[str, Any]]:
    """Returns the results of all jobs, those of cases that were not measured among them.

    Args:
        part: name of the part, in file names.
        jobs: in order; as many at a time as there are GPUs for.
        host: where they run.
        seconds: for all of them.
    """
    deadline, waiting, running = time.monotonic() + seconds, list(enumerate(jobs)), []
    free, results = devices(host.gpus), []
    while waiting or running:
        while waiting and waiting[0][1].gpus <= len(free):
            number, job = waiting.pop(0)
            taken, free = free[: job.gpus], free[job.gpus :]
            running.append(Running(job, taken, list(job.cases), host.folder / f"{part}_{number}"))
            _start(running[-1], host)
        time.sleep(POLL_SECONDS)
        late = time.monotonic() > deadline
        for one in [one for one in running if late or _has_ended(one)]:
            ended = _collect(one, results, late=late)
            if ended:
                running.remove(one)
                free = free + one.devices
            else:
                _start(one, host)
        if late:
            return results + [_missing(case, LATE) for _, job in waiting for case in job.cases]
    return results


LATE = "the part's time was over"


def devices(count: int) -> list[str]:
    """Returns the names of the GPUs to use, as CUDA_VISIBLE_DEVICES takes them."""
    listed = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (listed or [str(index) for index in range(count)])[:count]


def environment(names: list[str] | None = None) -> dict[str, str]:
    """Returns the environment of a process: this checkout first on the path, and the GPUs that it may see."""
    path = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONSAFEPATH": "1"}
    if names is not None and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        found["CUDA_VISIBLE_DEVICES"] = ",".join(names)
    return found | {"UB_SKIPMC": "1"}  # user buffers without multicast, which not every host allows


def command(processes: int, job: Path, results: Path) -> list[str]:
    """Returns the command that measures a job's cases."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *launcher, "-m", "benchmarks.scaling.worker", str(job), str(results)]


def run_logged(arguments: list[str], log: Path, seconds: float) -> tuple[int | None, str]:
    """Runs a command with its output in a file. Returns its exit code, None if it was killed at the limit, and the output."""
    with log.open("w") as file:
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            kill(process)
    return code, log.read_text(errors="replace")


def kill(process: subprocess.Popen) -> None:
    """Ends a process that leads a session, and everything that it started: torchrun's ranks lead sessions of their own and die with it."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _start(one: Running, host: Host) -> None:
    """Starts a job's processes for the cases that are left."""
    job = {
        "size": host.size,
        "host_gpus": host.gpus,
        "scratch": str(host.scratch),
        "cases": [case.to_json() for case in one.left],
    }
    listing = one.stem.with_suffix(".json")
    listing.write_text(json.dumps(job))
    one.stem.with_suffix(".jsonl").unlink(missing_ok=True)
    one.starts += 1
    log = one.stem.with_name(f"{one.stem.name}_{one.starts}.log").open("w")
    one.process = subprocess.Popen(
        command(one.job.gpus, listing, one.stem.with_suffix(".jsonl")),
        cwd=ROOT,
        env=environment(one.devices),
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    log.close()


def _has_ended(one: Running) -> bool:
    assert one.process is not None
    return one.process.poll() is not None


def _collect(one: Running, results: list[dict[str, Any]], *, late: bool) -> bool:
    """Adds what a job has measured to the results. Returns whether nothing of it is left to start again."""
    assert one.process is not None
    if one.process.poll() is None:
        kill(one.process)
    file = one.stem.with_suffix(".jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    results += [result for line in lines for result in line["results"]]
    measured = {line["name"] for line in lines}
    left = [case for case in one.left if case.name not in measured]
    if left and late:
        results += [_missing(case, LATE) for case in left]
    elif left:
        log = one.stem.with_name(f"{one.stem.name}_{one.starts}.log")
        results.append(_missing(left[0], last_error(log.read_text(errors="replace"))))
        one.left = left[1:]
        return not one.left
    return True


def last_error(text: str) -> str:
    """Returns the line of a log that names the error of the first process that failed."""
    lines = [line.strip() for line in text.splitlines()]
    errors = [line for line in lines if "Error" in line and "ChildFailedError" not in line and "raise " not in line]
    return (errors or lines or ["no output"])[0][:300]


def _missing(case: Case, reason: str) -> dict[str, Any]:
    names = {"case": case.name, "layout": case.layout, "length": case.length, "gpus": case.gpus, "kind": case.kind}
    return names | {"variant": case.variants[0], "error": reason}
