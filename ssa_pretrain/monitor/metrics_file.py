"""The file metrics.jsonl of a run: reading its records, repairing it, dropping the records after a checkpoint. One JSON object per line.

A killed run may leave an incomplete last line, which readers skip. If another line is not a record, `replace_damaged_file` keeps a copy of the file as
`metrics.jsonl.damaged-1` and writes a new one with the other lines: the file is a log, the checkpoint decides. Values that JSON does not have (nan, inf)
are written as null, so any reader can parse every line. docs/metrics.md lists the keys; metrics.py appends the records.
"""

import itertools
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ssa_pretrain.settings.files import atomic_file

FILE_NAME = "metrics.jsonl"


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the records of a metrics file in order, without an incomplete last line left by a killed run.

    Args:
        path: metrics.jsonl.

    Raises:
        ValueError: a line other than the last is not a record.
    """
    for number, _, record in _parse_lines(path):
        if isinstance(record, str):
            raise ValueError(f"{path}:{number} {record}; remove the line or start a new output_dir")
        yield record


def evaluations(path: Path) -> set[tuple[int, str]]:
    """Returns step and name of every evaluation in a metrics file, which may not exist. Skips lines that are not records.

    The name is the mode of an evaluation on held-out rows, and the series of a task.
    """
    records = [record for _, _, record in _parse_lines(path) if isinstance(record, dict)] if path.exists() else []
    return {(record["step"], name) for record in records if (name := evaluation_name(record))}


def task_series(task: str, mode: str) -> str:
    """Returns the name of a task's series of records."""
    return f"task/{task}/{mode}"


def evaluation_name(record: Mapping[str, Any]) -> str | None:
    """Returns the name of an evaluation's record, None for a training step's."""
    if record.get("kind") == "task":
        return task_series(record.get("task", ""), record.get("mode", ""))
    return record.get("mode", "") if record.get("kind") == "evaluation" else None


def replace_damaged_file(path: Path) -> str | None:
    """If a metrics file has lines that are not records, renames it and writes a new one with the records only.

    Args:
        path: metrics.jsonl; may not exist.

    Returns:
        What happened, in a sentence; None if every line is a record, except an incomplete last one.
    """
    if not path.exists():
        return None
    lines = list(_parse_lines(path))
    bad = [(number, record) for number, _, record in lines if isinstance(record, str)]
    if not bad:
        return None
    numbers = itertools.count(1)
    renamed = next(p for p in (path.with_name(f"{path.name}.damaged-{n}") for n in numbers) if not p.exists())
    shutil.copyfile(path, renamed)
    with atomic_file(path) as file:
        file.writelines(line.rstrip(b"\n") + b"\n" for _, line, record in lines if not isinstance(record, str))
    number, problem = bad[0]
    count = f" ({len(bad)} such lines)" if len(bad) > 1 else ""
    return f"{path}:{number} {problem}{count}: the file was kept as {renamed.name}, and the run continues with the other lines"


def _parse_lines(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any] | str]]:
    """Yields each line's number from 1, its bytes, and its record or its problem. Skips an incomplete last line."""
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            if number < len(lines) or line.endswith(b"\n"):
                yield number, line, "is not a JSON object"
            continue
        valid = isinstance(record, dict) and type(record.get("step")) is int
        yield number, line, record if valid else "is not a record of a step"


def drop_records_after(path: Path, step: int) -> int:
    """Drops the records past a step, atomically.

    Args:
        path: metrics.jsonl; may not exist.
        step: the step that the run resumes from, the last one that is kept; 0 (a new run) drops everything.

    Returns:
        The number of dropped records.
    """
    if not path.exists():
        return 0
    dropped = 0
    with atomic_file(path) as file:
        for record in read_records(path):
            if 0 < step >= record["step"]:
                file.write(json_line(record).encode())
            else:
                dropped += 1
    return dropped


def json_line(record: Mapping[str, Any]) -> str:
    """Returns a record as one line of JSON."""
    return json.dumps(_without_nan(record), allow_nan=False, ensure_ascii=False) + "\n"


def _without_nan(value: Any) -> Any:
    """Returns the value with None for numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value
