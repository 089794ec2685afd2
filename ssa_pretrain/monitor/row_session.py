"""What the sessions of W&B and trackio share: a state file in the run's folder, and rows that are sent once (tracking_rows.py).

The state is saved with a row that has certainly reached the library's files: the last one of SETTLE_SECONDS ago. A session that knows better, because it
can ask the files, begins with the row that it found there.
"""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ssa_pretrain.monitor.tracking_loop import Send
from ssa_pretrain.monitor.tracking_rows import History, read_state
from ssa_pretrain.settings.files import write_atomically

SETTLE_SECONDS = 20.0  # W&B's service writes its files every 15 seconds


class RowSession(ABC):
    """One start's run of a tracker that takes rows. A subclass implements `write`.

    Args:
        opening: training's first message: folder, names, the configuration, the step to continue after, the digest of its settings.
        send: sends a message to training.
        label: the tracker's name in messages.
        state_file: name of the state's file in the run's folder.
    """

    def __init__(self, opening: Mapping[str, Any], send: Send, label: str, state_file: str) -> None:
        self.opening, self.send, self.label = opening, send, label
        self.folder = Path(opening["folder"])
        self._file = self.folder / state_file
        self._save_fails = False
        self.state = read_state(self.folder, state_file)

    def begin(self, row: int) -> None:
        """Begins to take records.

        Args:
            row: the last row that the tracker has; -1: none.
        """
        self.state.settings = self.opening["settings"]
        self.history = History(self.state, row, self.write, self.save)
        self._unsettled_row, self._settled_at = row, time.monotonic()
        self.state.row = row
        self.save()

    def changed(self, row: int) -> bool:
        """Returns whether other settings trained steps that the tracker has and that will be trained again; prints a line if so."""
        before, step = self.state.settings, self.opening["step"]
        if before in ("", self.opening["settings"]) or self.state.step_of(row) <= step:
            return False
        text = f"{self.label}: a new run, because the previous one has steps after {step} from other settings"
        self.send({"print": text})
        return True

    def add(self, record: Mapping[str, Any]) -> None:
        """Takes the next record of the run."""
        self.history.add(record)

    @abstractmethod
    def write(self, values: dict[str, Any], row: int) -> None:
        """Passes a row on."""

    def settle(self, row: int) -> None:
        """Notes that a row was passed on, and saves the state once in a while."""
        if time.monotonic() - self._settled_at > SETTLE_SECONDS:
            self.state.row, self._unsettled_row, self._settled_at = self._unsettled_row, row, time.monotonic()
            self.save()

    def finished(self) -> None:
        """Saves the state after the tracker has everything."""
        self.state.row = self.history.next - 1
        self.save()

    def save(self) -> None:
        """Writes the state atomically. If that fails, training and the tracker continue, and a line reports it once."""
        content = asdict(self.state) | {"received": self.state.received()}
        try:
            write_atomically(self._file, json.dumps(content) + "\n")
        except OSError as error:
            if not self._save_fails:
                text = f"{self._file} cannot be written ({error.strerror}); training and {self.label} continue"
                self.send({"print": text})
            self._save_fails = True
        else:
            self._save_fails = False
