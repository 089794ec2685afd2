"""Signals that request a stop, in one process. tests/integration/test_leaving.py tests several ranks."""

import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from ssa_pretrain.parallel import interruption as module
from ssa_pretrain.parallel.interruption import Interruption
from ssa_pretrain.signals import on_signals
from support.signal_handlers import default_signals

__all__ = ["default_signals"]  # a fixture that applies by itself

ONE_PROCESS = SimpleNamespace(world_size=1, is_rank_0=True)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_first_signal_requests_a_stop_and_further_ones_are_ignored(name: str) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interruption(ONE_PROCESS) as interruption:  # type: ignore[arg-type]
        assert not interruption.stops_after(1)
        os.kill(os.getpid(), signal.Signals[name])
        wait_for(lambda: interruption.stops_after(2))
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert (interruption.stops_after(3), interruption.reason) == (True, name)
    assert signal.getsignal(signal.SIGTERM) == before


def test_second_ctrl_c_exits_at_once_unless_it_was_forwarded(monkeypatch, capfd) -> None:
    left = []
    monkeypatch.setattr(module, "exit_now", left.append)
    monkeypatch.setattr(module, "REPEAT_SECONDS", 60.0)
    with Interruption(ONE_PROCESS) as interruption:  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: interruption.reason)
        interruption._receive(signal.SIGINT)
        assert not left
        monkeypatch.setattr(module, "REPEAT_SECONDS", 0.0)
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: left)
    assert left == [130]
    assert capfd.readouterr().err == "SIGINT again: exited at once, without the steps since the last checkpoint\n"


def test_signal_is_noticed_while_the_main_thread_waits_in_c_and_contexts_nest() -> None:
    outer, inner, release = [], [], threading.Lock()
    release.acquire()
    threading.Thread(target=lambda: (wait_for(lambda: inner), release.release()), daemon=True).start()
    with on_signals(outer.append):
        with on_signals(inner.append, [signal.SIGTERM]):
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
            assert release.acquire(timeout=60)  # a lock is waited for in C
        os.kill(os.getpid(), signal.SIGHUP)
        wait_for(lambda: outer)
    assert (inner, outer) == ([signal.SIGTERM], [signal.SIGHUP])


def test_ignored_signal_stays_ignored_and_signals_of_a_forked_child_do_not_count() -> None:
    before, seen = signal.signal(signal.SIGHUP, signal.SIG_IGN), []
    try:
        with on_signals(seen.append):
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            code = "import os, signal; from ssa_pretrain.signals import on_signals\nseen = []\nwith on_signals(seen.append):\n"
            code += " child = os.fork()\n if not child: os.kill(os.getpid(), signal.SIGTERM); os._exit(0)\n os.waitpid(child, 0)\nprint(seen)"
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60
            )
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (seen, done.stdout) == ([], "[]\n"), done.stderr


def test_closed_pipe_does_not_end_the_run() -> None:
    """`train … | head`: the run continues and still saves."""
    code = "from ssa_pretrain.signals import survive_terminal\nsurvive_terminal()\nprint('there', flush=True)\ninput()\nprint('nobody', flush=True)"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin and process.stdout and process.stderr
        assert process.stdout.readline() == b"there\n"
        process.stdout.close()
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_closed_terminal_does_not_end_the_run() -> None:
    """Its output is lost, but an error would end the run before it has saved."""
    ours, theirs = os.openpty()
    code = "from ssa_pretrain.signals import survive_terminal\nsurvive_terminal()\nprint('there', flush=True)\ninput()\nprint('nobody', flush=True)"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        assert os.read(ours, 100) == b"there\r\n"
        os.close(ours)
        assert process.stdin
        process.stdin.write(b"\n")
    assert process.returncode == 0
