"""Runs a launcher's command and answers for it: signals, the ranks' last sentence and exit code, and no process left behind.

torchrun and DeepSpeed's launcher answer a signal by killing after half a minute, turn exit codes into 1 or 0, and leave ranks behind when they are
killed themselves. So the command runs in a session of its own, where no signal of the terminal or of the caller's process group reaches it, and
this process

    passes the first SIGTERM, SIGINT or SIGHUP on to the ranks, as SIGTERM, which stop together and save; a second SIGINT kills all
    notices a rank that ends without an `Ending` (endings.py): it was killed, and the others, which may wait for it for ever, follow
    ends with the sentence and exit code of the rank that explains the others
    kills what is left: its processes are known by the variable LAUNCH in their environment

When this process itself is killed, the FIFO `alive` in its folder ends, and the ranks with it. Stdlib only.
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

from ssa_pretrain.endings import ALIVE, LAUNCH, LOST, STOP, Ending, read_endings
from ssa_pretrain.signals import INTERRUPTED, SECOND_SECONDS, STOPPED, STOPS, on_signals

FAILURES = "failures"  # the exit codes of ranks, by torch_agent.py
AGENT = "agent"  # its own last sentence
OURS = range(3, 8)  # exit codes that have a meaning of ours
NOT_BEGUN = "stopped before training began; the same command starts it again"
AGAIN = "run the same command again to go on from the newest checkpoint"
POLL_SECONDS = 0.2
LOST_SECONDS = 10.0  # for the other ranks to end when one was killed
LEAVE_SECONDS = 15.0  # for helpers of ranks, such as W&B's client of a killed one, to end by themselves


@dataclass(frozen=True, slots=True)
class Member:
    """A process of the command.

    Attributes:
        pid: its id.
        started: when, in clock ticks since boot, as ids are used again.
    """

    pid: int
    started: str

    def is_alive(self) -> bool:
        """Returns whether it runs: neither gone nor a zombie."""
        return member(self.pid) == self

    def send(self, number: signal.Signals) -> None:
        """Signals it if it is still there."""
        if self.is_alive():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, number)


class Supervisor:
    """Runs a command and answers for it, or several in turn; receives this process's signals while it is entered.

    Attributes:
        folder: the private folder of the command's ranks.
        stop: the signal that this process was sent, None before one.
        abandoned: whether a second Ctrl-C was.
    """

    def __init__(self, patience: float, *, reports: bool = False) -> None:
        """Takes the seconds that ranks have to stop and save before they are killed, and whether they report their endings."""
        self.stop: signal.Signals | None = None
        self.abandoned = False
        self._patience, self._reports = patience, reports
        self._asked_at, self._lost_at = 0.0, math.inf
        self._ranks: dict[int, Member] = {}
        self._signals = on_signals(self._ask)
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
        """Runs a command to its end, and returns its own exit code, negative for a signal; none of its processes is left on this node.

        Args:
            command: the command.
            environment: its environment.
            waits: whether it is told to stop itself, as it has no ranks on this node, and waited for.
        """
        if self.stop:
            return -self.stop
        self._ranks = {}
        process = subprocess.Popen(command, env={**environment, LAUNCH: str(self.folder)}, start_new_session=True)
        told: set[int] = set()
        while not self.abandoned:
            self._find_lost(process.pid)
            ended = process.poll()
            if ended is not None and -ended in STOPS:
                self._ask(signal.Signals(-ended))  # somebody has stopped it instead of this process
            if self.stop:
                self._tell(told, process.pid if waits else None)
            still_stopping = self.stop and any(rank.is_alive() for rank in self._ranks.values())
            nothing_begun = self.stop and not waits and not told
            if self._overdue() or (not still_stopping and (ended is not None or nothing_begun)):
                break
            time.sleep(POLL_SECONDS) if ended is not None else _wait(process, POLL_SECONDS)
        self._find_lost(process.pid)
        self._end(process)
        return process.wait()

    def verdict(self, code: int) -> tuple[int, str]:
        """Returns the exit code and the last sentence, empty if there is none, of a command that returned `code`."""
        endings, (lost, number) = read_endings(self.folder), self._who_was_lost(code)
        if self.abandoned:
            return INTERRUPTED, "SIGINT again: left at once, without the steps since the last checkpoint"
        if endings and endings[0].code and not endings[0].follows and not self._was_lost_before(endings[0], number):
            return endings[0].code, endings[0].text
        if code == 0 and (not self._reports or endings):
            return 0, ""
        if self.stop and time.monotonic() - self._asked_at > self._patience:
            return 1, f"{self.stop.name}: the ranks did not stop within {self._patience:g} s and were killed; {AGAIN}"
        if self.stop and (not lost or number in STOPS):
            return STOPPED, f"{self.stop.name}: {NOT_BEGUN}"
        if code <= 0:
            how = f"was killed by {number.name}" if number else "returned 0, but the run did not come to its end"
            return 1, f"the launcher's own process {how}; {AGAIN}"
        if lost and number:
            return 1, f"{lost} was killed by {number.name}; {AGAIN}"
        if code in OURS or (not self._reports and not lost):
            return code, ""  # what it printed stands
        if said := _read(self.folder / AGENT):
            return 3, said
        who = lost or "the launcher's own process"
        return 1, f"{who} failed, and what it printed is above; {AGAIN}"

    def _ask(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.stop is None:
            self._asked_at = now
            (self.folder / STOP).write_text(number.name)
            self.stop = number
            if number is signal.SIGINT and sys.stderr.isatty():
                print("\nstopping; Ctrl-C again leaves at once, without saving", file=sys.stderr, flush=True)
        elif number is signal.SIGINT and now - self._asked_at > SECOND_SECONDS:
            self.abandoned = True

    def _find_lost(self, launcher: int) -> None:
        """Looks for ranks that were not there before, and for one that has ended without a word."""
        self._ranks |= find_ranks(launcher)
        if not self._reports or (self.folder / LOST).exists():
            return
        gone = [rank for rank, process in sorted(self._ranks.items()) if not process.is_alive()]
        if lost := [str(rank) for rank in gone if not (self.folder / f"ending_{rank}.json").exists()]:
            _write(self.folder / LOST, " ".join(lost))
            self._lost_at = time.monotonic()

    def _who_was_lost(self, code: int) -> tuple[str, signal.Signals | None]:
        """Returns who was killed, empty if no rank was, and by which signal: not by the SIGTERM that others are sent when one is gone."""
        codes: dict[str, int] = json.loads(_read(self.folder / FAILURES) or "{}")
        lost = _read(self.folder / LOST).split() or [
            rank for rank, one in codes.items() if one < 0 and -one not in STOPS
        ]
        if lost:
            rank = min(lost, key=lambda rank: -codes.get(rank, 0) in STOPS)
            return f"rank {rank}", _signal_of(codes.get(rank, code))
        number = _signal_of(code)
        return "a rank" if code > 0 and number and number not in STOPS else "", number

    def _was_lost_before(self, ending: Ending, number: signal.Signals | None) -> bool:
        """Whether a rank was killed before another ended as this one did."""
        if (self.folder / LOST).exists():
            return (self.folder / LOST).stat().st_mtime < ending.time
        # Too fast to be seen: the other one was ended by its launcher, and took that for a stop.
        return ending.code == STOPPED and not self.stop and number is not None and number not in STOPS

    def _overdue(self) -> bool:
        """Whether the ranks have had their time to stop, or to follow one that was killed."""
        now = time.monotonic()
        return now - self._lost_at > LOST_SECONDS or bool(self.stop and now - self._asked_at > self._patience)

    def _tell(self, told: set[int], command: int | None) -> None:
        """Passes the stop on to the command, where it is given, else to the ranks; once to each."""
        pids = [rank.pid for rank in self._ranks.values() if rank.is_alive()] if command is None else [command]
        for pid in set(pids) - told:
            told.add(pid)
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGINT if command and self.stop is signal.SIGINT else signal.SIGTERM)

    def _end(self, process: subprocess.Popen) -> None:
        """Kills what is left: ranks first, so that their launcher can report them; helpers of ranks have a moment to end by themselves."""
        for rank in self._ranks.values():
            rank.send(signal.SIGKILL)
        if self._ranks and not self.abandoned:
            _wait(process, LEAVE_SECONDS)
        deadline = time.monotonic() + (LEAVE_SECONDS if process.poll() is not None else 0.0)
        while (left := find_members(self.folder)) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        while left:
            for one in left:
                one.send(signal.SIGKILL)
            process.poll()
            time.sleep(0.05)
            left = find_members(self.folder)


def member(pid: int) -> Member | None:
    """Returns a process that runs: None if it is gone, or a zombie."""
    fields = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return Member(pid, fields[19]) if fields and fields[0] not in "ZX" else None


def find_members(folder: Path) -> list[Member]:
    """Returns the processes that have a launcher's folder in their environment, whoever their parents are by now."""
    mark = f"{LAUNCH}={folder}"
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [found for pid in pids if mark in _environment(pid) and (found := member(pid))]


def find_ranks(launcher: int) -> dict[int, Member]:
    """Returns the ranks among a launcher's descendants; helpers of ranks, which have the same environment, are below them."""
    found: dict[int, Member] = {}
    parents = [launcher]
    for parent in parents:
        for task in Path(f"/proc/{parent}/task").glob("*"):
            for child in map(int, _read(task / "children").split()):
                environment = _environment(child)
                if not any(environment):
                    continue  # a rank that is just dying has none any more, and its helpers, which have its RANK, are not it
                rank = next((pair[5:] for pair in environment if pair.startswith("RANK=")), "")
                if not rank.isdigit():
                    parents.append(child)
                elif running := member(child):
                    found[int(rank)] = running
    return found


def _environment(pid: int) -> list[str]:
    return _read(Path(f"/proc/{pid}/environ")).split("\0")


def _read(path: Path) -> str:
    """A file's text; empty if it cannot be read, as of a process that has ended."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _write(path: Path, text: str) -> None:
    fresh = path.with_suffix(".tmp")
    fresh.write_text(text)
    fresh.rename(path)


def _signal_of(code: int) -> signal.Signals | None:
    """The signal that an exit code stands for: -9 of a process, 247 where DeepSpeed's launcher has passed that on."""
    number = -code if code < 0 else 256 - code
    return signal.Signals(number) if number in {s.value for s in signal.Signals} else None


def _wait(process: subprocess.Popen, seconds: float) -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
