"""How a rank tells the launcher of its node that it has ended, and why; the launcher says so last, with the rank's exit code.

A launcher of ours (supervision.py) gives its ranks a private folder in the environment variable LAUNCH. It holds

    ending_RANK.json   an `Ending`, written by the rank as the last thing it does
    lost               ranks that ended without one, written by the launcher: they were killed
    stop               the signal that the launcher was sent, such as SIGINT
    alive              a FIFO that the launcher keeps open: its end is the launcher's end, and the ranks' too

Without the variable (torchrun by hand, a single process, other nodes of DeepSpeed's launcher) ranks print by themselves. Stdlib only.
"""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

LAUNCH = "SSA_PRETRAIN_LAUNCH"
ALIVE, LOST, STOP = "alive", "lost", "stop"


@dataclass(frozen=True, slots=True)
class Ending:
    """How a rank has ended.

    Attributes:
        rank: the rank.
        code: its exit code.
        text: what the user is told; empty if there is nothing to tell.
        alone: whether this rank ends for a reason of its own, and not for one that all ranks have.
        follows: whether it ends only because another rank did.
        time: when, in seconds since the epoch.
    """

    rank: int
    code: int
    text: str = ""
    alone: bool = False
    follows: bool = False
    time: float = 0.0


def launch_folder() -> Path | None:
    """Returns the folder of the launcher of ours that started this rank, None without one."""
    folder = os.environ.get(LAUNCH)
    return Path(folder) if folder and "RANK" in os.environ and Path(folder).is_dir() else None


def write_ending(folder: Path, ending: Ending) -> None:
    """Leaves this rank's ending to the launcher; the first one stands."""
    path = folder / f"ending_{ending.rank}.json"
    fresh = path.with_suffix(f".{os.getpid()}.tmp")
    fresh.write_text(json.dumps(asdict(ending) | {"time": time.time()}))
    with suppress(FileExistsError):
        os.link(fresh, path)
    fresh.unlink()


def read_endings(folder: Path) -> list[Ending]:
    """Returns the endings of this node's ranks, those that explain the others first."""
    found = [Ending(**json.loads(path.read_text())) for path in folder.glob("ending_*.json")]
    return sorted(found, key=lambda e: (e.code == 0, e.follows, not e.alone, e.time if e.alone else e.rank))


def another_failed(folder: Path, rank: int) -> bool:
    """Returns whether another rank of this node has failed or was killed."""
    return (folder / LOST).exists() or any(
        ending.rank != rank and ending.code and not ending.follows for ending in read_endings(folder)
    )


def signal_name(number: signal.Signals) -> str:
    """Returns the name of the signal that the launcher was sent, where it passed one on; else of the one that came."""
    folder = launch_folder()
    return (folder / STOP).read_text() if folder and (folder / STOP).exists() else number.name


def last_words(text: str, *, code: int, alone: bool = False) -> None:
    """Reports why this rank ends: to its launcher, or else on stderr, from rank 0, from each node's first rank and from a rank that is alone with it.

    Args:
        text: one sentence.
        code: the exit code that follows.
        alone: whether only this rank ends for that reason.
    """
    rank, folder = int(os.environ.get("RANK", "0")), launch_folder()
    if rank and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if not folder and not alone and os.environ.get("LOCAL_RANK") != "0":
            return
        text = f"rank {rank} ({socket.gethostname()}): {text}"
    if folder:
        write_ending(folder, Ending(rank, code, text, alone))
    else:
        print(text, file=sys.stderr, flush=True)


def end_process(code: int) -> NoReturn:
    """Ends this process at once, without waiting for other ranks, which may never come; its checkpoint writers end with it."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # its reader has gone
            stream.flush()
    for child in multiprocessing.active_children():  # os._exit would leave them behind
        child.kill()
    os._exit(code)


def end_with_launcher(folder: Path) -> None:
    """Ends this process, from a thread of its own, when the launcher is gone, even by kill -9."""

    def wait() -> None:
        descriptor = os.open(
            folder / ALIVE, os.O_RDONLY | os.O_NONBLOCK
        )  # else it would wait here for a launcher that is gone
        os.set_blocking(descriptor, True)
        os.read(descriptor, 1)
        shutil.rmtree(folder, ignore_errors=True)
        end_process(1)

    threading.Thread(target=wait, name="launcher", daemon=True).start()
