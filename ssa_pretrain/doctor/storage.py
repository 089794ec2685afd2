"""The doctor's checks of a run's folder: whether it can be written, what is free, how fast it commits, what a hang or a kill has left. Stdlib only."""

import os
import secrets
import shutil
import time
from pathlib import Path

from ssa_pretrain.doctor.findings import Finding, fail, ok, warn
from ssa_pretrain.doctor.machine import GIB, file_system
from ssa_pretrain.run_folder import require_free, unwritable
from ssa_pretrain.settings.problems import ConfigError

PROBE_BYTES = 64 * 2**20
LEAST_FREE, USUAL_FREE = 1 * GIB, 50 * GIB  # a checkpoint of the 1B model takes 14 GiB, and at least two are kept
SLOW_BYTES = 100e6  # per second


def run_folder(folder: Path) -> list[Finding]:
    """Checks `output_dir`."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if reason := unwritable(folder):
        return [fail("output_dir", f"{folder} {reason}", "choose another output_dir")]
    return [_free(existing), _speed(existing), *_owner(folder)]


def _free(place: Path) -> Finding:
    free, kind = shutil.disk_usage(place).free, file_system(place)
    inodes = os.statvfs(place).f_favail
    text = f"{free / GIB:.1f} GiB free on {place} ({kind or 'unknown file system'})"
    if free < LEAST_FREE or (os.statvfs(place).f_files > 0 and inodes < 1000):
        return fail("disk", f"{text}, {inodes} inodes", "free space, or choose another output_dir")
    if free < USUAL_FREE:
        return warn(
            "disk", text, "enough for small models; a checkpoint of the 1B model takes 14 GiB, and two are kept"
        )
    return ok("disk", text)


def _speed(place: Path) -> Finding:
    """Writes and commits a file of PROBE_BYTES, or less if the disk is nearly full."""
    size = min(PROBE_BYTES, shutil.disk_usage(place).free // 4)
    path = place / f".doctor_{secrets.token_hex(4)}"
    block = os.urandom(2**20)
    begin = time.monotonic()
    try:
        with path.open("wb") as file:
            for _ in range(max(1, size // len(block))):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.monotonic() - begin
        size = path.stat().st_size
    except OSError as error:
        return fail("write speed", f"{place}: {error.strerror}", "free space or repair the storage")
    finally:
        path.unlink(missing_ok=True)
    text = f"{size / seconds / 1e6:.0f} MB/s, durable, one writer"
    if size / seconds < SLOW_BYTES:
        return warn(
            "write speed", text, "a checkpoint of the 1B model takes minutes: use faster storage, or save less often"
        )
    return ok("write speed", text)


def _owner(folder: Path) -> list[Finding]:
    """Another run that holds the folder, and the report of the last hang."""
    found = []
    try:
        require_free(folder, patience=0.0)
    except ConfigError as error:
        text = " ".join(str(error).split())
        found.append(warn("run", text, "wait for it, or choose another output_dir for a new run"))
    report = folder / "hang.txt"
    if report.exists():
        last = [line for line in report.read_text(errors="replace").splitlines() if " hang: " in line][-1:]
        text = last[0] if last else str(report)
        found.append(warn("last hang", text, f"read {report}; if the same rank hangs again, replace its node"))
    return found
