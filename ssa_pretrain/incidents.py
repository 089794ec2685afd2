"""Incident records: why a run went back to a checkpoint, and which data it leaves out since then.

Each record is a file `incidents/step_00000123.json` in the run's folder, named by the step of the spike and written before the run goes back. A run
that starts again reads them all, so it leaves out the same steps. To train on the steps after all, move the record away and go back to a checkpoint
before them. Standard library only.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ssa_pretrain.settings.files import write_atomically

FOLDER = "incidents"
ROLLED_BACK, WENT_ON = "rolled back", "went on"


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """A loss spike and what was done about it.

    Attributes:
        step: step of the spike, from 1.
        stream: its main stream.
        cross_entropy: its value, nats.
        median, deviation: of the values before it, nats.
        threshold: `training.spike_threshold`.
        decision: ROLLED_BACK or WENT_ON.
        reason: for going on; empty otherwise.
        checkpoint_step: step of the checkpoint that the run went back to; 0: none.
        skipped_steps: first and last step that are left out since then; empty if the run went on.
        skipped_rows: first and last row of these steps, in the order of the run, from 0; empty likewise.
        time: when, in seconds since the epoch.
    """

    step: int
    stream: str
    cross_entropy: float
    median: float
    deviation: float
    threshold: float
    decision: str
    reason: str = ""
    checkpoint_step: int = 0
    skipped_steps: list[int]
    skipped_rows: list[int]
    time: float


def write_incident(folder: Path, incident: Incident) -> Path:
    """Writes a record atomically and returns its file. An earlier record of the same step is replaced."""
    path = folder / FOLDER / f"step_{incident.step:08d}.json"
    write_atomically(path, json.dumps(asdict(incident), indent=1))
    return path


def read_incidents(folder: Path) -> list[Incident]:
    """Returns the records of a run's folder, by step.

    Raises:
        ValueError: a file is not a record.
    """
    found = []
    for path in sorted((folder / FOLDER).glob("step_*.json")):
        try:
            found.append(Incident(**json.loads(path.read_text())))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path} is not an incident record ({error}); restore it, or move it away") from None
    return found
