"""The process that runs W&B's client for a training run. tracking_client.py starts it and writes records to its standard input.

At the start it asks for the last row that W&B has: online the server knows it, offline the files written by W&B's service contain it. From
there on tracking_rows.py decides which rows are sent.

Every exception ends this process, and every wait in it has an alarm or a deadline. Training reports the end and continues. If training dies,
standard input closes, and this process uploads the received records before it exits.
"""

import json
import os
import select
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TextIO

import psutil
import wandb
from google.protobuf.message import DecodeError
from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

from ssa_pretrain.monitor.redaction import redact
from ssa_pretrain.monitor.tracking_rows import STATE_FILE, History, State, read_state
from ssa_pretrain.settings.files import LockedError, lock, unlock, write_atomically

START_SECONDS = 25
LOG_SECONDS = 60
FINISH_SECONDS = 8.0  # for the upload; the alarm comes a little later
END_SECONDS = 10
SETTLE_SECONDS = 20.0  # W&B's service writes its files every 15 seconds
BLOCK = 2**15  # bytes per block of LevelDB's log format

Send = Callable[[Mapping[str, Any]], None]


class Session:
    """One start's W&B run.

    Args:
        opening: training's first message: mode, folder, names, the configuration.
        send: sends a message to training.
    """

    def __init__(self, opening: Mapping[str, Any], send: Send) -> None:
        self._opening, self._send = opening, send
        self._folder = Path(opening["folder"])
        self._save_fails = False
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
                self._send({"print": "W&B: the records of offline starts are sent now; no upload is needed"})
        self.state.settings = opening["settings"]
        self.history = History(self.state, row, self._log, self.save)
        self._unsettled_row, self._settled_at = row, time.monotonic()
        self.state.row = row
        self.save()

    def _changed(self, row: int) -> bool:
        """Returns whether other settings trained steps that W&B has and that will be trained again; prints a line if so."""
        before, step = self.state.settings, self._opening["step"]
        if before in ("", self._opening["settings"]) or self.state.step_of(row) <= step:
            return False
        self._send({"print": f"W&B: a new run, because the previous one has steps after {step} from other settings"})
        return True

    def _start(self) -> "wandb.Run":
        """Starts or resumes W&B's run. Code, console output and git state are not sent."""
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
        run.define_metric("task_tokens")
        run.define_metric("train/*", step_metric="tokens")
        run.define_metric("heldout/*", step_metric="heldout_tokens")
        run.define_metric("task/*", step_metric="task_tokens")
        return run

    def _log(self, values: dict[str, Any], row: int) -> None:
        signal.alarm(LOG_SECONDS)
        self.run.log(values, step=row, commit=True)
        signal.alarm(0)
        if time.monotonic() - self._settled_at > SETTLE_SECONDS:
            self.state.row, self._unsettled_row, self._settled_at = self._unsettled_row, row, time.monotonic()
            self.save()

    def finish(self, *, orderly: bool) -> None:
        """Writes the remaining rows and ends W&B's run."""
        self.history.finish(orderly=orderly)
        signal.alarm(END_SECONDS)
        self.run.finish(0 if orderly else 1)
        self.state.row = self.history.next - 1
        self.save()

    def save(self) -> None:
        """Writes the state atomically. If that fails, training and W&B continue, and a line reports it once."""
        file = self._folder / STATE_FILE
        content = asdict(self.state) | {"received": self.state.received()}
        try:
            write_atomically(file, json.dumps(content) + "\n")
        except OSError as error:
            if not self._save_fails:
                self._send({"print": f"{file} cannot be written ({error.strerror}); training and W&B continue"})
            self._save_fails = True
        else:
            self._save_fails = False


def stored_row(folder: Path, run: str, kind: str = "*run") -> int:
    """Returns the last row in the files that W&B's service wrote for a run; -1 without files.

    Args:
        folder: the training run's.
        run: W&B's id.
        kind: pattern of the beginning of W&B's folder names: "run" online, "offline-run" offline.
    """
    files = sorted(folder.glob(f"wandb/{kind}-*-{run}/run-{run}.wandb"), key=lambda path: path.stat().st_mtime_ns)
    return next((max(rows) for file in reversed(files) if (rows := list(stored_rows(file)))), -1)


def stored_rows(file: Path) -> Iterator[int]:
    """Yields the row numbers in one of W&B's files, up to the point where a kill truncated it.

    W&B's package has no reader of its own. The format is LevelDB's log after a header of 7 bytes: blocks of 32 KiB with chunks of crc (4
    bytes), length (2), type (1: full, 2: first, 3: middle, 4: last) and data. A chunk never crosses blocks, and fewer than 7 bytes at a
    block's end are unused.
    """
    data = file.read_bytes()
    position, message = 7, b""
    while position + 7 <= len(data):
        left_in_block = BLOCK - position % BLOCK
        if left_in_block < 7:
            position += left_in_block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        end = position + 7 + length
        if kind == 0 or end > len(data):
            return
        message += data[position + 7 : end]
        position = end
        if kind not in (1, 4):
            continue
        record = Record()
        try:
            record.ParseFromString(message)
        except DecodeError:
            return
        message = b""
        if record.HasField("history"):
            yield from (int(item.value_json) for item in record.history.item if _name(item) == "_step")


def _name(item: Any) -> str:
    """Returns a history item's key, which newer clients write as a path."""
    return item.key or ".".join(item.nested_key)


def main() -> None:
    """Passes the records on standard input to W&B until `finish` or the end of the input."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # W&B's output goes to the log
    send = partial(_send, channel)
    sys.excepthook = partial(_report_exception, send)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for training; when it ends, the input closes
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, partial(_exit_at_once, send))
    messages = _messages(int(sys.argv[1]))
    opening = next(messages)
    folder = Path(opening["folder"])
    patience = END_SECONDS + 2  # the process of the previous start exits within END_SECONDS after its training
    held = None
    with suppress(LockedError, OSError):
        held = lock(folder / "wandb" / ".lock", patience=patience, patience_if_alive=patience)
    signal.alarm(START_SECONDS)
    session = Session(opening, send)
    signal.alarm(0)
    step, wandb_folder = session.state.step_of(session.history.next - 1), str(Path(session.run.dir).parent)
    ready = {"id": session.state.id, "step": step, "offline": opening["mode"] == "offline", "folder": wandb_folder}
    send({"ready": ready})
    orderly = False
    for message in messages:
        if orderly := "finish" in message:
            break
        session.history.add(message)
    session.finish(orderly=orderly)
    send({"finished": True})
    if held:
        unlock(held)


def _messages(training: int) -> Iterator[dict[str, Any]]:
    """Yields the messages on standard input until it closes or training ends: processes forked by training may keep the pipe open."""
    partial_line = b""
    while True:
        if select.select([0], [], [], 1.0)[0]:
            chunk = os.read(0, 2**16)
            if not chunk:
                return
            *lines, partial_line = (partial_line + chunk).split(b"\n")
            yield from map(json.loads, lines)
        elif os.getppid() != training:
            return


def _send(channel: TextIO, message: Mapping[str, Any]) -> None:
    """Sends a message to training, if it still runs."""
    with suppress(BrokenPipeError):
        channel.write(json.dumps(message) + "\n")
        channel.flush()


def _report_exception(send: Send, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Logs the exception that ends this process and sends its first line."""
    traceback.print_exception(kind, error, trace)
    lines = redact(str(error)).splitlines()
    send({"failed": lines[0] if lines else kind.__name__})


def _exit_at_once(send: Send, _: int, __: FrameType | None) -> None:
    """Kills W&B's service and exits."""
    send({"failed": "its service does not answer"})
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(1)
