"""Starts the trackers of a run: W&B, TensorBoard and trackio, whichever the configuration asks for, each in a process of its own.

Each gets the same records under the same names (names.py), and each is independent of the others: one that cannot start, or fails, prints a line.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssa_pretrain.config import LoggingConfig
from ssa_pretrain.monitor.client_tracker import ClientTracker
from ssa_pretrain.monitor.redaction import redact
from ssa_pretrain.monitor.tracking import START_SECONDS, digest, start_tracking
from ssa_pretrain.monitor.tracking_client import ClientProcess

PrintLine = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What a tracker is told about a run.

    Attributes:
        name: the run's name.
        folder: the run's output folder.
        config: the resolved configuration and provenance as plain values; secrets are removed before they leave this process.
        step: the step that the run continues after.
        decisive: the settings that determine the run's metrics.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    step: int
    decisive: Mapping[str, Any]


def start_trackers(settings: LoggingConfig, opening: Opening, print_line: PrintLine) -> list[ClientTracker]:
    """Returns the trackers of a run that could start.

    Args:
        settings: the configuration's `logging`.
        opening: the run.
        print_line: prints one line for the user.
    """
    started: list[ClientTracker] = []
    wandb = start_tracking(
        settings.wandb,
        name=opening.name,
        folder=opening.folder,
        config=opening.config,
        print_line=print_line,
        step=opening.step,
        decisive=opening.decisive,
    )
    if wandb is not None:
        started.append(wandb)
    if settings.tensorboard.enabled:
        started += _start("TensorBoard", "tensorboard_process", opening, {}, print_line)
    if settings.trackio.enabled:
        names = {"project": settings.trackio.project, "group": settings.trackio.group}
        started += _start("trackio", "trackio_process", opening, names, print_line)
    return started


def _start(
    label: str, module: str, opening: Opening, names: Mapping[str, str], print_line: PrintLine
) -> list[ClientTracker]:
    """Returns a tracker in a list, empty if it cannot start."""
    message = {
        "name": opening.name,
        "folder": str(opening.folder),
        "config": redact(dict(opening.config)),
        "step": opening.step,
        "settings": digest(opening.decisive),
        **names,
    }
    try:
        process = ClientProcess(opening.folder / label.lower() / "process.log", print_line, module)
    except OSError as error:
        print_line(f"{label} cannot start ({error.strerror or error}); continuing without it")
        return []
    process.send(message)
    if process.wait_ready(START_SECONDS):
        return [ClientTracker(process, print_line, label)]
    reason = process.failure() or f"not ready after {START_SECONDS:g} s"
    process.end(0.0)
    print_line(f"{label} cannot start ({reason}); continuing without it")
    return []
