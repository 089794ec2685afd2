"""What the shards of a dataset lack because it could not be read (on_error=skip)."""

from collections import Counter
from typing import Any

from data_prep.progress import Log
from data_prep.readers import format_skipped
from data_prep.shards.shard import FinishedShard

MAX_LOGGED_FILES = 10


def skipped_of(record: dict[str, Any]) -> dict[str, int]:
    """Returns how many lines, rows and files a shard lacks; none for records of versions that could not skip."""
    return record.get("skipped", {}).get("counts", {})


def total_skipped(shards: list[FinishedShard]) -> dict[str, int]:
    """Returns how many lines, rows and files a dataset lacks."""
    return dict(sum((Counter(skipped_of(shard.record)) for shard in shards), Counter()))


def log_skipped(shards: list[FinishedShard], log: Log) -> None:
    """Logs what was left out, and the first problem of some files."""
    if not (counts := total_skipped(shards)):
        return
    problems: dict[str, list] = {}
    for shard in shards:
        for path, (problem, count) in shard.record.get("skipped", {}).get("problems", {}).items():
            problems.setdefault(path, [problem, 0])[1] += count
    log(f"left out by on_error=skip: {format_skipped(counts)}")
    for problem, count in list(problems.values())[:MAX_LOGGED_FILES]:
        log(f"  {problem}" + (f" (and {count - 1} more in this file)" if count > 1 else ""))
    if len(problems) > MAX_LOGGED_FILES:
        log(f"  and {len(problems) - MAX_LOGGED_FILES} more files; work/shards/*.json have the first problem of each")
