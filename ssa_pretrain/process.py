"""The life of a process: its signals and errors, and how it reports its exit in one sentence and one exit code.

`command` wraps a program of one process, `rank_process` wraps a rank. Both turn a `CommandError` into its sentence and its exit code
(errors.py).

A rank reports its exit to the launcher of its node, which prints it last. For this the launcher (launch/supervision.py) gives its ranks
a private folder. The environment variable LAUNCH names it:

    pid_RANK           the rank's process: its id and when it started; the first file that a rank writes
    exit_RANK.json     a `RankExit`, the last file that a rank writes
    beat_RANK.json     a `Beat` (parallel/heartbeat.py) of a rank that trains
    lost               the ranks that ended without a `RankExit` because they were killed; written by the launcher
    stop               the signal that the launcher received, such as SIGINT
    alive              a FIFO that the launcher keeps open; when the launcher ends it closes, and the ranks end too

Without the variable (torchrun by hand, a single process, the other nodes of DeepSpeed's launcher) ranks print their sentences
themselves. Stdlib only.
"""

import fcntl
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

from ssa_pretrain.errors import CommandError, ExitCode
from ssa_pretrain.settings.problems import hide_secrets, secrets_of
from ssa_pretrain.signals import STOP_SIGNALS, on_signals, survive_terminal

LAUNCH = "SSA_PRETRAIN_LAUNCH"
ALIVE, LOST, STOP = "alive", "lost", "stop"
REPORTED, NOTICED = "ssa_pretrain/rank_0_reported", "ssa_pretrain/report_noticed"  # keys of the ranks' store
RANK_0_SECONDS = 15.0  # for rank 0 to close its log (W&B takes up to 11) and to report why the run ends
NOTICED_SECONDS = 2.0  # for the other ranks to notice that report
SIGTERM_SECONDS = 1.0  # for the launcher to notice a killed rank, before a SIGTERM counts as a request to stop
PEER_SECONDS = 5.0  # for the launcher to notice a killed rank, before a lost connection counts as an error
LONGEST_LINE = 300


@dataclass(frozen=True, slots=True)
class RankExit:
    """How a rank ended.

    Attributes:
        rank: the rank.
        code: its exit code.
        text: the sentence for the user; may be empty.
        of_one_rank: whether only this rank has the error; False if all ranks have it.
        follows: whether it ended only because another rank did.
        time: when, in seconds since the epoch.
    """

    rank: int
    code: int
    text: str = ""
    of_one_rank: bool = False
    follows: bool = False
    time: float = 0.0


@contextmanager
def command(program: str, interrupted: str = "interrupted") -> Iterator[None]:
    """Wraps a program of one process that needs no clean-up.

    Ctrl-C ends it at once with one line. A `CommandError` ends it with its sentence and its exit code.

    Args:
        program: the program's name, printed before these lines.
        interrupted: the line after Ctrl-C.
    """

    def interrupt(number: signal.Signals) -> None:
        print(f"{program}: {interrupted}", file=sys.stderr, flush=True)
        os._exit(ExitCode.INTERRUPTED)

    with on_signals(interrupt, [signal.SIGINT]):
        try:
            yield
        except CommandError as error:
            print(f"{program}: {error}", file=sys.stderr, flush=True)
            sys.exit(error.exit_code)


@contextmanager
def rank_process(
    stopped: str, *, code: int = ExitCode.STOPPED, signals: Sequence[signal.Signals] = STOP_SIGNALS
) -> Iterator[None]:
    """Wraps the whole life of a rank. The rank reports how it ends, ends with its launcher, and exits at once when it is asked to stop.

    While a run trains, `Interruption` handles the signals instead.

    Args:
        stopped: the sentence after the name of the signal, such as "stopped before training began; …".
        code: the exit code after a signal.
        signals: the signals that ask it to stop.
    """
    given = os.environ.get("RANK", "0")  # anything but a number is reported with the configuration
    folder, rank = launch_folder(), int(given) if given.isdecimal() else 0

    def stop(number: signal.Signals) -> None:
        # Unless the launcher was asked to stop, it most likely ends the remaining ranks after one has failed.
        if folder and not (folder / STOP).exists() and _peer_fails_within(SIGTERM_SECONDS, folder, rank):
            write_exit(folder, RankExit(rank, code, follows=True))
        elif folder or int(os.environ.get("WORLD_SIZE", "1")) == 1:
            report_exit(f"{received_signal(number)}: {stopped}", code=code)
        exit_now(code)

    survive_terminal()
    # The handlers come first, so that a rank that its launcher knows reports a SIGTERM and does not pass for a killed one.
    with on_signals(stop, signals):
        if folder:
            write_pid(folder, rank)
            exit_when_launcher_ends(folder)
        try:
            yield
        except CommandError as error:
            exit_with(error)
        except SystemExit as error:
            if folder and (isinstance(error.code, int) or error.code is None):
                write_exit(folder, RankExit(rank, error.code or 0))
            raise
        except BaseException as error:
            if folder:
                _report_crash(folder, rank, error)
            raise
        if folder:
            write_exit(folder, RankExit(rank, ExitCode.DONE))


def exit_with(error: CommandError) -> NoReturn:
    """Reports an error once per node and exits with its code. Does not wait for the other ranks' work, which may never end.

    Rank 0 reports an error of all ranks first, because a launcher ends it as soon as another rank has exited. A rank whose error no
    other rank has (`of_one_rank`) reports it at once.
    """
    rank, text, code = int(os.environ.get("RANK", "0")), str(error), int(error.exit_code)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        report_exit(text, code=code)
        sys.exit(code)
    if rank == 0:
        report_exit(text, code=code, of_one_rank=error.of_one_rank)
    _wait_for_rank_0(rank, 0.0 if error.of_one_rank else RANK_0_SECONDS)
    if rank != 0:
        report_exit(text, code=code, of_one_rank=error.of_one_rank)
    exit_now(code)


def report_exit(text: str, *, code: int, of_one_rank: bool = False) -> None:
    """Reports why this rank ends: to its launcher, or on stderr without one.

    On stderr, rank 0, local rank 0 of every node and a rank whose error no other rank has report it.

    Args:
        text: one sentence.
        code: the exit code that follows.
        of_one_rank: whether only this rank ends for that reason.
    """
    rank, folder = int(os.environ.get("RANK", "0")), launch_folder()
    text = hide_secrets(text, secrets_of(os.environ))
    if rank and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if not folder and not of_one_rank and os.environ.get("LOCAL_RANK") != "0":
            return
        text = f"rank {rank} ({socket.gethostname()}): {text}"
    if folder:
        write_exit(folder, RankExit(rank, code, text, of_one_rank))
    else:
        print(text, file=sys.stderr, flush=True)


def exit_now(code: int) -> NoReturn:
    """Ends this process at once. The interpreter's own exit could wait forever for other ranks."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # its reader has gone
            stream.flush()
    os._exit(code)


def exit_when_launcher_ends(folder: Path) -> None:
    """Ends this process when the launcher ends, even by kill -9.

    The launcher's FIFO closes then. Linux kills this process at once, also if it is stopped or does not run Python. Elsewhere a thread ends it.
    """

    def wait() -> None:
        # Non-blocking: if the launcher has already ended, a blocking open would wait forever.
        descriptor = os.open(folder / ALIVE, os.O_RDONLY | os.O_NONBLOCK)
        _kill_when_closed(descriptor)
        os.set_blocking(descriptor, True)
        os.read(descriptor, 1)
        shutil.rmtree(folder, ignore_errors=True)
        exit_now(ExitCode.FAILED)

    threading.Thread(target=wait, name="launcher", daemon=True).start()


def exit_with_starter(environment: Mapping[str, str]) -> None:
    """Ends this process, itself a launcher or a program of one process, when the launcher that started it ends; without one it does nothing."""
    folder = environment.get(LAUNCH, "")
    if folder and Path(folder).is_dir():
        exit_when_launcher_ends(Path(folder))


def write_pid(folder: Path, rank: int) -> None:
    """Writes this rank's process id and start, in clock ticks since boot, so that its launcher can name it if it is killed at once."""
    with suppress(OSError):  # not Linux
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        _replace(folder / f"pid_{rank}", f"{os.getpid()} {fields[19]}")


def write_beat(folder: Path, rank: int, text: str) -> None:
    """Writes this rank's heartbeat for the launcher, over the one before."""
    _replace(folder / f"beat_{rank}.json", text)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    temporary.rename(path)


def launch_folder() -> Path | None:
    """Returns the private folder of the launcher that started this rank; None without one of our launchers."""
    folder = os.environ.get(LAUNCH)
    return Path(folder) if folder and "RANK" in os.environ and Path(folder).is_dir() else None


def write_exit(folder: Path, rank_exit: RankExit) -> None:
    """Writes this rank's exit for the launcher. An earlier one is not overwritten."""
    path = folder / f"exit_{rank_exit.rank}.json"
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(asdict(rank_exit) | {"time": time.time()}))
    with suppress(FileExistsError):
        os.link(temporary, path)  # unlike a rename, this fails if the file exists
    temporary.unlink()


def read_exits(folder: Path) -> list[RankExit]:
    """Returns the exits of this node's ranks. Those that caused the others come first."""
    found = [RankExit(**json.loads(path.read_text())) for path in folder.glob("exit_*.json")]
    return sorted(found, key=lambda e: (e.code == 0, e.follows, not e.of_one_rank, e.time if e.of_one_rank else e.rank))


def received_signal(number: signal.Signals) -> str:
    """Returns the name of the signal that the launcher received and passed on, or of `number` without a launcher."""
    folder = launch_folder()
    return (folder / STOP).read_text() if folder and (folder / STOP).exists() else number.name


def shortened(text: str) -> str:
    """Returns a text as one line of at most LONGEST_LINE characters."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_LINE else line[: LONGEST_LINE - 3] + "..."


def _kill_when_closed(descriptor: int) -> None:
    """Makes the kernel kill this process when the last writer of a FIFO closes it (`fcntl`, F_SETSIG)."""
    if hasattr(fcntl, "F_SETSIG"):
        fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_ASYNC)


def _report_crash(folder: Path, rank: int, error: BaseException) -> None:
    """Reports an unexpected error to the launcher, unless the end of another rank caused it. Ends the process if there are other ranks."""
    has_peers = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if has_peers and isinstance(error, RuntimeError) and _peer_fails_within(PEER_SECONDS, folder, rank):
        write_exit(folder, RankExit(rank, ExitCode.FAILED, follows=True))
        time.sleep(PEER_SECONDS)  # DeepSpeed's launcher polls once per second, and should notice the other rank first
        exit_now(ExitCode.FAILED)
    line = hide_secrets(shortened(f"{type(error).__name__}: {error}"), secrets_of(os.environ))
    text = f"rank {rank} failed, its trace is above: {line}"
    write_exit(folder, RankExit(rank, ExitCode.FAILED, text, of_one_rank=True))
    if has_peers:
        traceback.print_exception(error)
        exit_now(ExitCode.FAILED)


def _peer_fails_within(seconds: float, folder: Path, rank: int) -> bool:
    """Returns whether another rank of this node fails or is killed within `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        failed = any(e.rank != rank and e.code and not e.follows for e in read_exits(folder))
        if failed or (folder / LOST).exists():
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)


def _wait_for_rank_0(rank: int, seconds: float) -> None:
    """On rank 0, records that its error has been reported; on other ranks, waits up to `seconds` for that.

    Rank 0 may host the store that the others read, so it stays until they have noticed.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        return  # no rank has joined yet
    with suppress(dist.DistError, RuntimeError):  # the rank that hosts the store has exited
        store = dist.distributed_c10d._get_default_store()
        if rank == 0:
            store.set(REPORTED, "")
            deadline = time.monotonic() + NOTICED_SECONDS
            while store.add(NOTICED, 0) < dist.get_world_size() - 1 and time.monotonic() < deadline:
                time.sleep(0.05)
        elif seconds:
            store.wait([REPORTED], timedelta(seconds=seconds))
            store.add(NOTICED, 1)
