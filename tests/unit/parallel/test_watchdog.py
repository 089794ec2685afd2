"""The watchdog with real processes: whoever hangs is named with its place, all ranks end, a slow rank is named, and a normal run names nobody."""

import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from ssa_pretrain.config import ParallelConfig
from ssa_pretrain.launch import supervision
from ssa_pretrain.launch.supervision import RERUN, Supervisor, find_processes
from ssa_pretrain.parallel import watchdog as module
from ssa_pretrain.parallel.heartbeat import Beat
from ssa_pretrain.parallel.watchdog import LEAST_SECONDS, WARM_STEPS, Watchdog
from support.processes import SUPPORT, environment, free_port
from support.rank_for_watchdog import HANGS_AT
from support.signal_handlers import default_signals

__all__ = ["default_signals"]  # a fixture that applies by itself

SCRIPT = SUPPORT / "rank_for_watchdog.py"
PAUSE_SECONDS = 0.15  # several times WORK_SECONDS
PLACE = f"in training step {HANGS_AT + 1} for "


def run(folder: Path, *modes: str, hang_minutes: float = 5.0) -> tuple[int, str]:
    """Returns the verdict of a launcher on one rank per mode. Fails if a process is left."""
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "HANG_MINUTES": str(hang_minutes)}
    # If rank 0 is stopped, the ranks' store does not answer, however long the others wait.
    meet["ANSWER_SECONDS"] = "2" if modes[0] == "stops" else str(module.ANSWER_SECONDS)
    with Supervisor(30, reports=True) as supervisor:
        command = [sys.executable, str(SCRIPT), str(folder), *modes]
        code = supervisor.run(command, environment() | meet)
        assert not find_processes(supervisor.folder)
        return supervisor.verdict(code)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "HELPER_SECONDS", 1.0)


@pytest.mark.parametrize(
    ("modes", "culprit", "what", "detail"),
    [
        (("trains", "trains", "loops"), 2, "does not move", "in hang"),
        (("trains", "locks"), 1, "gives no sign of life", "without giving up Python's lock"),
        (("stops", "trains"), 0, "gives no sign of life", "its process is stopped (SIGSTOP)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_hanging_rank_is_named_and_all_end(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    modes: tuple[str, ...],
    culprit: int,
    what: str,
    detail: str,
) -> None:
    if "loops" not in modes:  # only the rank that hangs is left, and it ends by no verdict
        monkeypatch.setattr(supervision, "HUNG_SECONDS", 1.0)
    code, sentence = run(tmp_path, *modes, hang_minutes=0.05)
    printed = capfd.readouterr().err
    assert code == 8, printed
    pid = int((tmp_path / f"up_{culprit}").read_text())
    assert sentence.startswith(f"hang: rank {culprit} ({os.uname().nodename}, pid {pid}) {what} {PLACE}")
    assert sentence.endswith(f"wait{'s' * (len(modes) == 2)} for it; {RERUN}")
    report = (tmp_path / "hang.txt").read_text()
    assert detail in report and sentence.removesuffix(f"; {RERUN}") in report
    assert report.count("  waiting: rank") == 1, report  # the others in one line
    assert "all_reduce" in report.partition("waiting: ")[2]
    assert "Traceback" not in printed and printed.count("hang: ") == 1


def test_rank_that_is_stopped_again_and_again_is_named_as_slow(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ended = threading.Event()

    def let_go_on() -> None:
        while not ended.wait(0.01):
            try:
                pid = int((tmp_path / "up_1").read_text())
                if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                    time.sleep(PAUSE_SECONDS)
                    os.kill(pid, signal.SIGCONT)
            except (OSError, ValueError):  # not up yet, or at its end
                continue

    thread = threading.Thread(target=let_go_on)
    thread.start()
    try:
        assert run(tmp_path, "trains", "pauses") == (0, "")
    finally:
        ended.set()
        thread.join()
    (line, *_) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("slow: ")]
    assert line.startswith(f"slow: rank 1 ({os.uname().nodename}) ") and "the median rank's own time per step" in line


def test_normal_run_names_nobody_and_leaves_no_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "trains", "trains") == (0, "")
    assert capfd.readouterr().err == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["up_0", "up_1"]


def watch(world_size: int = 1, rank: int = 0, folder: Path = Path(), **settings: float) -> Watchdog:
    placement = SimpleNamespace(rank=rank, world_size=world_size)
    return Watchdog(placement, ParallelConfig(**settings), folder)  # type: ignore[arg-type]


def test_rank_that_has_judged_stays_until_the_others_have_the_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []
    monkeypatch.setattr(module, "exit_now", lambda code: ended.append(threading.current_thread().name))
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(module, "ANSWER_SECONDS", 60.0)
    store, printed = dist.HashStore(), []
    judge, other = watch(2, folder=tmp_path), watch(2, rank=1, folder=tmp_path)
    judge.print_line = other.print_line = printed.append
    monkeypatch.setattr(judge, "_judge", lambda store: ("hang: rank 1 does not move\n  its stack", 1))
    stuck = Beat(0, seconds=2.0, limit=1.0)
    thread = threading.Thread(target=judge._exchange, args=(store, stuck), name="judge")
    thread.start()
    while not store.check([module.VERDICT]):
        time.sleep(0.01)
    thread.join(0.3)  # rank 1 is late
    other._exchange(store, replace(stuck, rank=1))
    thread.join()
    assert ended == [threading.current_thread().name, "judge"]
    assert printed == ["hang: rank 1 does not move\n  its stack"]
    assert (tmp_path / "hang.txt").read_text().count("hang: ") == 1


def test_limit_is_measured_after_the_first_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    alone, asked, many = watch(), watch(2, hang_minutes=2.0), watch(2)
    for step in range(WARM_STEPS):
        assert (alone.limit("training"), asked.limit("training"), many.limit("training")) == (None, 540.0, 540.0)
        for one in (alone, asked, many):
            one.enter("training", step)
        now[0] += 1000.0 if step == 0 else 1.0  # the first step compiles
    for one in (alone, asked, many):
        one.enter("saving", WARM_STEPS)
        one.enter("training", WARM_STEPS)
    assert (alone.limit("training"), asked.limit("training"), many.limit("training")) == (
        LEAST_SECONDS,
        120.0,
        LEAST_SECONDS,
    )
    assert (alone.limit("saving"), many.limit("evaluating")) == (None, 540.0)
    for step in range(100):
        now[0] += 10.0
        alone.enter("training", step)
    assert alone.limit("training") == 200.0


def test_time_during_which_the_whole_process_was_stopped_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    one = watch()
    one.enter("training", 3)
    for _ in range(10):
        now[0] += 1.0
        assert one._beat().seconds == now[0]
    now[0] += 3600.0
    assert one._beat().seconds == 0.0
    now[0] += 1.0
    assert one._beat().seconds == 1.0
