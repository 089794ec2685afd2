"""A tracker next to W&B: every metric of a run as a line `step,name,value` of metrics.csv in the run's folder.

    python tests/unit/project/exercises/tracker.py experiment=quickstart data.path=DIR output_dir=DIR

trains with it. A tracker takes the records of metrics.jsonl, after a restart from the first one on, so that the file is written again.
"""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssa_pretrain.monitor.alerts import Alert
from ssa_pretrain.monitor.tracking_rows import flatten
from ssa_pretrain.train import main


class CsvTracker:
    """Writes the records of a run to a CSV file."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / "metrics.csv").open("w", newline="")
        self._writer = csv.writer(self._file)

    def log(self, record: Mapping[str, Any]) -> None:
        """Writes a record, a line per value."""
        self._writer.writerows((record["step"], name, value) for name, value in flatten(record).items())
        self._file.flush()

    def alert(self, alert: Alert) -> None:
        """Does nothing: a table of metrics has no place for events."""

    def finish(self) -> None:
        """Closes the file."""
        self._file.close()


if __name__ == "__main__":
    main(more_trackers=[CsvTracker])
