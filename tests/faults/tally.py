"""What the tries of one row of the matrix gave, and its JSON file.

Each row has a file of its own, written when the row is done. So a run that is interrupted keeps what it has, and the same command continues with the
rows that are missing. No figure of the page is typed by hand.
"""

import json
import platform
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from support.processes import ROOT

RESULTS = ROOT / "docs" / "results" / "faults"
MAX_FAILURES = 20  # that a file describes


@dataclass(slots=True)
class Tally:
    """The tries of a row.

    Attributes:
        tries: faults that were injected.
        good: those that ended as expected.
        lost_steps: of each try that resumed: steps beyond the newest complete checkpoint that had to be trained again.
        detect: seconds from the fault to its report or to the exit, of each try where that was measured.
        recover: seconds from the fault to the first new step or to a loaded checkpoint, likewise.
        codes: how often each exit code came.
        failures: what was wrong, in words.
        figures: others that the page shows, by name.
    """

    tries: int = 0
    good: int = 0
    lost_steps: list[int] = field(default_factory=list)
    detect: list[float] = field(default_factory=list)
    recover: list[float] = field(default_factory=list)
    codes: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def add(self, wrong: str | None, *, code: int | None = None, lost: int | None = None) -> None:
        """Counts a try.

        Args:
            wrong: what was not as expected; None or empty if all was.
            code: exit code of the faulty process.
            lost: steps to train again beyond the newest complete checkpoint.
        """
        self.tries += 1
        self.good += not wrong
        if wrong:
            self.failures.append(wrong)
        if code is not None:
            self.codes[code] += 1
        if lost is not None:
            self.lost_steps.append(lost)

    def write(self, name: str, begin: float, folder: Path = RESULTS) -> None:
        """Writes the row's file.

        Args:
            name: of the row.
            begin: when it began, by the monotonic clock.
            folder: of all rows.
        """
        content = asdict(self) | {
            "codes": {str(code): count for code, count in sorted(self.codes.items())},
            "failures": self.failures[:MAX_FAILURES],
            "seconds": round(time.monotonic() - begin, 1),
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        for key in ("detect", "recover"):
            content[key] = [round(seconds, 3) for seconds in content[key]]
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{name}.tmp"
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.rename(folder / f"{name}.json")


def read(name: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """Returns the content of a row's file; None if the row has not been run."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None
