"""The process that runs W&B's client for a training run: `tracking.py` starts it and writes records to its standard input.

W&B's history is rows of increasing number (`_step`), each closed for good when the next begins. A row is a training step: its record and the
evaluations of that step, sent in one piece when the next step's record arrives or the run ends. So W&B has a row whole or not at all, and the
rows that it has are all up to one number. That number is asked for at the start and never guessed: online the server knows it, offline the
files that W&B's service wrote hold it. What lies past it is sent again, whatever was killed before.

An evaluation made after its step's row was closed (a stop came between the two) goes into the next training step's row, or into a row of its
own where the run ends without one; from then on W&B's row numbers are one ahead of the steps. Evaluations have their own x axis
(`heldout_tokens`), so they are drawn where they belong.

Every exception ends this process, and nothing in it waits without an alarm: tracking.py reports that it ended, and training goes on. If
training dies, the input ends, and what has been sent is uploaded before this process ends as well.
"""

import fcntl
import json
import os
import re
import secrets
import select
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TextIO

import psutil
import wandb
from google.protobuf.message import DecodeError
from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

from ssa_pretrain.monitor.tracking import STATE_FILE, flatten, redact, series

START_SECONDS = 25
LOG_SECONDS = 60
FINISH_SECONDS = 8.0  # for the upload; the alarm comes a little later
END_SECONDS = 10
SETTLE_SECONDS = 20.0  # W&B's service writes its files every 15 seconds
BLOCK = 2**15  # bytes, of LevelDB's log format

Tell = Callable[[Mapping[str, Any]], None]


@dataclass(slots=True)
class State:
    """What the run's folder keeps for the next start.

    Attributes:
        id: W&B's id of the run.
        settings: digest of what decides the run's values.
        row: a row up to which W&B's files held all when this was written.
        inserted: rows that belong to no training step.
        evaluations: by series, the row that each evaluated step went into.
    """

    id: str = field(default_factory=lambda: secrets.token_hex(4))
    settings: str = ""
    row: int = -1
    inserted: list[int] = field(default_factory=list)
    evaluations: dict[str, dict[str, int]] = field(default_factory=dict)

    def step_of(self, row: int) -> int:
        """Returns the last training step of the rows up to one."""
        return row - sum(inserted <= row for inserted in self.inserted)

    def forget_after(self, row: int) -> None:
        """Drops what is noted of rows that W&B does not have."""
        self.inserted = [inserted for inserted in self.inserted if inserted <= row]
        for name, rows in self.evaluations.items():
            self.evaluations[name] = {step: number for step, number in rows.items() if number <= row}


def read_state(folder: Path) -> State:
    """Returns the state file's content; a new state, and so a new W&B run, where it is missing or damaged."""
    try:
        found = json.loads((folder / STATE_FILE).read_text())
        known = {name: found[name] for name in State.__slots__ if name in found}
        if "row" not in known:  # an earlier version kept only the last step of each series
            known["row"] = max(found["received"].values(), default=-1)
        state = State(**known)
        state.forget_after(state.row)  # fails where types are wrong
        fine = type(state.row) is int and re.fullmatch(r"[\w-]{1,64}", state.id)
        return State(**known) if fine else State()
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return State()


class History:
    """The rows of W&B's history that this process writes.

    Args:
        state: the run's, changed as rows are written.
        row: the last row that W&B has.
        write: takes a row's values and number.
        save: keeps the state; called before a row with evaluations is written.
    """

    def __init__(
        self, state: State, row: int, write: Callable[[dict[str, Any], int], None], save: Callable[[], None]
    ) -> None:
        state.forget_after(row)
        self._state, self._write, self._save = state, write, save
        self.next = row + 1
        self._open: list[Mapping[str, Any]] = []  # records of the step whose row is not closed
        self._late: list[Mapping[str, Any]] = []  # evaluations of steps whose rows are

    def add(self, record: Mapping[str, Any]) -> None:
        """Takes a record; what W&B has of it is left out."""
        name, step = series(record), record["step"]
        if self._open and step > self._open[0]["step"]:
            self._close()
        if step > self._state.step_of(self.next - 1) and (not self._open or step == self._open[0]["step"]):
            self._open.append(record)
        elif name != "train" and str(step) not in self._state.evaluations.get(name, {}):
            self._late.append(record)

    def finish(self, *, orderly: bool) -> None:
        """Writes what is left; evaluations that a killed run's next start makes again are left to it."""
        if self._open:
            self._close()
        while self._late and orderly:
            self._state.inserted.append(self.next)
            self._put(self.next, self._take_late())

    def _close(self) -> None:
        """Writes the open row, with late evaluations where it has none."""
        records, self._open = self._open, []
        if self._late and all(record["kind"] == "train" for record in records):
            records = self._take_late() + records
        self._put(records[-1]["step"] + len(self._state.inserted), records)

    def _take_late(self) -> list[Mapping[str, Any]]:
        """Returns the late evaluations of one step."""
        chosen = [late for late in self._late if late["step"] == self._late[0]["step"]]
        self._late = [late for late in self._late if late not in chosen]
        return chosen

    def _put(self, row: int, records: list[Mapping[str, Any]]) -> None:
        """Writes records as one row. The state knows first where evaluations are: a row that a kill undid is told by its number."""
        values: dict[str, Any] = {}
        for record in records:
            values |= flatten(record)
        evaluations = [record for record in records if record["kind"] != "train"]
        for record in evaluations:
            self._state.evaluations.setdefault(series(record), {})[str(record["step"])] = row
        if evaluations:
            self._save()
        self._write(redact(values), row)
        self.next = row + 1


class Session:
    """One start's W&B run.

    Args:
        opening: what tracking.py says first: mode, folder, names, the configuration.
        tell: sends a message to tracking.py.
    """

    def __init__(self, opening: Mapping[str, Any], tell: Tell) -> None:
        self._opening, self._tell = opening, tell
        self._folder = Path(opening["folder"])
        self._failing = False
        self.state = read_state(self._folder)
        offline = opening["mode"] == "offline"
        row = max(self.state.row, stored_row(self._folder, self.state.id))
        if offline and self._changed(row):
            self.state, row = State(), -1
        self.run = self._start()
        if not offline:
            row = self.run.starting_step - 1
            if self._changed(row):
                self.run.finish()
                self.state, row = State(), -1
                self.run = self._start()
            if row < stored_row(self._folder, self.state.id, "offline-run"):
                self._tell({"say": "W&B: what offline starts wrote is sent now, and need not be uploaded"})
        self.state.settings = opening["settings"]
        self.history = History(self.state, row, self._log, self.save)
        self._settling, self._settled_at = row, time.monotonic()
        self.state.row = row
        self.save()

    def _changed(self, row: int) -> bool:
        """Whether W&B has steps of other settings that are now to be trained again; a line says so."""
        before, step = self.state.settings, self._opening["step"]
        if before in ("", self._opening["settings"]) or self.state.step_of(row) <= step:
            return False
        self._tell({"say": f"W&B: a new run, because the one before has steps after {step}, which other settings made"})
        return True

    def _start(self) -> "wandb.Run":
        """Returns W&B's run after a short wait, with nothing sent that was not asked for."""
        opening = self._opening
        self.save()
        run = wandb.init(
            project=opening["project"],
            entity=opening["entity"] or None,
            group=opening["group"] or None,
            tags=opening["tags"] or None,
            name=opening["name"],
            id=self.state.id,
            resume="allow",
            job_type="pretrain",
            dir=str(self._folder),
            config=opening["config"],
            mode=opening["mode"],
            settings=wandb.Settings(
                init_timeout=opening["patience"],
                login_timeout=opening["patience"],
                x_service_wait=opening["patience"],
                finish_timeout=FINISH_SECONDS,
                finish_timeout_raises=True,
                x_stats_pid=os.getppid(),
                console="off",
                disable_code=True,
                disable_git=True,
                silent=True,
            ),
        )
        run.define_metric("tokens")
        run.define_metric("heldout_tokens")
        run.define_metric("train/*", step_metric="tokens")
        run.define_metric("heldout/*", step_metric="heldout_tokens")
        return run

    def _log(self, values: dict[str, Any], row: int) -> None:
        signal.alarm(LOG_SECONDS)
        self.run.log(values, step=row, commit=True)
        signal.alarm(0)
        if time.monotonic() - self._settled_at > SETTLE_SECONDS:
            self.state.row, self._settling, self._settled_at = self._settling, row, time.monotonic()
            self.save()

    def finish(self, *, orderly: bool) -> None:
        """Writes what is left and ends W&B's run."""
        self.history.finish(orderly=orderly)
        signal.alarm(END_SECONDS)
        self.run.finish(0 if orderly else 1)
        self.state.row = self.history.next - 1
        self.save()

    def save(self) -> None:
        """Writes the state atomically; where that fails, training and W&B go on."""
        file = self._folder / STATE_FILE
        fresh = self._folder / "wandb" / "state.tmp"  # under the lock, so a killed process's is written over
        received = {name: max(map(int, rows)) for name, rows in self.state.evaluations.items() if rows}
        received["train"] = self.state.step_of(self.state.row)
        content = asdict(self.state) | {"received": {name: step for name, step in received.items() if step >= 0}}
        try:
            fresh.write_text(json.dumps(content) + "\n")
            os.replace(fresh, file)
        except OSError as error:
            if not self._failing:
                self._tell({"say": f"{file} cannot be written ({error.strerror}); training and W&B go on"})
            self._failing = True
        else:
            self._failing = False


def stored_row(folder: Path, run: str, kind: str = "*run") -> int:
    """Returns the last row in the files that W&B's service wrote for a run; -1 where there is none.

    Args:
        folder: the training run's.
        run: W&B's id.
        kind: pattern of what W&B's folders begin with: "run" online, "offline-run" offline.
    """
    files = sorted(folder.glob(f"wandb/{kind}-*-{run}/run-{run}.wandb"), key=lambda path: path.stat().st_mtime_ns)
    return next((max(rows) for file in reversed(files) if (rows := list(stored_rows(file)))), -1)


def stored_rows(file: Path) -> Iterator[int]:
    """Yields the numbers of the rows in one of W&B's files, up to where a kill has cut it off.

    The format is LevelDB's log after a header of 7 bytes: blocks of 32 KiB with chunks of crc (4 bytes), length (2), type (1: whole, 2: first,
    3: middle, 4: last) and data; a chunk never crosses blocks, and fewer than 7 bytes at a block's end are unused.
    """
    data = file.read_bytes()
    position, whole = 7, b""
    while position + 7 <= len(data):
        room = BLOCK - position % BLOCK
        if room < 7:
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        end = position + 7 + length
        if kind == 0 or end > len(data):
            return
        whole += data[position + 7 : end]
        position = end
        if kind not in (1, 4):
            continue
        record = Record()
        try:
            record.ParseFromString(whole)
        except DecodeError:
            return
        whole = b""
        if record.HasField("history"):
            yield from (int(item.value_json) for item in record.history.item if _name(item) == "_step")


def _name(item: Any) -> str:
    """A history item's key; newer clients write it as a path."""
    return item.key or ".".join(item.nested_key)


def main() -> None:
    """Hands the records on standard input to W&B until `finish` or the input's end."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what W&B prints goes to the log
    tell = partial(_tell, channel)
    sys.excepthook = partial(_report, tell)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for training, whose end ends the input
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, partial(_give_up, tell))
    messages = _messages(int(sys.argv[1]))
    opening = next(messages)
    folder = Path(opening["folder"])
    with (folder / "wandb" / ".lock").open("w") as lock:
        _wait_for(lock)
        signal.alarm(START_SECONDS)
        session = Session(opening, tell)
        signal.alarm(0)
        step, place = session.state.step_of(session.history.next - 1), str(Path(session.run.dir).parent)
        ready = {"id": session.state.id, "step": step, "offline": opening["mode"] == "offline", "folder": place}
        tell({"ready": ready})
        orderly = False
        for message in messages:
            if orderly := "finish" in message:
                break
            session.history.add(message)
        session.finish(orderly=orderly)
        tell({"finished": True})


def _wait_for(lock: TextIO) -> None:
    """Takes the lock, waiting for a process of the start before, which ends within END_SECONDS of its training."""
    deadline = time.monotonic() + END_SECONDS + 2
    while time.monotonic() < deadline:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)
            continue
        except OSError:  # storage without locks
            pass
        return


def _messages(training: int) -> Iterator[dict[str, Any]]:
    """Yields the messages of standard input until it ends, or training has: processes that it forked may hold the pipe open."""
    rest = b""
    while True:
        if select.select([0], [], [], 1.0)[0]:
            chunk = os.read(0, 2**16)
            if not chunk:
                return
            *lines, rest = (rest + chunk).split(b"\n")
            yield from map(json.loads, lines)
        elif os.getppid() != training:
            return


def _tell(channel: TextIO, message: Mapping[str, Any]) -> None:
    """Sends a message to training, if it is there to read."""
    with suppress(BrokenPipeError):
        channel.write(json.dumps(message) + "\n")
        channel.flush()


def _report(tell: Tell, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Logs an exception that ends the process and sends its first line."""
    traceback.print_exception(kind, error, trace)
    lines = redact(str(error)).splitlines()
    tell({"failed": lines[0] if lines else kind.__name__})


def _give_up(tell: Tell, _: int, __: FrameType | None) -> None:
    """Ends this process and W&B's service at once."""
    tell({"failed": "its service does not answer"})
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(1)
