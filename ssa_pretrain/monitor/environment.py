"""What a run's processes ran on and with: `environment.jsonl` in its folder, a line each time it was started.

{"step": 0, "started": "2026-11-27T02:10:12+00:00", "device": "NVIDIA H100 80GB HBM3", "processes": 2, "versions": {"python": "3.12.3", "torch": …}}

A run that was moved to another machine in the middle, or restarted with another library, says so. The newest line is what a report shows.
"""

import json
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FILE_NAME = "environment.jsonl"
PACKAGES = ("ssa-pretrain", "torch", "megatron-core", "triton", "transformer-engine", "deepspeed", "tokenizers")


def versions() -> dict[str, str]:
    """Return the versions of Python and of what is installed of PACKAGES, in their order."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def add_start(folder: Path, *, step: int, device: str, processes: int) -> None:
    """Add a line about this start.

    Args:
        folder: the run's output folder.
        step: the step that the run goes on after.
        device: name of each process's device.
        processes: their number.
    """
    line = {
        "step": step,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "processes": processes,
        "versions": versions(),
    }
    with (folder / FILE_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def last_start(folder: Path) -> dict[str, Any] | None:
    """Return the newest whole line, None where there is none: a kill may cut one off."""
    path = folder / FILE_NAME
    for line in reversed(path.read_text(encoding="utf-8").splitlines() if path.is_file() else []):
        try:
            return json.loads(line)
        except ValueError:
            continue
    return None
