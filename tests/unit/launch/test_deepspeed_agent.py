"""DeepSpeed's launcher under ours: a killed child is a failure, and nothing is left when our launcher is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ssa_pretrain.launch.jobs import deepspeed_job
from ssa_pretrain.launch.supervision import RERUN, Supervisor, find_process
from support.processes import environment
from support.signal_handlers import default_signals

pytest.importorskip("deepspeed")
__all__ = ["default_signals"]  # a fixture that applies by itself


@pytest.fixture
def on_two_nodes(tmp_path: Path) -> dict[str, str]:
    """Returns the environment of a job on two nodes, whose ssh and pdsh act as the test says in the file `pdsh`."""
    (tmp_path / "hosts").write_text("node0 slots=1\nnode1 slots=1\n")
    for name, lines in (("ssh", "echo 10.0.0.1"), ("pdsh", f". {tmp_path}/act")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    return environment() | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


def test_killed_child_is_not_a_success(tmp_path: Path, on_two_nodes: dict[str, str]) -> None:
    """By itself the runner returns 0 here."""
    (tmp_path / "act").write_text("kill -9 $$")
    job, _ = deepspeed_job([f"--hostfile={tmp_path / 'hosts'}"], {})
    assert job.is_remote and subprocess.run(job.command, env=on_two_nodes, capture_output=True).returncode == 0
    with Supervisor(30) as supervisor:
        code = supervisor.run(job.executed, on_two_nodes, waits=True)
        assert supervisor.verdict(code) == (1, f"the launcher's own process was killed by SIGKILL; {RERUN}")


def test_ranks_of_other_nodes_are_ended_when_our_launcher_is_killed(
    tmp_path: Path, on_two_nodes: dict[str, str]
) -> None:
    # The runner ends the ranks of all nodes with a second pdsh, which runs pkill on each.
    (tmp_path / "act").write_text(
        f'case "$*" in *pkill*) echo "$*" > {tmp_path}/ended;; *) echo $$ > {tmp_path}/up; exec sleep 600;; esac'
    )
    job, _ = deepspeed_job([f"--hostfile={tmp_path / 'hosts'}"], {})
    code = (
        "import os, sys; from ssa_pretrain.launch.supervision import Supervisor\n"
        "with Supervisor(9) as supervisor: supervisor.run(sys.argv[1:], os.environ, waits=True)"
    )
    with subprocess.Popen([sys.executable, "-c", code, *job.executed], env=on_two_nodes) as process:
        wait_for(lambda: (tmp_path / "up").exists() and (tmp_path / "up").read_text())
        process.send_signal(signal.SIGKILL)
    wait_for(lambda: (tmp_path / "ended").exists())
    wait_for(lambda: find_process(int((tmp_path / "up").read_text())) is None)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
