"""Finds published checkpoints and reads what they are.

No pointer names the newest checkpoint, so none can be stale: the newest *intact* folder is found by looking. A folder whose files do not match its list
is reported and skipped.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ssa_pretrain.checkpoint.facts import model_changes
from ssa_pretrain.checkpoint.integrity import FACTS, SCHEMA, Verdicts
from ssa_pretrain.errors import CheckpointError

NAME = re.compile(r"step_\d{8,}")  # folders with other names (step_00000100_good, a copy) are the user's


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A published checkpoint: its folder, the steps done, the facts of the run that wrote it."""

    folder: Path
    step: int
    facts: dict[str, Any]


def newest(
    folder: Path,
    *,
    is_rank_0: bool,
    device: torch.device,
    report: Callable[[str], None],
    verdicts: Verdicts | None = None,
) -> Checkpoint | None:
    """Returns the newest intact checkpoint of a run, the same on every rank, or None if there is none.

    Args:
        folder: the run's output folder, or one checkpoint, which is then the only candidate.
        is_rank_0: whether this rank reads the files.
        device: of this process.
        report: receives a line for the user.
        verdicts: receives the verdicts, for `publish`.

    Raises:
        CheckpointError: there are checkpoints, but none is intact.
    """
    named = (folder / FACTS).is_file()
    candidates = [folder] if named else published(folder)
    found = torch.full((), -1, dtype=torch.int64, device=device)  # a step; -1: no checkpoint, -2: none intact
    if is_rank_0:
        verdicts = verdicts or Verdicts()
        found.fill_(-2 if candidates else -1)
        for candidate in candidates:
            damage = verdicts.damage(candidate)
            if damage is None:
                found.fill_(0 if named else step_of(candidate))
                break
            report(f"checkpoint {candidate} is damaged ({damage}); looking for an older one")
    dist.broadcast(found, src=0)
    step = int(found)
    if step == -2:
        raise CheckpointError(
            f"no checkpoint in {folder / 'checkpoints'} is intact; restore one, or start again in another output_dir"
        )
    if step == -1:
        return None
    return read(folder if named else folder_of(folder, step))


def read(folder: Path) -> Checkpoint:
    """Returns a published checkpoint with its facts.

    Raises:
        CheckpointError: the folder is not a published checkpoint, or has another schema.
    """
    try:
        record = json.loads((folder / FACTS).read_text())
        schema, found = record["schema"], Checkpoint(folder, int(record["step"]), dict(record["facts"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} is not a checkpoint ({FACTS}: {error}); name a folder such as RUN/checkpoints/step_00000100"
        ) from None
    if schema != SCHEMA:
        raise CheckpointError(
            f"{folder} has schema {schema}, and this version of ssa_pretrain reads {SCHEMA}; continue with the version that wrote it"
        )
    return found


def require_same_model(found: Checkpoint, wanted: dict[str, Any], *, shapes_only: bool = False) -> None:
    """Checks that a checkpoint holds the run's model; the arguments are those of `facts.model_changes`.

    Raises:
        CheckpointError: the models differ; the message has each key with both values.
    """
    if lines := model_changes(found.facts, wanted, shapes_only=shapes_only):
        raise CheckpointError(
            f"{found.folder} holds another model ({'; '.join(lines)}); set the model as it was trained, or name another checkpoint"
        )


def published(run_folder: Path) -> list[Path]:
    """Returns a run's published checkpoints, newest first; folders with other names are ignored."""
    found = (p for p in (run_folder / "checkpoints").glob("step_*") if NAME.fullmatch(p.name) and p.is_dir())
    return sorted(found, key=step_of, reverse=True)


def folder_of(run_folder: Path, step: int) -> Path:
    """Returns the folder of a run's checkpoint by its step."""
    return run_folder / "checkpoints" / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """Returns the step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step_"))
