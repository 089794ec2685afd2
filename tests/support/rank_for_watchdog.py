"""Acts as a launcher of ranks, one for each mode (`FOLDER MODE MODE …`), for test_watchdog.py. It forks them after the imports, which take seconds.

A step is a little work and one collective, under a watchdog. At step HANGS_AT a rank does what its mode says: "trains", "loops" in Python, "locks" Python
in C code, "stops" its process. "pauses" stops its process in every step, until somebody sends SIGCONT, and takes the time that passes for its own. The others
take WORK_SECONDS, however busy the machine is.
"""

import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from ssa_pretrain.config import ParallelConfig
from ssa_pretrain.parallel import watchdog
from ssa_pretrain.process import rank_process

HANGS_AT, STEPS = 10, 60
WORK_SECONDS = 0.03  # of CPU time


def launch(folder: Path, modes: list[str]) -> int:
    """Forks a rank per mode and waits for all; returns the first code that is not 0."""
    ranks = []
    for rank, mode in enumerate(modes):
        ranks.append(os.fork())
        if ranks[-1] == 0:
            os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(modes))})
            live(folder, mode)
            return 0
    codes = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
    return next((code for code in codes if code), 0)


def hang(mode: str) -> None:
    if mode == "loops":
        while True:
            time.sleep(0.01)
    if mode == "locks":
        re.match(r"(a+)+$", "a" * 60 + "b")  # for ever, without giving up Python's lock
    if mode == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)


def work() -> None:
    """Burns CPU time."""
    end = time.thread_time() + WORK_SECONDS
    while time.thread_time() < end:
        pass


def live(folder: Path, mode: str) -> None:
    """One rank."""
    with rank_process("stopped"):
        watchdog.ANSWER_SECONDS = float(os.environ["ANSWER_SECONDS"])
        parallel = ParallelConfig(hang_minutes=float(os.environ["HANG_MINUTES"]))
        dist.init_process_group("gloo")
        placement = SimpleNamespace(rank=dist.get_rank(), world_size=dist.get_world_size())
        with watchdog.Watchdog(placement, parallel, folder) as watch:  # type: ignore[arg-type]
            for step in range(STEPS):
                watch.enter("training", step)
                if step == 0:
                    (folder / f"up_{placement.rank}").write_text(str(os.getpid()))
                    while watch._rank_0 is None:  # the ranks have published a beat, and know who hosts the store
                        time.sleep(0.01)
                if step == HANGS_AT:
                    hang(mode)
                begin = time.monotonic()
                work()
                if mode == "pauses":
                    os.kill(os.getpid(), signal.SIGSTOP)
                watch.add_own_seconds(time.monotonic() - begin if mode == "pauses" else WORK_SECONDS)
                dist.all_reduce(torch.zeros(1))
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(launch(Path(sys.argv[1]), sys.argv[2:]))
