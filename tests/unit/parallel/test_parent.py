"""ssa_pretrain/parallel/parent.py: the children of a process, and their forked workers, end with it, even after kill -9."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from support.processes import ROOT

CHILD = """
import multiprocessing, os, sys, time
from ssa_pretrain.parallel.parent import end_with_parent, end_forks_with_this_process
end_with_parent(int(sys.argv[1]))
end_forks_with_this_process()
worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
worker.start()
print(os.getpid(), worker.pid, flush=True)
time.sleep(600)
"""
PARENT = "import os, subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], str(os.getpid())])"


def runs(pid: int) -> bool:
    """Returns whether a process runs and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_children_and_their_workers_end_with_a_killed_process() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as parent:
        assert parent.stdout is not None
        family = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(family) == 2 and all(runs(pid) for pid in family)
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while any(runs(pid) for pid in family):
        assert time.monotonic() < deadline, family
        time.sleep(0.02)


def test_child_of_a_dead_parent_ends_at_once() -> None:
    alone = "from ssa_pretrain.parallel.parent import end_with_parent; end_with_parent(2**22 + 1); print('still here')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", alone], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")
