"""The watchdog of a rank: notices that a run hangs, names the rank that is missing, and ends the run so that its launcher can start it again.

A collective that waits for a rank which never comes names nobody, and torch gives up only after `parallel.timeout_minutes`. So each rank has two threads.
One writes a heartbeat to the launcher's folder (process.py) once per beat, and watches the time that the main thread's phase takes without progress.
The other publishes the heartbeat in the process group's store, over a connection of its own. When a phase exceeds its limit on some rank

    every such rank publishes its stack and a last word;
    after GRACE beats, the lowest rank that still beats judges who is missing (heartbeat.py), publishes the verdict, and stays until the others have it;
    rank 0's log and `hang.txt` in the run's folder get the names and the stacks; all ranks end with exit code 8.

The limit of a training step is `parallel.hang_minutes`, by default 20 times the median step but at least two minutes. The first steps of a process compile, and
building, loading, evaluating and saving have no usual time: there a rank may wait for others almost as long as a collective lets it, or work six times as
long by itself, and every collective that is called meanwhile counts as progress. A process without peers has no limit there.

No thread of a stopped process runs, and a thread needs Python's lock. So a rank that hangs in C code while it holds the lock is recognised by the beats
that it does not send. `faulthandler` writes its stack: a thread in C that needs no lock, armed again by each beat. A launcher ends a
rank whose beats stop if no other rank does (launch/supervision.py); without a launcher and without peers nobody can.
"""

import faulthandler
import os
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch.distributed as dist
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from ssa_pretrain.config import Config, ParallelConfig
from ssa_pretrain.errors import ExitCode
from ssa_pretrain.parallel.hang_report import STACKS, report
from ssa_pretrain.parallel.heartbeat import (
    ENDED,
    Beat,
    main_stack,
    waits_for_others,
)
from ssa_pretrain.parallel.stragglers import WINDOW, OwnTime, Stragglers
from ssa_pretrain.process import RankExit, exit_now, launch_folder, write_beat, write_exit

if TYPE_CHECKING:
    from ssa_pretrain.parallel.state import Placement

BEAT_SECONDS = 1.0
BEATS_PER_SECOND = 500  # that the store gets from all ranks together
GRACE = 3  # beats between the moment when a rank is stuck and the verdict
PAUSED_BEATS = 5  # without a beat of its own: this process did not run
WARM_STEPS = 5  # training steps of a process that may compile
USUAL_FACTOR, LEAST_SECONDS = 20.0, 120.0  # the limit of a step, from the median step
SHARE_OF_TIMEOUT = 0.9  # of a collective's timeout: the watchdog comes first
ANSWER_SECONDS = 10.0  # for the store to answer after the ranks are stuck, and for the ranks to read the verdict
OWN_WORK = 6.0  # times as long may a rank work by itself, outside of measured steps, as it may wait
KEY, VERDICT = "ssa_pretrain/beat", "ssa_pretrain/hang"
READ = "ssa_pretrain/hang_read"  # how many ranks have read the verdict
REPORT = "hang.txt"


def watchdog(config: Config, placement: "Placement") -> "Watchdog":
    """Returns the watchdog of a run on this rank."""
    return Watchdog(placement, config.parallel, Path(config.output_dir))


class Watchdog:
    """Watches the phases of this rank's main thread and the heartbeats of all ranks, as a context manager.

    Args:
        placement: this rank.
        parallel: its timeouts.
        folder: the run's folder, which all ranks share.
        print_line: how rank 0 prints a line into the normal log.
    """

    def __init__(
        self,
        placement: "Placement",
        parallel: ParallelConfig,
        folder: Path,
        print_line: Callable[[str], None] | None = None,
    ) -> None:
        self.rank, self.world_size = placement.rank, placement.world_size
        self.print_line = print_line or (lambda text: print(text, file=sys.stderr, flush=True))
        self.on_phase: Callable[[str, int], object] = lambda phase, step: None  # called when a phase begins
        self.on_hang: Callable[[str], object] = lambda report: None  # before a hang ends this process, in a thread
        self._parallel, self._folder = parallel, folder
        self._interval = max(BEAT_SECONDS, self.world_size / BEATS_PER_SECOND)
        self._phase = ("building", 0, 0, time.monotonic())  # name, step, number, begin
        self._progress = self._phase[3]
        self._collectives: dict[str, int] = {}
        self._steps: deque[float] = deque(maxlen=64)  # seconds of the last training steps
        self._trained, self._saved = 0, 0
        self._own, self._stragglers = OwnTime(), Stragglers()
        self._count, self._beat_at, self._resumed = 0, self._progress, self._progress
        self._known: set[int] = set()  # ranks that have published a beat
        self._latest: Beat | None = None
        self._rank_0: Beat | None = None  # who hosts the store, unless torchrun's agent does
        self._launcher_has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._ended = threading.Event()
        self._reporting = threading.Lock()
        self._main = threading.main_thread().ident or 0

    def __enter__(self) -> Self:
        self._stacks = self._folder / STACKS / f"rank_{self.rank}.txt"
        self._stacks.parent.mkdir(parents=True, exist_ok=True)
        self._stack_file = self._stacks.open("w")
        self._threads = [threading.Thread(target=self._live, name="heartbeat", daemon=True)]
        if self.world_size > 1:
            self._threads.append(threading.Thread(target=self._watch, name="watchdog", daemon=True))
        self._latest = self._beat()  # a rank that hangs at once has said where
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        with self._reporting:  # a verdict that is being written ends this process
            pass
        faulthandler.cancel_dump_traceback_later()
        self._threads[0].join()
        self._write_local(replace(self._beat(), limit=None, phase=ENDED))
        self._stack_file.close()
        with suppress(OSError):
            self._stacks.unlink()
            self._stacks.parent.rmdir()  # the last rank

    def enter(self, phase: str, step: int) -> None:
        """Begins a phase of the main thread, and ends the one before. Every rank calls it in the same order.

        Args:
            phase: "training", "evaluating", "saving" and the like.
            step: optimizer steps done before it.
        """
        now = time.monotonic()
        name, _, number, begin = self._phase
        if name == "training":
            self._steps.append(now - begin)
            self._trained += 1
        self._phase = (phase, step, number + 1, now)
        self.on_phase(phase, step)

    def saved(self) -> None:
        """Notes that a checkpoint has been published: a launcher that restarts the run has not restarted it in vain."""
        self._saved += 1

    def add_own_seconds(self, seconds: float) -> None:
        """Adds this rank's own time of a step (stragglers.py)."""
        self._own.add(seconds)

    def limit(self, phase: str, *, waits: bool = True) -> float | None:
        """Returns the seconds that a phase may take without progress; None: as many as it wants.

        Args:
            phase: its name.
            waits: whether the main thread waits for other ranks; work of its own, such as loading, may take longer.
        """
        longest = SHARE_OF_TIMEOUT * 60.0 * self._parallel.timeout_minutes if self.world_size > 1 else None
        if longest is not None and not waits:
            longest *= OWN_WORK
        if phase != "training" or self._trained < WARM_STEPS:
            return longest
        asked = 60.0 * self._parallel.hang_minutes
        usual = asked or max(LEAST_SECONDS, USUAL_FACTOR * statistics.median(self._steps))
        return usual if longest is None else min(usual, longest)

    def _live(self) -> None:
        """Thread: beats, and ends this process if it is stuck and no verdict comes from the store."""
        while not self._ended.wait(self._interval):
            beat = self._beat()
            self._latest = beat
            self._write_local(beat)
            if not beat.is_stuck:
                if beat.limit is not None:
                    faulthandler.dump_traceback_later(0.8 * beat.limit, file=self._stack_file)
                continue
            faulthandler.cancel_dump_traceback_later()
            waited = (GRACE + 1) * self._interval + ANSWER_SECONDS if self.world_size > 1 else 0.0
            if beat.limit is not None and beat.seconds > beat.limit + waited:
                self._end_alone(beat)

    def _watch(self) -> None:
        """Thread: publishes beats, looks for a verdict and for stragglers, and judges."""
        store = None
        while True:
            try:
                store = store or _connect()
                if self._latest is not None:
                    self._exchange(store, self._latest)
            except RuntimeError:  # DistError too: the network; or the store's host has gone, and `_live` ends this rank
                store = None
            if self._ended.wait(self._interval):
                return

    def _exchange(self, store: Store, beat: Beat) -> None:
        """Publishes a beat and reads those of the others as far as needed."""
        store.set(f"{KEY}/{self.rank}", beat.encode())
        if store.check([VERDICT]):
            self._follow(store)
        if self._rank_0 is None and store.check([f"{KEY}/0"]):
            self._rank_0 = Beat.decode(store.get(f"{KEY}/0"))
        if self.rank == 0 and self._trained >= WINDOW:
            beats = self._read(store)
            if len(beats) == self.world_size and (line := self._stragglers.check(beats)):
                self.print_line(line)
        if beat.is_stuck and (judged := self._judge(store)):
            verdict, readers = judged
            if store.compare_set(VERDICT, "", verdict).decode() == verdict:
                self._end(verdict, lambda: _wait_for_readers(store, readers), follows=False)
            else:
                self._follow(store)

    def _beat(self) -> Beat:
        """Returns this rank's state now."""
        now = time.monotonic()
        phase, step, number, begin = self._phase
        collectives = _collectives()
        if phase != "training" and collectives != self._collectives:
            self._progress = now
        self._collectives = collectives
        if now - self._beat_at > PAUSED_BEATS * self._interval:
            self._resumed = now  # this process was stopped and continued, such as a job that a scheduler suspends
        self._beat_at = now
        self._count += 1
        frame = sys._current_frames().get(self._main)
        waits = waits_for_others(frame)
        return Beat(
            rank=self.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            count=self._count,
            phase=phase,
            step=step,
            order=number,
            seconds=now - max(begin, self._progress, self._resumed),
            limit=self.limit(phase, waits=waits),
            collectives=collectives,
            waits=waits,
            stack=main_stack(frame),
            own_seconds=self._own.median,
            trained=self._trained,
            saved=self._saved,
            time=now,
        )

    def _read(self, store: Store) -> list[Beat]:
        """Returns the last beat of every rank that has published one."""
        self._known |= {r for r in range(self.world_size) if r not in self._known and store.check([f"{KEY}/{r}"])}
        return [Beat.decode(text) for text in store.multi_get([f"{KEY}/{rank}" for rank in sorted(self._known)])]

    def _judge(self, store: Store) -> tuple[str, int] | None:
        """Returns the report on who is missing and how many others can read it, if it is this rank that writes it; takes GRACE beats."""
        before = {beat.rank: beat.count for beat in self._read(store)}
        for _ in range(GRACE):
            if self._ended.wait(self._interval) or self._latest is None or not self._latest.is_stuck:
                return None  # it moves again
            store.set(f"{KEY}/{self.rank}", self._latest.encode())
        beats = self._read(store)
        silent = {beat.rank for beat in beats if before.get(beat.rank) == beat.count}
        silent |= set(range(self.world_size)) - {beat.rank for beat in beats}
        if self.rank != min(set(range(self.world_size)) - silent, default=0):
            return None
        return report(beats, silent, self._folder), self.world_size - len(silent) - 1

    def _follow(self, store: Store) -> None:
        """Ends this process with the verdict of another rank."""
        verdict = store.get(VERDICT).decode()
        store.add(READ, 1)
        self._end(verdict, lambda: None, follows=True)

    def _end(self, text: str, at_last: Callable[[], None], *, follows: bool) -> None:
        """Ends this process with the verdict, after a last act. The rank that has judged prints it."""
        with self._reporting:
            if self._ended.is_set():
                return
            if not follows:
                _append(self._folder / REPORT, text)
                self.print_line(text)
            self._leave(text, at_last, follows=follows)

    def _end_alone(self, beat: Beat) -> None:
        """Ends this process without the others' view: it has no peers, or the store does not answer."""
        with self._reporting:
            if self._ended.is_set():
                return
            if self.world_size > 1 and not self._launcher_has_store:
                text = report([self._rank_0 or Beat(0, phase="start"), beat], {0}, self._folder)
            else:
                text = report([beat], set(), self._folder)
                if self.world_size > 1:
                    first = f"hang: {beat.name} has waited {beat.seconds:.0f} s in {beat.place}, and the first node does not answer"
                    text = "\n".join([first, *text.splitlines()[1:]])
            self.print_line(text)
            _append(self._folder / REPORT, text)
            self._leave(text, lambda: None, follows=False)

    def _leave(self, text: str, at_last: Callable[[], None], *, follows: bool) -> None:
        """Ends this process with exit code 8 after `on_hang`, whatever that does, and after telling its launcher why."""
        try:
            self.on_hang(text)
        finally:
            if folder := launch_folder():
                sentence = text.partition("\n")[0]
                write_exit(
                    folder, RankExit(self.rank, ExitCode.HUNG, sentence, of_one_rank=not follows, follows=follows)
                )
            at_last()
            exit_now(ExitCode.HUNG)

    def _write_local(self, beat: Beat) -> None:
        """Writes the beat for this node's launcher."""
        if folder := launch_folder():
            with suppress(OSError):
                write_beat(folder, self.rank, beat.encode())


def _append(path: Path, text: str) -> None:
    """Appends a report with the time to the run's file."""
    with suppress(OSError), path.open("a") as file:
        file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}\n")


def _connect() -> Store:
    """Returns a connection of its own to the ranks' store: operations of the main thread would hold up a shared one."""
    store = dist.distributed_c10d._get_default_store().clone()
    store.set_timeout(timedelta(seconds=ANSWER_SECONDS))
    return store


def _wait_for_readers(store: Store, count: int) -> None:
    """Waits until that many ranks have read the verdict: this rank may host the store."""
    end = time.monotonic() + ANSWER_SECONDS
    with suppress(RuntimeError):
        while store.add(READ, 0) < count and time.monotonic() < end:
            time.sleep(0.1)


def _collectives() -> dict[str, int]:
    """Returns how many collectives this process has called in each group of several ranks."""
    found = {}
    if not dist.is_initialized():
        return found
    world = dist.distributed_c10d._world
    for group, name in list(world.pg_names.items()):
        with suppress(RuntimeError):
            if group.size() > 1:
                found[name] = group._get_sequence_number_for_group()
    return found
