"""Acts as a launcher of ranks (`launcher MODE MODE …`) and as one of its ranks (`rank MODE`), for test_supervision.py."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ssa_pretrain.parallel.heartbeat import Beat
from ssa_pretrain.process import launch_folder, rank_process, write_beat
from ssa_pretrain.signals import on_signals


def launch(modes: list[str]) -> int:
    """Starts a rank per mode, as DeepSpeed's launcher does: the first that fails ends all, and its code is returned."""
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "rank", mode],
            env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(modes))},
        )
        for rank, mode in enumerate(modes)
    ]
    while True:
        codes = [rank.poll() for rank in ranks]
        if failed := [code for code in codes if code]:
            for rank in ranks:
                rank.terminate()
            for rank in ranks:
                rank.wait()
            return failed[0]
        if None not in codes:
            return 0
        time.sleep(0.05)


def live(mode: str) -> None:
    """One rank."""
    here = f"up_{os.environ['RANK']}"
    if mode == "dies":
        while not Path("up_0").exists():  # a peer that still starts would be ended without a trace too
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        Path(here).write_text(str(os.getpid()))
        time.sleep(600)
    with rank_process("stopped before training began"):
        subprocess.Popen(["sleep", "60"])  # a helper that outlives its rank
        Path(here).write_text(str(os.getpid()))
        live_until_killed(mode)
        if mode == "waits":
            time.sleep(600)
        if mode == "finishes":
            asked = threading.Event()
            with on_signals(lambda number: asked.set()):
                Path(f"training_{os.environ['RANK']}").touch()
                asked.wait(60)
                time.sleep(0.5)  # the rest of its work
        if mode == "fails":
            raise ValueError("a bad value")
        if mode == "loses its peer":
            with suppress(FileNotFoundError):  # it has gone
                while (peer := Path("up_1")).exists() and Path(f"/proc/{peer.read_text()}/cmdline").read_bytes():
                    time.sleep(0.02)
            raise RuntimeError("Connection closed by peer")
        if mode.isdecimal():
            sys.exit(int(mode))


def live_until_killed(mode: str) -> None:
    """Modes of test_restarts.py: a rank with heartbeats."""
    rank, folder = int(os.environ["RANK"]), launch_folder()
    beat = Beat(rank, "node7", os.getpid(), phase="training", step=12, time=time.monotonic(), trained=3, limit=0.1)
    if folder and mode in ("saves-and-is-killed", "trains-and-fails", "silent"):
        saved = int(mode == "saves-and-is-killed")
        write_beat(folder, rank, replace(beat, saved=saved, limit=0.1 if mode == "silent" else None).encode())
    if mode in ("killed", "saves-and-is-killed"):
        while not all(Path(f"up_{peer}").exists() for peer in range(int(os.environ["WORLD_SIZE"]))):
            time.sleep(0.02)  # a peer that still starts would report nothing either
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "trains-and-fails":
        raise ValueError("a bad value")
    if mode == "silent":
        time.sleep(600)


if __name__ == "__main__":
    if sys.argv[1] == "launcher":
        sys.exit(launch(sys.argv[2:]))
    live(sys.argv[2])
