"""The rows of a run's W&B history: which record goes into which row, so that W&B has every step and every evaluation once.

W&B's history is a sequence of rows with increasing numbers (`_step`). A row is closed for good when the next one begins. A row is a training
step: its record and the evaluations of that step, sent together when the next step's record arrives or the run ends. So W&B has complete rows
only, and all of them up to some number. What lies past that number is sent again, whatever was killed before.

An evaluation may come after its step's row was closed (the run was stopped between the two). It goes into the next training step's row, or
into a row of its own if the run ends without another step. After such an inserted row, W&B's row numbers are one ahead of the steps.
Evaluations have their own x axes (`heldout_tokens`, `task_tokens`), so charts show them at the right place.
"""

import copy
import json
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssa_pretrain.monitor.names import AXES, TASK, TRAIN, layer_name, source_name, stem_of
from ssa_pretrain.monitor.redaction import redact

STATE_FILE = "wandb.json"


@dataclass(slots=True)
class State:
    """The state that the run's folder keeps for the next start, in wandb.json.

    Attributes:
        id: W&B's id of the run.
        settings: digest of the settings that determine the run's metrics.
        row: W&B's files had all rows up to this one when the state was written.
        inserted: rows that belong to no training step.
        evaluations: the row of each evaluated step, by series.
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
        """Removes the entries of rows that W&B does not have."""
        self.inserted = [inserted for inserted in self.inserted if inserted <= row]
        for name, rows in self.evaluations.items():
            self.evaluations[name] = {step: number for step, number in rows.items() if number <= row}

    def received(self) -> dict[str, int]:
        """Returns the last step of each series that W&B has."""
        steps = {name: max(map(int, rows)) for name, rows in self.evaluations.items() if rows}
        steps["train"] = self.step_of(self.row)
        return {name: step for name, step in steps.items() if step >= 0}


def read_state(folder: Path, name: str = STATE_FILE) -> State:
    """Returns the content of a run's state file. If it is missing or damaged, returns a new state, which starts a new run of the tracker."""
    try:
        found = json.loads((folder / name).read_text())
        known = {name: found[name] for name in State.__slots__ if name in found}
        if "row" not in known:  # an earlier version kept only the last step of each series
            known["row"] = max(found["received"].values(), default=-1)
        state = State(**copy.deepcopy(known))
        state.forget_after(state.row)  # on a copy: raises if types are wrong
        valid = type(state.row) is int and re.fullmatch(r"[\w-]{1,64}", state.id)
        return State(**known) if valid else State()
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return State()


class History:
    """Turns records into rows, leaving out those that W&B has already.

    Args:
        state: the run's, updated as rows are written.
        row: the last row that W&B has.
        write: receives a row's values and number.
        save: saves the state; called before a row with evaluations is written.
    """

    def __init__(
        self, state: State, row: int, write: Callable[[dict[str, Any], int], None], save: Callable[[], None]
    ) -> None:
        state.forget_after(row)
        self._state, self._write, self._save = state, write, save
        self.next = row + 1
        self._open: list[Mapping[str, Any]] = []  # records of the step whose row is open
        self._late: list[Mapping[str, Any]] = []  # evaluations of steps whose rows are closed

    def add(self, record: Mapping[str, Any]) -> None:
        """Takes the next record of the run."""
        name, step = series(record), record["step"]
        if self._open and step > self._open[0]["step"]:
            self._close_row()
        if step > self._state.step_of(self.next - 1) and (not self._open or step == self._open[0]["step"]):
            self._open.append(record)
        elif name != "train" and str(step) not in self._state.evaluations.get(name, {}):
            self._late.append(record)

    def finish(self, *, orderly: bool) -> None:
        """Writes the open row and late evaluations.

        Args:
            orderly: False after a kill: the next start repeats late evaluations, so they are not written.
        """
        if self._open:
            self._close_row()
        while self._late and orderly:
            self._state.inserted.append(self.next)
            self._write_row(self.next, self._take_late())

    def _close_row(self) -> None:
        """Writes the open row, with late evaluations if it has none of its own."""
        records, self._open = self._open, []
        if self._late and all(record["kind"] == "train" for record in records):
            records = self._take_late() + records
        self._write_row(records[-1]["step"] + len(self._state.inserted), records)

    def _take_late(self) -> list[Mapping[str, Any]]:
        """Removes and returns the late evaluations of one step."""
        chosen = [late for late in self._late if late["step"] == self._late[0]["step"]]
        self._late = [late for late in self._late if late not in chosen]
        return chosen

    def _write_row(self, row: int, records: list[Mapping[str, Any]]) -> None:
        """Writes records as one row.

        The row of each evaluation is saved first. If a kill prevents the row, its number tells the next start so.
        """
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


def series(record: Mapping[str, Any]) -> str:
    """Returns the name of a record's series: train, split and mode of an evaluation, or task, its name and mode."""
    if record["kind"] == TASK:
        return f"{TASK}/{record['task']}/{record['mode']}"
    return TRAIN if record["kind"] == TRAIN else f"{record['split']}/{record['mode']}"


def flatten(record: Mapping[str, Any]) -> dict[str, float | int | str]:
    """Returns a record under flat names (names.py). A list by layer becomes one name per layer, a mapping one per source; missing values are left out.

    Args:
        record: a record of metrics.jsonl.
    """
    prefix = series(record)
    flat: dict[str, float | int | str] = {"tokens": record["tokens"], "step": record["step"]}
    if record["kind"] != TRAIN:  # its own x axis: a late evaluation goes into a later step's row
        split = record.get("split", TASK)
        axis = AXES.get(split, f"{split}_tokens")
        flat |= {axis: record["tokens"], axis.replace("_tokens", "_step"): record["step"]}
    for key, value in record.items():
        if key in ("kind", "split", "task", "mode", "tokens", "step") or value is None:
            continue
        name = f"{prefix}/{stem_of(key)}"
        if isinstance(value, list | tuple):
            flat |= {layer_name(name, i): item for i, item in enumerate(value) if item is not None}
        elif isinstance(value, Mapping):
            flat |= {source_name(name, source): item for source, item in value.items() if item is not None}
        else:
            flat[f"{prefix}/{key}"] = value
    return flat
