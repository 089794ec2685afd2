"""ssa_pretrain/process.py in this process: what a rank reports of a signal that comes while it starts."""

import os
import signal
import threading
from pathlib import Path

import pytest

from ssa_pretrain import process
from ssa_pretrain.errors import ExitCode
from ssa_pretrain.process import LAUNCH, rank_process, read_exits
from ssa_pretrain.signals import on_signals


def test_rank_reports_a_sigterm_from_the_moment_its_launcher_knows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a rank that is ended with a killed one passes for the killed one."""
    has_ended = threading.Event()
    monkeypatch.setenv(LAUNCH, str(tmp_path))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(process, "SIGTERM_SECONDS", 0.0)  # no other rank fails
    monkeypatch.setattr(process, "survive_terminal", lambda: None)
    monkeypatch.setattr(process, "exit_when_launcher_ends", lambda folder: None)
    monkeypatch.setattr(process, "exit_now", lambda code: has_ended.set())
    monkeypatch.setattr(process, "write_pid", lambda folder, rank: os.kill(os.getpid(), signal.SIGTERM))
    with on_signals(lambda number: has_ended.set()), rank_process("stopped before training began"):
        assert has_ended.wait(60)
    (rank_exit,) = read_exits(tmp_path)
    assert (rank_exit.code, rank_exit.text) == (ExitCode.STOPPED, "SIGTERM: stopped before training began")
