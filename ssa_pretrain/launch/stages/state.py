"""The state of the stages, `OUT/stages.json`: for each stage its status, its command, and digests of what it read and wrote.

    {"schema": 1, "recipe": "ssa_1b", "stages": {"8k": {"status": "done", "since": "2026-11-29T22:01:03+00:00", "code": 0, "steps": 31790,
     "words": ["experiment=ssa_1b_8k", …], "inputs": {"data": "3f…"}, "outputs": {"weights": "9c…"}}, …}}

Nothing is believed because it is in this file: a stage counts as done if its digests still are those of the files. On several nodes each node writes
the same content; a file appears atomically. Stdlib only.
"""

import json
import os
import socket
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ssa_pretrain.errors import CheckpointError
from ssa_pretrain.launch.stages.options import STAGES
from ssa_pretrain.settings.files import sync

FILE_NAME = "stages.json"
SCHEMA = 1
WAITING, RUNNING, DONE, STOPPED, FAILED = "waiting", "running", "done", "stopped", "failed"


@dataclass(slots=True)
class Record:
    """What is known of one stage.

    Attributes:
        status: waiting, running, done, stopped or failed. It stays at running if this command is killed.
        since: when it got this status, ISO 8601.
        code: the exit code; None before one.
        steps: training steps of the whole stage; 0 for other stages.
        words: arguments of its entry point.
        inputs, outputs: digests of what it read and wrote, by name.
    """

    status: str = WAITING
    since: str = ""
    code: int | None = None
    steps: int = 0
    words: list[str] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)


class State:
    """The records of all stages, kept in a file.

    Attributes:
        folder: of all stages.
        recipe: that the folder belongs to; empty for a new folder.
    """

    def __init__(self, folder: Path) -> None:
        """Reads the file; a folder without one is new. Raises CheckpointError if the file is damaged."""
        self.folder, self.recipe = folder, ""
        self._records = {name: Record() for name in STAGES}
        path = folder / FILE_NAME
        if not path.exists():
            return
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise ValueError(f"schema {content['schema']} instead of {SCHEMA}")
            self.recipe = str(content["recipe"])
            self._records |= {name: Record(**content["stages"][name]) for name in STAGES}
        except (OSError, ValueError, KeyError, TypeError) as error:
            advice = "move it away: finished stages are recognized by their files"
            raise CheckpointError(f"{path} cannot be read ({error}); {advice}") from None

    def __getitem__(self, stage: str) -> Record:
        """Returns the record of a stage."""
        return self._records[stage]

    def change(self, stage: str, status: str, **values: Any) -> None:
        """Sets the status and other values of a stage, and writes the file."""
        record = self._records[stage]
        record.status, record.since = status, datetime.now(UTC).isoformat(timespec="seconds")
        for name, value in values.items():
            setattr(record, name, value)
        stages = {name: asdict(one) for name, one in self._records.items()}
        content = {"schema": SCHEMA, "recipe": self.recipe, "stages": stages}
        # Named after the host: on shared storage processes of several nodes, which may have the same id, write at the same time.
        unfinished = self.folder / f".{FILE_NAME}.{socket.gethostname()}.tmp"
        unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        sync(unfinished)
        os.replace(unfinished, self.folder / FILE_NAME)


def table(state: State) -> str:
    """Returns the state for people: a line per stage, with the steps of a run that trains."""
    lines = [f"{'stage':<12}{'status':<9}{'since':<27}detail"]
    for name in STAGES:
        record = state[name]
        saved = sorted((state.folder / name / "checkpoints").glob("step_????????"))
        detail = f"checkpoint of step {int(saved[-1].name[5:])}" if saved else ""
        if detail and record.steps:
            detail += f" of {record.steps}"
        if record.status == FAILED:
            detail += f"{', ' * bool(detail)}exit code {record.code}"
        lines.append(f"{name:<12}{record.status:<9}{record.since or '-':<27}{detail}".rstrip())
    return "\n".join(lines) + "\n"
