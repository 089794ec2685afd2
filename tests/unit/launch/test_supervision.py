"""A launcher's supervisor, on processes without torch: signals, reports of ranks, and leftover processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from ssa_pretrain.launch import supervision
from ssa_pretrain.launch.supervision import NOT_BEGUN, RERUN, Supervisor
from ssa_pretrain.parallel.heartbeat import Beat
from ssa_pretrain.process import ALIVE, RankExit, write_beat, write_exit
from support.processes import ROOT, SUPPORT
from support.signal_handlers import default_signals

__all__ = ["default_signals"]  # a fixture that applies by itself

SCRIPT = SUPPORT / "rank_for_supervision.py"


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}


def when(condition, act) -> threading.Thread:
    """Returns a separate thread that runs an action as soon as a condition holds."""

    def wait() -> None:
        deadline = time.monotonic() + 60
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def up(*ranks: int) -> bool:
    return all(Path(f"up_{rank}").exists() and Path(f"up_{rank}").read_text() for rank in ranks)


def pid(rank: int) -> int:
    return int(Path(f"up_{rank}").read_text())


def ends_with_launcher(pid: int) -> bool:
    """Returns whether a rank watches its launcher's FIFO already: the kernel signals it when the FIFO closes (O_ASYNC)."""
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            if os.readlink(file).endswith(f"/{ALIVE}"):
                flags = Path(f"/proc/{pid}/fdinfo/{file.name}").read_text().partition("flags:")[2].split()[0]
                return bool(int(flags, 8) & os.O_ASYNC)
    return False


def run(
    *modes: str, patience: float = 30, reports: bool = True, send: Callable[[Supervisor], object] | None = None
) -> tuple[int, str]:
    """Returns the verdict on a launcher with one rank per mode, and `send` called when ranks 0 and 1 are up. Fails if a process is left."""
    with Supervisor(patience, reports=reports) as supervisor:
        sender = when(lambda: up(0, 1), lambda: send(supervisor)) if send else None
        code = supervisor.run([sys.executable, str(SCRIPT), "launcher", *modes], environment())
        if sender:
            sender.join()  # a signal after the supervisor would be for the tests
        assert not supervision.find_processes(supervisor.folder)
        return supervisor.verdict(code)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(supervision, "HELPER_SECONDS", 0.2)
    monkeypatch.setattr(supervision, "LOST_SECONDS", 0.5)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_signal_reaches_all_ranks_and_their_message_names_it(name: str) -> None:
    when(lambda: up(0, 1), lambda: os.kill(os.getpid(), signal.Signals[name]))
    assert run("waits", "waits") == (7, f"{name}: stopped before training began")


def test_signal_before_any_rank_starts_ends_the_launcher() -> None:
    with Supervisor(30) as supervisor:
        os.kill(os.getpid(), signal.SIGINT)
        when(lambda: True, lambda: None)
        code = supervisor.run(["sleep", "60"], environment())
        assert supervisor.verdict(code) == (7, f"SIGINT: {NOT_BEGUN}")


def test_second_ctrl_c_kills_all_ranks() -> None:
    def twice(supervisor: Supervisor) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        while supervisor.stop is None:
            time.sleep(0.02)
        time.sleep(2 * supervision.REPEAT_SECONDS)
        os.kill(os.getpid(), signal.SIGINT)

    sentence = "SIGINT again: exited at once, without the steps since the last checkpoint"
    assert run("deaf", "deaf", send=twice) == (130, sentence)


def test_further_sigterms_are_ignored_and_ranks_are_killed_after_the_deadline() -> None:
    def thrice(supervisor: Supervisor) -> None:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)

    assert run("deaf", "deaf", patience=1, send=thrice) == (
        1,
        f"SIGTERM: the ranks did not stop within 1 s and were killed; {RERUN}",
    )


@pytest.mark.parametrize("other", ["waits", "deaf", "loses its peer"])
def test_killed_rank_is_named_with_its_signal(capfd, other: str) -> None:
    when(lambda: up(0, 1), lambda: time.sleep(0.6) or os.kill(pid(1), signal.SIGKILL))
    assert run(other, "waits") == (1, f"rank 1 was killed by SIGKILL; {RERUN}")
    assert "Traceback" not in capfd.readouterr().err


def test_killed_rank_is_named_if_its_launcher_has_to_be_killed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine the launcher may not end before the time for that is over."""
    monkeypatch.setattr(supervision, "HELPER_SECONDS", 0.0)
    when(lambda: up(0, 1), lambda: time.sleep(0.6) or os.kill(pid(1), signal.SIGKILL))
    assert run("deaf", "waits") == (1, f"rank 1 was killed by SIGKILL; {RERUN}")


def test_helper_of_a_dying_rank_is_not_taken_for_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a dying process is gone before its children get another parent."""
    read, dying, helpers = supervision._environment, [], []

    def look() -> None:
        helpers.append(supervision.find_ranks(launcher.pid))
        dying.append(pid(1))
        helpers.append(supervision.find_ranks(launcher.pid))

    monkeypatch.setattr(supervision, "_environment", lambda one: [""] if one in dying else read(one))
    with Supervisor(30) as supervisor:
        mark = {supervision.LAUNCH: str(supervisor.folder)}
        command = [sys.executable, str(SCRIPT), "launcher", "waits", "waits"]
        launcher = subprocess.Popen(command, env=environment() | mark)
        while not up(0, 1):
            time.sleep(0.02)
        look()
        launcher.kill()
        for process in supervision.find_processes(supervisor.folder):
            process.send(signal.SIGKILL)
        launcher.wait()
    assert [sorted(ranks) for ranks in helpers] == [[0, 1], [0]]


def test_rank_killed_before_it_was_seen_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "find_ranks", lambda launcher: {})
    when(lambda: up(0, 1), lambda: os.kill(pid(1), signal.SIGKILL))
    assert run("waits", "waits") == (1, f"rank 1 was killed by SIGKILL; {RERUN}")


def test_rank_killed_before_it_wrote_its_process_id_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "find_ranks", lambda launcher: {})
    assert run("waits", "dies") == (1, f"a rank was killed by SIGKILL; {RERUN}")


def test_unexpected_error_prints_its_traceback_and_is_named_last(capfd) -> None:
    assert run("waits", "fails") == (1, "rank 1 failed, its trace is above: ValueError: a bad value")
    assert capfd.readouterr().err.count("Traceback") == 1


def test_exit_codes_of_ranks_are_returned_and_success_prints_nothing() -> None:
    assert run("waits", "3") == (3, "")  # it has printed what is wrong
    assert run("done", "done") == (0, "")
    assert run("0", "0") == (0, "")  # as after --help


def test_run_that_finishes_after_a_signal_succeeds() -> None:
    are_training = [Path(f"training_{rank}") for rank in (0, 1)]
    when(lambda: all(path.exists() for path in are_training), lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run("finishes", "finishes") == (0, "")


def test_command_that_stops_its_own_nodes_gets_the_signal_and_is_awaited() -> None:
    with Supervisor(30) as supervisor:
        when(lambda: Path("up").exists(), lambda: os.kill(os.getpid(), signal.SIGHUP))
        code = supervisor.run(
            ["sh", "-c", "trap 'sleep 0.5; exit 9' TERM; touch up; sleep 60 & wait"], environment(), waits=True
        )
        assert (code, supervisor.stop) == (9, signal.SIGHUP)


def test_launcher_that_returns_0_without_starting_ranks_is_a_failure() -> None:
    with Supervisor(30, reports=True) as supervisor:
        assert supervisor.verdict(supervisor.run(["true"], environment())) == (
            1,
            f"the launcher's own process returned 0, but the run did not come to its end; {RERUN}",
        )


def test_ranks_end_with_a_killed_launcher() -> None:
    def kill() -> None:
        parent = Path(f"/proc/{pid(0)}/stat").read_text().rpartition(")")[2].split()[1]
        os.kill(int(parent), signal.SIGKILL)

    when(lambda: up(0, 1), kill)
    assert run("waits", "deaf") == (1, f"the launcher's own process was killed by SIGKILL; {RERUN}")


def test_entry_points_that_report_nothing_keep_their_code() -> None:
    with Supervisor(30) as supervisor:
        assert supervisor.verdict(supervisor.run(["sh", "-c", "exit 9"], environment())) == (9, "")
        assert supervisor.verdict(supervisor.run(["true"], environment())) == (0, "")


def test_node_whose_ranks_were_ended_with_those_of_another_node_has_failed() -> None:
    """torchrun's agent sends SIGTERM when the first node goes, which a rank takes for a request to stop."""
    with Supervisor(30, reports=True) as supervisor:
        write_exit(supervisor.folder, RankExit(1, 7, f"rank 1 (node1): SIGTERM: {NOT_BEGUN}"))
        assert supervisor.verdict(1)[0] == 7
        (supervisor.folder / supervision.AGENT).write_text("--rdzv-endpoint=node0:1 does not answer")
        assert supervisor.verdict(1)[0] == 7  # the ranks have not met yet
        write_beat(supervisor.folder, 1, Beat(1, trained=3).encode())
        assert supervisor.verdict(1) == (1, f"{supervision.OTHER_NODE}; {RERUN}")
        write_exit(supervisor.folder, RankExit(2, 4, "rank 2 (node1): the data is damaged", of_one_rank=True))
        assert supervisor.verdict(1)[0] == 4


@pytest.mark.parametrize("is_stopped", [False, True])
def test_ranks_end_with_a_killed_supervisor(is_stopped: bool) -> None:
    def kill() -> None:
        if is_stopped:
            os.kill(pid(1), signal.SIGSTOP)
        process.kill()

    code = (
        "import os, sys; from ssa_pretrain.launch.supervision import Supervisor\n"
        "with Supervisor(9) as supervisor: supervisor.run(sys.argv[1:], os.environ)"
    )
    command = [sys.executable, "-c", code, sys.executable, str(SCRIPT), "launcher", "waits", "waits"]
    with subprocess.Popen(command, env=environment()) as process:
        when(lambda: up(0, 1) and ends_with_launcher(pid(1)), kill)
        process.wait(90)
    deadline = time.monotonic() + 45
    while any(supervision.find_process(pid(rank)) for rank in (0, 1)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(supervision.find_process(pid(rank)) for rank in (0, 1))


def test_launcher_that_another_launcher_started_ends_with_it() -> None:
    """As under launchers/stages.sh: after kill -9 of the outer one nothing goes on, so the same command can run again at once."""
    inner = "import os, time; from ssa_pretrain.process import exit_with_starter as join; join(os.environ)"
    inner += "; print(os.getpid(), flush=True); time.sleep(60)"
    outer = "import os, sys; from ssa_pretrain.launch.supervision import Supervisor\nwith Supervisor(1.0) as found:\n"
    outer += f"    found.run([sys.executable, '-c', {inner!r}], os.environ, waits=True)"
    with subprocess.Popen(
        [sys.executable, "-c", outer], env=environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        pid = int(process.stdout.readline())
        assert supervision.find_process(pid)
        process.kill()
        deadline = time.monotonic() + 45  # less than it waits for
        while supervision.find_process(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert supervision.find_process(pid) is None
