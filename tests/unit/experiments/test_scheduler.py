"""The scheduler on real, small processes: order, room on devices, time, failures, and that jobs end with it."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from ssa_pretrain.errors import UsageError
from ssa_pretrain.experiments import scheduler
from ssa_pretrain.experiments.devices import Device, planned, read_query
from ssa_pretrain.experiments.jobs import Job
from ssa_pretrain.experiments.scheduler import Scheduler
from support.processes import ROOT, environment

GPUS = [Device("0", "GPU", 10.0), Device("1", "GPU", 10.0)]


@dataclass
class Script(Job):
    """A shell script that is done when its file exists."""

    script: str = ""
    memory: float = 1.0
    seconds: float = 1.0
    resumes: bool = False
    exclusive: bool = False
    needs: Job | None = None

    @property
    def command(self) -> list[str]:
        return ["sh", "-c", f"echo b {self.name} $CUDA_VISIBLE_DEVICES >> {self.out}/order; {self.script}"]

    @property
    def is_done(self) -> bool:
        return (self.out / f"{self.name}.done").exists()

    @property
    def is_ready(self) -> bool:
        return self.needs is None or self.needs.is_done

    @property
    def can_resume(self) -> bool:
        return self.resumes

    @property
    def is_exclusive(self) -> bool:
        return self.exclusive


@dataclass
class Known:
    """Estimates that the jobs know themselves."""

    def memory(self, job: Script) -> float:
        return job.memory

    def seconds(self, job: Script) -> float:
        return job.seconds


@dataclass
class Said:
    lines: list[str] = field(default_factory=list)

    def __call__(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(scheduler, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(scheduler, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(scheduler, "STOP_SECONDS", 0.2)


def schedule(
    jobs: list[Script], devices=GPUS, per_device: int = 2, limit: float = float("inf")
) -> tuple[Scheduler, list[str]]:
    said = Said()
    found = Scheduler(devices, per_device, Known(), limit, said)
    found.run(jobs)
    return found, said.lines


def script(tmp_path: Path, name: str, text: str = ":", **more) -> Script:
    return Script(name, tmp_path, script=f"{text}; touch {tmp_path}/{name}.done", **more)


def order(tmp_path: Path) -> list[list[str]]:
    return [line.split()[1:] for line in (tmp_path / "order").read_text().splitlines()]


def test_jobs_that_need_others_run_after_them_and_failures_stay_alone(tmp_path) -> None:
    first = script(tmp_path, "first")
    second = script(tmp_path, "second", needs=first)
    bad = Script("bad", tmp_path, script="echo the reason >&2; exit 4")
    never = script(tmp_path, "never", needs=bad)
    found, _ = schedule([second, never, bad, first])
    assert first.is_done and second.is_done and not never.is_done
    assert found.failed == ["bad"] and bad.failure == {"code": 4, "text": "the reason"} and first.failure is None
    assert [name for name, _ in order(tmp_path)].count("bad") == 1, "a failed job is tried once"
    bad.script = f"touch {tmp_path}/bad.done"
    assert schedule([bad, never])[0].failed == [] and bad.failure is None and never.is_done


def test_no_device_has_more_than_its_memory_slots_or_an_exclusive_job(tmp_path) -> None:
    beside: dict[str, list[str]] = {}

    class Recording(Scheduler):
        def _launch(self, job: Job, device: Device, need: float) -> None:
            beside[job.name] = [one.job.name for one in self._on(device)]
            super()._launch(job, device, need)

    jobs = [script(tmp_path, f"small{i}", "sleep 0.1", memory=4.0) for i in range(5)]
    jobs += [script(tmp_path, f"large{i}", memory=9.0) for i in range(2)]
    jobs += [script(tmp_path, f"tiny{i}", memory=0.1) for i in range(4)]
    jobs += [script(tmp_path, "alone", exclusive=True)]
    too_large = script(tmp_path, "too_large", memory=11.0)
    said = Said()
    Recording(GPUS, 3, Known(), float("inf"), said).run([*jobs, too_large])
    assert all(job.is_done for job in jobs) and not too_large.is_done
    memory = {job.name: job.memory for job in jobs}
    for name, others in beside.items():
        assert memory[name] + sum(memory[other] for other in others) <= 10.0 and len(others) < 3
        assert "alone" not in others and (name != "alone" or not others)
    assert [len(beside[f"small{i}"]) for i in range(4)] == [0, 0, 1, 1], "two on each device at once, in turns"
    assert {gpu for _, gpu in order(tmp_path)} == {"0", "1"}
    assert any("too_large: not started; it needs about" in line for line in said.lines)


def test_nothing_starts_that_would_not_end_and_what_runs_is_stopped(tmp_path, monkeypatch) -> None:
    saves = f"trap 'touch {tmp_path}/saved; exit 7' TERM; touch {tmp_path}/begun; while :; do sleep 0.02; done"
    long = script(tmp_path, "long", saves, seconds=100.0, resumes=True)
    late = script(tmp_path, "late", seconds=100.0)
    fits = script(tmp_path, "fits", seconds=0.5)

    def now() -> float:
        """The limit is over when one job is done and the other has begun."""
        return 2.0 if fits.is_done and (tmp_path / "begun").exists() else 0.0

    monkeypatch.setattr(scheduler, "time", SimpleNamespace(monotonic=now, sleep=time.sleep))
    found, said = schedule([late, long, fits], limit=1.5)
    assert found.stopped and found.failed == []
    assert fits.is_done and (tmp_path / "saved").exists() and not long.is_done
    assert [line.partition(":")[0] for line in said if ": started on " in line] == ["long", "fits"]
    assert any("late: not started; it takes about 1.7 minutes" in line for line in said)
    assert long.failure is None


def test_sigterm_stops_the_jobs(tmp_path) -> None:
    saves = f"trap 'touch {tmp_path}/saved; exit 7' TERM; touch {tmp_path}/begun; while :; do sleep 0.02; done"
    job = script(tmp_path, "job", saves)

    def stop() -> None:
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    found, _ = schedule([job, script(tmp_path, "next", needs=job)])
    thread.join()
    assert found.stopped and (tmp_path / "saved").exists() and not (tmp_path / "next.done").exists()


def test_jobs_end_with_a_killed_scheduler(tmp_path) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_scheduler import *
out = Path({str(tmp_path)!r})
schedule([Script("job", out, script="echo $$ > " + str(out / "pid") + "; exec sleep 600")])
"""
    process = subprocess.Popen([sys.executable, "-c", program], env=environment(), cwd=ROOT)
    pid = tmp_path / "pid"
    while not pid.exists() or not pid.read_text().strip():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    state = Path(f"/proc/{pid.read_text().strip()}/status")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not state.exists() or "(zombie)" in state.read_text():
            return
        time.sleep(0.01)
    raise AssertionError("the job outlived its scheduler")


def test_devices() -> None:
    text = "0, NVIDIA H200, 143771, 143000\n1, NVIDIA H200, 143771, 1024\n"
    assert read_query(text) == [Device("0", "NVIDIA H200", 143000 * 2**20), Device("1", "NVIDIA H200", 1024 * 2**20)]
    assert Device("1").environment() == {"CUDA_VISIBLE_DEVICES": "1"} and Device("cpu").environment() == {}
    assert [device.index for device in planned("h200", "0,1")] == ["0", "1"]
    with pytest.raises(UsageError, match="--hardware=h900 must be one of a10, a100, b200"):
        planned("h900", "")
