"""Runs the command of a launcher: passes signals on, reports the ranks' sentence and exit code, and leaves no process behind.

torchrun and DeepSpeed's launcher kill the ranks half a minute after a signal, turn exit codes into 1 or 0, and leave ranks behind when they
are killed themselves. So the command runs in its own session, where no signal of the terminal or of the caller's process group reaches it.
This process

    passes the first SIGTERM, SIGINT or SIGHUP on to the ranks as SIGTERM; they stop together and save. A second SIGINT kills them
    notices a rank whose heartbeats stop (parallel/heartbeat.py) although no other rank has named it, and ends the run
    notices a rank that ends without a `RankExit` (process.py): it was killed. The others, which may wait for it for ever, are ended too
    ends with the sentence and exit code of the rank that explains the others
    kills the processes that remain; it finds them by the variable LAUNCH in their environment

When this process itself is killed, the FIFO `alive` in its folder closes, and the ranks end. Stdlib only.
"""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ssa_pretrain.errors import ExitCode
from ssa_pretrain.launch.restarts import Outcome
from ssa_pretrain.parallel.heartbeat import ENDED, Beat, describe_process
from ssa_pretrain.process import ALIVE, LAUNCH, LOST, STOP, RankExit, read_exits
from ssa_pretrain.settings.files import write_atomically
from ssa_pretrain.signals import REPEAT_SECONDS, STOP_SIGNALS, on_signals

FAILURES = "failures"  # file of torch_agent.py: the exit codes of the ranks
AGENT = "agent"  # file of torch_agent.py: its own last sentence
OUR_CODES = (*range(ExitCode.CONFIGURATION, ExitCode.HUNG + 1), ExitCode.REPLICAS)
NOT_BEGUN = "stopped before training began; the same command starts it again"
RERUN = "run the same command again to resume from the newest checkpoint"
OTHER_NODE = "the node where the ranks meet has ended its part of the run"
POLL_SECONDS = 0.2
HEARTBEAT_SECONDS = 1.0  # between looks at the ranks' heartbeats
LOST_SECONDS = 10.0  # for the other ranks to end after one was killed
HUNG_SECONDS = 5.0  # for the other ranks to end after one was named that hangs
SILENT_SECONDS = 40.0  # for the ranks to name one whose heartbeats have stopped, after its limit
UNLIMITED_SECONDS = 600.0  # without heartbeats of a rank that may take as long as it wants
HELPER_SECONDS = 15.0  # for helpers of ranks to end by themselves, such as the W&B client of a killed rank


@dataclass(frozen=True, slots=True)
class Process:
    """A process of the command.

    Attributes:
        pid: its id.
        started: when, in clock ticks since boot, because ids are reused.
    """

    pid: int
    started: str

    def is_alive(self) -> bool:
        """Returns whether it runs: it is neither gone nor a zombie."""
        return find_process(self.pid) == self

    def send(self, number: signal.Signals) -> None:
        """Sends it a signal if it still runs."""
        if self.is_alive():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, number)


class Supervisor:
    """Runs a command, or several in turn, and handles the signals of this process while it is entered.

    Attributes:
        folder: the private folder of the command's ranks.
        stop: the signal that this process received; None before one.
        abandoned: whether it received a second Ctrl-C.
    """

    def __init__(self, patience: float, *, reports: bool = False) -> None:
        """Takes the seconds that ranks have to stop and save before they are killed, and whether they report their exits."""
        self.stop: signal.Signals | None = None
        self.abandoned = False
        self._killed_launcher = False  # by this supervisor, because it outlived its ranks
        self._patience, self._reports = patience, reports
        self._signalled_at, self._lost_at = 0.0, math.inf
        self._ranks: dict[int, Process] = {}
        self._silent = ""  # the sentence on ranks whose heartbeats have stopped
        self._checked_at = time.monotonic()
        self._signals = on_signals(self._receive)
        self._temporary = tempfile.TemporaryDirectory(prefix="ssa_pretrain_")
        self.folder = Path(self._temporary.name)

    def __enter__(self) -> Self:
        self._signals.__enter__()
        os.mkfifo(self.folder / ALIVE)
        self._alive = os.open(self.folder / ALIVE, os.O_RDWR)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._alive)
        self._signals.__exit__(None, None, None)
        self._temporary.cleanup()

    def run(self, command: Sequence[str], environment: Mapping[str, str], *, waits: bool = False) -> int:
        """Runs a command to its end. Returns its own exit code, negative for a signal. None of its processes remains on this node.

        Args:
            command: the command.
            environment: its environment.
            waits: whether the command itself is asked to stop and waited for, because it has no ranks on this node.
        """
        if self.stop:
            return -self.stop
        self._ranks = {}
        process = subprocess.Popen(command, env={**environment, LAUNCH: str(self.folder)}, start_new_session=True)
        signalled: set[int] = set()
        while not self.abandoned:
            self._find_lost(process.pid)
            self._find_hung()
            ended = process.poll()
            if ended is not None and -ended in STOP_SIGNALS:
                self._receive(signal.Signals(-ended))  # somebody stopped the command instead of this process
            if self.stop:
                self._pass_on(signalled, process.pid if waits else None)
            still_stopping = self.stop and any(rank.is_alive() for rank in self._ranks.values())
            nothing_begun = self.stop and not waits and not signalled
            if self._overdue() or (not still_stopping and (ended is not None or nothing_begun)):
                break
            time.sleep(POLL_SECONDS) if ended is not None else _wait(process, POLL_SECONDS)
        self._find_lost(process.pid)
        self._kill_remaining(process)
        return process.wait()

    def verdict(self, code: int) -> tuple[int, str]:
        """Returns the exit code and the last sentence, which may be empty, after the command returned `code`."""
        exits, (lost, number) = read_exits(self.folder), self._killed_rank(code)
        if self.abandoned:
            return ExitCode.INTERRUPTED, "SIGINT again: exited at once, without the steps since the last checkpoint"
        if hung := self._silent or next((one.text for one in exits if one.code == ExitCode.HUNG), ""):
            return ExitCode.HUNG, f"{hung}; {RERUN}"
        if self._lost_other_nodes(exits):
            return 1, f"{OTHER_NODE}; {RERUN}"
        if exits and exits[0].code and not exits[0].follows and not self._was_killed_before(exits[0], number):
            return exits[0].code, exits[0].text
        if code == 0 and (not self._reports or exits):
            return 0, ""
        if self.stop and time.monotonic() - self._signalled_at > self._patience:
            return 1, f"{self.stop.name}: the ranks did not stop within {self._patience:g} s and were killed; {RERUN}"
        if self.stop and (not lost or number in STOP_SIGNALS):
            return ExitCode.STOPPED, f"{self.stop.name}: {NOT_BEGUN}"
        if code <= 0 and not (lost and self._killed_launcher):
            how = f"was killed by {number.name}" if number else "returned 0, but the run did not come to its end"
            return 1, f"the launcher's own process {how}; {RERUN}"
        if lost and number:
            return 1, f"{lost} was killed by {number.name}; {RERUN}"
        if code in OUR_CODES or (not self._reports and not lost):
            return code, ""  # it has printed its own message
        if sentence := _read(self.folder / AGENT):
            return ExitCode.CONFIGURATION, sentence
        who = lost or "the launcher's own process"
        return 1, f"{who} failed, and what it printed is above; {RERUN}"

    def outcome(self, code: int) -> Outcome:
        """Returns how the command ended, for restarts.py, after it was given the exit code `code`."""
        beats, exits = self._beats(), read_exits(self.folder)
        return Outcome(
            code,
            crashed=any(one.code == ExitCode.FAILED and one.of_one_rank for one in exits),
            trained=max((beat.trained for beat in beats), default=0),
            saved=max((beat.saved for beat in beats), default=0),
        )

    def pause(self, seconds: float) -> bool:
        """Waits before a restart. Returns whether a signal asked to stop meanwhile."""
        deadline = time.monotonic() + seconds
        while not self.stop and time.monotonic() < deadline:
            time.sleep(min(POLL_SECONDS, seconds))
        return self.stop is not None

    def _receive(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.stop is None:
            self._signalled_at = now
            (self.folder / STOP).write_text(number.name)
            self.stop = number
            if number is signal.SIGINT and sys.stderr.isatty():
                print("\nstopping; Ctrl-C again exits at once, without saving", file=sys.stderr, flush=True)
        elif number is signal.SIGINT and now - self._signalled_at > REPEAT_SECONDS:
            self.abandoned = True

    def _find_lost(self, launcher: int) -> None:
        """Looks for new ranks, and for ranks that ended without a report."""
        self._ranks = self._noted() | self._ranks | find_ranks(launcher)
        if not self._reports or (self.folder / LOST).exists():
            return
        gone = [rank for rank, process in sorted(self._ranks.items()) if not process.is_alive()]
        if lost := [str(rank) for rank in gone if not (self.folder / f"exit_{rank}.json").exists()]:
            write_atomically(self.folder / LOST, " ".join(lost))
            self._lost_at = time.monotonic()

    def _noted(self) -> dict[int, Process]:
        """Returns the ranks of this node that have written their process ids, dead or alive."""
        texts = {path.name.removeprefix("pid_"): _read(path).split() for path in self.folder.glob("pid_*[0-9]")}
        return {int(rank): Process(int(words[0]), words[1]) for rank, words in texts.items() if len(words) == 2}

    def _beats(self) -> list[Beat]:
        """Returns the last heartbeats of this node's ranks."""
        texts = [_read(path) for path in self.folder.glob("beat_*.json")]
        return [Beat.decode(text) for text in texts if text]

    def _find_hung(self) -> None:
        """Looks for ranks that have named one that hangs, and for heartbeats that have stopped while none has."""
        now = time.monotonic()
        if not self._reports or now - self._checked_at < HEARTBEAT_SECONDS:
            return
        was_stopped, self._checked_at = now - self._checked_at > SILENT_SECONDS, now
        if any(one.code == ExitCode.HUNG for one in read_exits(self.folder)):
            self._lost_at = min(self._lost_at, now - LOST_SECONDS + HUNG_SECONDS)
        if was_stopped or self._silent:
            return  # this process was itself stopped, with all ranks

        def is_silent(beat: Beat) -> bool:
            return beat.phase != ENDED and now - beat.time > SILENT_SECONDS + (beat.limit or UNLIMITED_SECONDS)

        silent = [beat for beat in self._beats() if is_silent(beat) and self._ranks.get(beat.rank)]
        known = {beat.rank: describe_process(beat.pid) for beat in silent}
        if silent:
            first = min(silent, key=lambda beat: ("stopped" not in known[beat.rank], beat.time))
            why = f"; {known[first.rank]}" if known[first.rank] else ""
            seconds = f"{now - first.time:.0f} s"
            self._silent = f"hang: {first.name} has given no sign of life for {seconds} in {first.place}{why}"
            self._lost_at = now - LOST_SECONDS - 1  # nothing else is to be expected of the ranks

    def _killed_rank(self, code: int) -> tuple[str, signal.Signals | None]:
        """Returns which rank was killed, empty if none was, and by which signal, other than the SIGTERM that the remaining ranks receive."""
        codes: dict[str, int] = json.loads(_read(self.folder / FAILURES) or "{}")
        lost = _read(self.folder / LOST).split() or [
            rank for rank, one in codes.items() if one < 0 and -one not in STOP_SIGNALS
        ]
        if lost:
            rank = min(lost, key=lambda rank: -codes.get(rank, 0) in STOP_SIGNALS)
            return f"rank {rank}", _signal_of(codes.get(rank, code))
        number = _signal_of(code)
        return "a rank" if code > 0 and number and number not in STOP_SIGNALS else "", number

    def _was_killed_before(self, rank_exit: RankExit, number: signal.Signals | None) -> bool:
        """Returns whether a rank was killed before another ended in this way."""
        if (self.folder / LOST).exists() and (self.folder / LOST).stat().st_mtime < rank_exit.time:
            return True
        # It happened between two polls: the launcher ended the other rank, which took the SIGTERM for a request to stop.
        return (
            rank_exit.code == ExitCode.STOPPED and not self.stop and number is not None and number not in STOP_SIGNALS
        )

    def _lost_other_nodes(self, exits: Sequence[RankExit]) -> bool:
        """Returns whether torchrun's agent has ended the ranks because the node where they met has gone. They take its SIGTERM for a request to stop."""
        if self.stop or not (self.folder / AGENT).exists() or not any(beat.trained for beat in self._beats()):
            return False
        return all(one.follows or (one.code == ExitCode.STOPPED and NOT_BEGUN in one.text) for one in exits)

    def _overdue(self) -> bool:
        """Returns whether the time for the ranks to stop, or to end after one was killed, is over."""
        now = time.monotonic()
        return now - self._lost_at > LOST_SECONDS or bool(self.stop and now - self._signalled_at > self._patience)

    def _pass_on(self, signalled: set[int], command: int | None) -> None:
        """Passes the signal on to the command if it is given, else to the ranks; once to each."""
        pids = [rank.pid for rank in self._ranks.values() if rank.is_alive()] if command is None else [command]
        for pid in set(pids) - signalled:
            signalled.add(pid)
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGINT if command and self.stop is signal.SIGINT else signal.SIGTERM)

    def _kill_remaining(self, process: subprocess.Popen) -> None:
        """Kills the processes that remain: ranks first, so that their launcher can report them. Helpers of ranks get time to end by themselves."""
        for rank in self._ranks.values():
            rank.send(signal.SIGKILL)
        if self._ranks and not self.abandoned:
            _wait(process, HELPER_SECONDS)
        deadline = time.monotonic() + (HELPER_SECONDS if process.poll() is not None else 0.0)
        while (remaining := find_processes(self.folder)) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        self._killed_launcher = process.poll() is None
        while remaining:
            for one in remaining:
                one.send(signal.SIGKILL)
            process.poll()
            time.sleep(0.05)
            remaining = find_processes(self.folder)


def find_process(pid: int) -> Process | None:
    """Returns a running process; None if it is gone or a zombie."""
    fields = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return Process(pid, fields[19]) if fields and fields[0] not in "ZX" else None


def find_processes(folder: Path) -> list[Process]:
    """Returns the processes that have the launcher's folder in their environment, whatever their parents are by now."""
    mark = f"{LAUNCH}={folder}"
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [found for pid in pids if mark in _environment(pid) and (found := find_process(pid))]


def find_ranks(launcher: int) -> dict[int, Process]:
    """Returns the ranks among a launcher's descendants; helpers of ranks, which have the same environment, are below them."""
    found: dict[int, Process] = {}
    parents = [launcher]
    for parent in parents:
        for task in Path(f"/proc/{parent}/task").glob("*"):
            for child in map(int, _read(task / "children").split()):
                environment = _environment(child)
                if not any(environment):
                    continue  # a rank that is dying has no environment, and its helpers, which have its RANK, are not the rank
                rank = next((pair[5:] for pair in environment if pair.startswith("RANK=")), "")
                if not rank.isdigit():
                    parents.append(child)
                elif running := find_process(child):
                    found[int(rank)] = running
    return found


def _environment(pid: int) -> list[str]:
    return _read(Path(f"/proc/{pid}/environ")).split("\0")


def _read(path: Path) -> str:
    """Returns the text of a file; empty if it cannot be read, such as that of a process that has ended."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _signal_of(code: int) -> signal.Signals | None:
    """Returns the signal that an exit code stands for: -9 from a process, 247 if DeepSpeed's launcher passed it on."""
    number = -code if code < 0 else 256 - code
    return signal.Signals(number) if number in {s.value for s in signal.Signals} else None


def _wait(process: subprocess.Popen, seconds: float) -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
