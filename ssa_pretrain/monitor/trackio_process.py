"""The process that runs trackio for a training run (tracking_loop.py).

trackio keeps the runs of a project in an SQLite file in its own folder (TRACKIO_DIR, by default in the Hugging Face cache), and `trackio show` draws them.
With TRACKIO_SPACE_ID or TRACKIO_SERVER_URL in the environment it sends them to a Space or a server of its own instead. A row is a training step with
its evaluations, as in W&B (tracking_rows.py); the x axis is the row's number. The run's folder keeps its name in `trackio/state.json`, so that a restart
continues the same run: in the local file trackio knows the last row, elsewhere the state in the folder does.
"""

import os
from collections.abc import Mapping
from typing import Any

import trackio
from trackio.sqlite_storage import SQLiteStorage

from ssa_pretrain.monitor.alerts import Alert, Level
from ssa_pretrain.monitor.mass_map import MassMaps
from ssa_pretrain.monitor.redaction import redact
from ssa_pretrain.monitor.row_session import RowSession
from ssa_pretrain.monitor.tracking_loop import Send, serve
from ssa_pretrain.monitor.tracking_rows import State

STATE_FILE = "trackio/state.json"
LEVELS = {
    Level.info: trackio.AlertLevel.INFO,
    Level.warning: trackio.AlertLevel.WARN,
    Level.error: trackio.AlertLevel.ERROR,
}
ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


class Session(RowSession):
    """One start's run of trackio.

    Args:
        opening: training's first message: project, group, name, folder, the configuration.
        send: sends a message to training.
    """

    def __init__(self, opening: Mapping[str, Any], send: Send) -> None:
        super().__init__(opening, send, "trackio", STATE_FILE)
        self._maps = MassMaps()
        row = max(self.state.row, self._stored_row())
        if self.changed(row):
            self.state, row = State(), -1
        self.run = trackio.init(
            project=opening["project"],
            name=self._name,
            group=opening["group"] or None,
            config=dict(opening["config"]),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.begin(row)

    def ready(self) -> dict[str, Any]:
        """Returns what training is told once records are taken."""
        return {"step": self.state.step_of(self.history.next - 1)}

    def add(self, record: Mapping[str, Any]) -> None:
        """Takes the next record of the run."""
        self._maps.add(record)
        super().add(record)

    def alert(self, alert: Alert) -> None:
        """Stores an alert, and sends it to the webhook of TRACKIO_WEBHOOK_URL if there is one."""
        self.run.alert(title=alert.title, text=redact(alert.text), level=LEVELS[alert.level])

    def write(self, values: dict[str, Any], row: int) -> None:
        """Passes a row on, with the pictures of its evaluations."""
        named = {key: value for key, value in values.items() if key != "step"}  # trackio's own name for the row
        with self._maps.files(values) as files:  # trackio copies them
            self.run.log(named | {name: trackio.Image(path) for name, path in files.items()}, step=row)
        self.settle(row)

    def finish(self, *, orderly: bool) -> None:
        """Writes the remaining rows and ends the run."""
        self.history.finish(orderly=orderly)
        self.run.finish()
        self.finished()

    @property
    def _name(self) -> str:
        """The run's name, which no other run has."""
        return f"{self.opening['name']}-{self.state.id}"

    def _stored_row(self) -> int:
        """Returns the last row in the local file; -1 if it has none, or if the rows are elsewhere."""
        if any(os.environ.get(name) for name in ELSEWHERE):
            return -1
        found = SQLiteStorage.get_max_step_for_run(self.opening["project"], self._name)
        return -1 if found is None else found


def main() -> None:
    """Passes the records on standard input to trackio until `finish` or the end of the input."""
    serve(Session, lock_name="trackio/.lock")
