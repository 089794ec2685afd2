"""Restarts by a launcher: after which ends, how often, after how long, and what it prints; with processes without torch."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from ssa_pretrain.errors import ExitCode
from ssa_pretrain.launch import supervision
from ssa_pretrain.launch.__main__ import start
from ssa_pretrain.launch.jobs import TRAIN, Job
from ssa_pretrain.launch.restarts import FINAL, LONGEST_WAIT, Outcome, Restarts
from support.processes import SUPPORT, environment
from support.signal_handlers import default_signals

__all__ = ["default_signals"]  # a fixture that applies by itself

SCRIPT = SUPPORT / "rank_for_supervision.py"
# Starts its ranks in the modes of the next line of the file `starts`, and in those of the last line from then on.
NEXT = 'echo >> count; modes=$(sed -n "$(wc -l < count)p" starts); exec "$@" ${modes:-$(tail -n 1 starts)}'


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(supervision, "HELPER_SECONDS", 0.2)
    monkeypatch.setattr(supervision, "LOST_SECONDS", 0.5)


def run(*starts: str, limit: int = 3, wait: int = 0) -> tuple[int, int]:
    """Returns the launcher's exit code and how often it started the ranks, in the given modes one start after another."""
    Path("starts").write_text("\n".join(starts) + "\n")
    command = ["bash", "-c", NEXT, "bash", sys.executable, str(SCRIPT), "launcher"]
    job = Job(command, command, TRAIN, [], None, "", max_restarts=limit, restart_wait=wait)
    code = start("torchrun.sh", job, environment())
    return code, len(Path("count").read_text().splitlines())


def test_killed_rank_is_cured_and_each_restart_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("waits killed", "killed waits", "done done") == (0, 3)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("torchrun.sh: ")]
    assert len(lines) == 2
    for number, (line, rank) in enumerate(zip(lines, (1, 0), strict=True), 1):
        assert line == (
            f"torchrun.sh: rank {rank} was killed by SIGKILL; restart {number} of 3 in 0 s, from the newest checkpoint"
        )


def test_limit_ends_the_restarts_with_the_failure(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("killed", limit=2) == (1, 3)
    last = capfd.readouterr().err.splitlines()[-1]
    assert last == (
        f"torchrun.sh: rank 0 was killed by SIGKILL; {supervision.RERUN} (after 2 restarts without a new checkpoint)"
    )
    Path("count").unlink()
    assert run("killed", limit=0) == (1, 1)


def test_checkpoints_set_the_limit_back() -> None:
    assert run(*["saves-and-is-killed"] * 4, "done", limit=1) == (0, 5)


@pytest.mark.parametrize("code", sorted(FINAL - {ExitCode.DONE}))
def test_ends_that_a_restart_cannot_cure(code: int) -> None:
    assert run(f"{code} {code}") == (code, 1)


def test_error_before_the_first_step_is_not_tried_again_and_a_later_one_is(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("fails") == (1, 1)
    assert "restart" not in capfd.readouterr().err
    Path("count").unlink()
    assert run("trains-and-fails", "fails", "3", "done") == (0, 4)  # it could begin once


def test_rank_without_heartbeats_ends_the_run_and_is_cured(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(supervision, "SILENT_SECONDS", 1.5)
    monkeypatch.setattr(supervision, "HEARTBEAT_SECONDS", 0.2)
    assert run("silent deaf", "done done") == (0, 2)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("torchrun.sh: ")]
    assert line.startswith("torchrun.sh: hang: rank 0 (node7, pid ")
    assert " has given no sign of life for " in line and "in training step 13" in line
    assert run("silent deaf", limit=0) == (8, 3)


def test_signal_before_a_restart_stops_the_run(capfd: pytest.CaptureFixture[str]) -> None:
    def stop() -> None:
        deadline = time.monotonic() + 120
        while "restart 1" not in "".join(printed) and time.monotonic() < deadline:
            time.sleep(0.05)
            printed.append(capfd.readouterr().err)
        os.kill(os.getpid(), signal.SIGTERM)

    printed: list[str] = []
    thread = threading.Thread(target=stop)
    thread.start()
    assert run("killed", wait=60) == (7, 1)
    thread.join()
    last = "".join([*printed, capfd.readouterr().err]).splitlines()[-1]
    assert last == f"torchrun.sh: SIGTERM: stopped before the restart; {supervision.RERUN}"


def test_waits_double_up_to_a_longest_one() -> None:
    restarts = Restarts(12, 5)
    waits = [restarts.wait_after(Outcome(1)) for _ in range(13)]
    assert waits[:4] == [5, 10, 20, 40]
    assert waits[8:12] == [LONGEST_WAIT] * 4 and waits[12] is None
    assert restarts.wait_after(Outcome(8, saved=1)) == 5


def test_configuration_is_final_until_the_run_has_begun() -> None:
    restarts = Restarts(3, 1)
    assert restarts.wait_after(Outcome(3)) is None
    assert restarts.wait_after(Outcome(1, trained=1)) == 1
    assert restarts.wait_after(Outcome(3)) == 2  # a port or a folder that the old processes have not left yet
