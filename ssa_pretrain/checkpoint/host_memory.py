"""The host's free memory, and the warning before a run that copies its state there. Linux only: elsewhere it is unknown. Stdlib only."""

from contextlib import suppress
from pathlib import Path

GIB = 2**30


def memory_warning(needed: int) -> str | None:
    """Returns a warning if this host has fewer free bytes of memory than copies of the whole state may need, else None."""
    free = free_memory()
    if free is None or free >= needed:
        return None
    return (
        f"warning: this host has {free / GIB:.1f} GiB of free memory, and writing a checkpoint beside training may need {needed / GIB:.1f} GiB "
        "of it: set checkpoint.asynchronous=false if it runs out"
    )


def free_memory(proc: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Returns the bytes of memory that are free on this host and within this container; None if unknown."""
    found = []
    with suppress(OSError, ValueError, StopIteration):
        (line,) = (line for line in proc.read_text().splitlines() if line.startswith("MemAvailable:"))
        found.append(int(line.split()[1]) * 1024)
    with suppress(OSError, ValueError):
        found.append(
            int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        )  # "max": no limit
    return min(found, default=None)
