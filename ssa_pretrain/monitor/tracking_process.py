"""The process that runs W&B's client for a training run (tracking_loop.py).

At the start it asks for the last row that W&B has: online the server knows it, offline the files written by W&B's service contain it. From
there on tracking_rows.py decides which rows are sent. Alerts go out at once (`wandb.alert`); offline they are stored with the rows.

Beside the numbers, a row with a held-out evaluation has a picture of the captured mass by layer (mass_map.py) as `heldout/<mode>/captured_mass_map`.
"""

import os
import signal
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import wandb
from google.protobuf.message import DecodeError
from wandb import AlertLevel  # pyright: ignore[reportAttributeAccessIssue]
from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

from ssa_pretrain.monitor.alerts import Alert, Level
from ssa_pretrain.monitor.mass_map import MassMaps
from ssa_pretrain.monitor.names import AXES, HELDOUT, TASK, TRAIN, summaries
from ssa_pretrain.monitor.redaction import redact
from ssa_pretrain.monitor.row_session import RowSession
from ssa_pretrain.monitor.tracking_loop import END_SECONDS, Send, serve
from ssa_pretrain.monitor.tracking_rows import STATE_FILE, State

LOG_SECONDS = 60
FINISH_SECONDS = 8.0  # for the upload; the alarm comes a little later
LEVELS = {Level.info: AlertLevel.INFO, Level.warning: AlertLevel.WARN, Level.error: AlertLevel.ERROR}
BLOCK = 2**15  # bytes per block of LevelDB's log format


class Session(RowSession):
    """One start's W&B run.

    Args:
        opening: training's first message: mode, folder, names, the configuration.
        send: sends a message to training.
    """

    def __init__(self, opening: Mapping[str, Any], send: Send) -> None:
        super().__init__(opening, send, "W&B", STATE_FILE)
        self._maps = MassMaps()
        offline = opening["mode"] == "offline"
        row = max(self.state.row, stored_row(self.folder, self.state.id))
        if offline and self.changed(row):
            self.state, row = State(), -1
        self.run = self._start()
        if not offline:
            row = self.run.starting_step - 1
            if self.changed(row):
                self.run.finish()
                self.state, row = State(), -1
                self.run = self._start()
            if row < stored_row(self.folder, self.state.id, "offline-run"):
                send({"print": "W&B: the records of offline starts are sent now; no upload is needed"})
        self.begin(row)

    def ready(self) -> dict[str, Any]:
        """Returns what training is told once records are taken."""
        return {
            "id": self.state.id,
            "step": self.state.step_of(self.history.next - 1),
            "offline": self.opening["mode"] == "offline",
            "folder": str(Path(self.run.dir).parent),
        }

    def add(self, record: Mapping[str, Any]) -> None:
        """Takes the next record of the run."""
        self._maps.add(record)
        super().add(record)

    def alert(self, alert: Alert) -> None:
        """Sends an alert. W&B passes one of the same title on once a minute at most."""
        self.run.alert(title=alert.title, text=redact(alert.text), level=LEVELS[alert.level])

    def _start(self) -> "wandb.Run":
        """Starts or resumes W&B's run. Code, console output and git state are not sent."""
        opening = self.opening
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
            dir=str(self.folder),
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
        for kind in (TRAIN, HELDOUT, TASK):
            run.define_metric(AXES[kind])
            run.define_metric(f"{kind}/*", step_metric=AXES[kind])
        for name, axis, best in summaries():
            run.define_metric(name, step_metric=axis, summary=f"{best},last")
        return run

    def write(self, values: dict[str, Any], row: int) -> None:
        """Sends a row, with the pictures of its evaluations."""
        signal.alarm(LOG_SECONDS)
        with self._maps.files(values) as files:  # W&B copies them
            pictures = {name: wandb.Image(str(path)) for name, path in files.items()}
            self.run.log(values | pictures, step=row, commit=True)
        signal.alarm(0)
        self.settle(row)

    def finish(self, *, orderly: bool) -> None:
        """Writes the remaining rows and ends W&B's run."""
        self.history.finish(orderly=orderly)
        signal.alarm(END_SECONDS)
        self.run.finish(0 if orderly else 1)
        self.finished()


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
    serve(Session, lock_name="wandb/.lock")
