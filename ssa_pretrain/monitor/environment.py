"""The hardware and library versions of a run: `environment.jsonl` in the run's folder, one line per start.

{"step": 0, "started": "2026-11-27T02:10:12+00:00", "device": "NVIDIA H100 80GB HBM3", "processes": 2, "versions": {"python": "3.12.3", "torch": …}}

The file shows when a run moved to another machine or restarted with another library. A report shows the newest line. `provenance` names the
versions of the code and the data.
"""

import hashlib
import json
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FILE_NAME = "environment.jsonl"
PACKAGES = ("ssa-pretrain", "torch", "megatron-core", "triton", "transformer-engine", "deepspeed", "tokenizers")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the installed PACKAGES, in their order."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def record_start(folder: Path, *, step: int, device: str, processes: int) -> None:
    """Appends a line about this start.

    Args:
        folder: the run's output folder.
        step: the step that the run continues after.
        device: name of each process's device.
        processes: number of processes.
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
    """Returns the newest complete line, None without one. A kill may leave an incomplete line."""
    path = folder / FILE_NAME
    for line in reversed(path.read_text(encoding="utf-8").splitlines() if path.is_file() else []):
        try:
            return json.loads(line)
        except ValueError:
            continue
    return None


def provenance(source: Path, data: Path | None) -> dict[str, Any]:
    """Returns where a run's code and data come from: git commit, whether files differ from it, sha256 of the data's manifest.

    Args:
        source: a folder of the code; outside a git checkout the commit is None.
        data: the dataset's folder.
    """
    commit = _git(source, "rev-parse", "--short=12", "HEAD")  # all 40 digits would look like a W&B key
    manifest = data / "manifest.json" if data is not None else None
    return {
        "git_commit": commit,
        "git_dirty": bool(_git(source, "status", "--porcelain", "--untracked-files=no")) if commit else None,
        "data_manifest_sha256": hashlib.sha256(manifest.read_bytes()).hexdigest()
        if manifest is not None and manifest.is_file()
        else None,
    }


def _git(folder: Path, *arguments: str) -> str | None:
    """Returns the output of a git command, None without git or a checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
