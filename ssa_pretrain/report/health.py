"""What went wrong in a run and what was done about it, from its folder: skipped steps, loss spikes, rollbacks, failed saves, hangs.

Skipped steps, spikes and failed saves are in metrics.jsonl, as far as a restart or a rollback has not dropped their records. Rollbacks are in incidents/, hangs in
hang.txt. The newest checkpoint's health.json has the number of skipped steps since the start of the run.
"""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssa_pretrain.incidents import ROLLED_BACK, Incident, read_incidents

HANG_FILE = "hang.txt"
HANG_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (hang: .*)")
MOST_SHOWN = 12  # events of a kind in a table


@dataclass(slots=True)
class RunHealth:
    """The unusual steps of a run.

    Attributes:
        skipped: step and reason of each skipped step on record.
        spikes: step, main stream, cross entropy and deviations of each spike on record.
        incidents: spikes with a decision, by step.
        failed_saves: step and reason of each failed save on record.
        hangs: time and first line of the watchdog's reports.
        total_skipped: skipped steps up to the newest checkpoint, those that were rolled back included; None without a checkpoint.
    """

    skipped: list[tuple[int, str]] = field(default_factory=list)
    spikes: list[tuple[int, str, float, float]] = field(default_factory=list)
    incidents: list[Incident] = field(default_factory=list)
    failed_saves: list[tuple[int, str]] = field(default_factory=list)
    hangs: list[tuple[str, str]] = field(default_factory=list)
    total_skipped: int | None = None

    @property
    def is_clean(self) -> bool:
        """Whether nothing unusual is known."""
        events = (self.skipped, self.spikes, self.incidents, self.failed_saves, self.hangs)
        return not (any(events) or self.total_skipped)

    def sentence(self) -> str:
        """Returns the counts in a few words, such as "2 skipped steps, 1 loss spike"."""
        rollbacks = sum(incident.decision == ROLLED_BACK for incident in self.incidents)
        spikes = {step for step, *_ in self.spikes} | {incident.step for incident in self.incidents}
        counts = {
            "skipped step": max(len(self.skipped), self.total_skipped or 0),
            "loss spike": len(spikes),
            "rollback": rollbacks,
            "failed save": len(self.failed_saves),
            "hang": len(self.hangs),
        }
        found = [f"{count} {noun}{'s' * (count > 1)}" for noun, count in counts.items() if count]
        return ", ".join(found) or "no skipped step, spike, rollback, failed save or hang"

    def events(self) -> list[tuple[str, str, str]]:
        """Returns step or time, kind and description of every event, those of a kind together, MOST_SHOWN of each at most."""
        decided = {incident.step for incident in self.incidents}
        kinds = [
            [(f"{first:,}" + f" to {last:,}" * (last > first), "skipped", why) for first, last, why in self._ranges()],
            [
                (
                    f"{step:,}",
                    "spike",
                    f"{stream} cross entropy {value:.3f}, {deviations:.0f} deviations above the median",
                )
                for step, stream, value, deviations in self.spikes
                if step not in decided
            ],
            [(f"{incident.step:,}", incident.decision, _decision(incident)) for incident in self.incidents],
            [(f"{step:,}", "failed save", reason) for step, reason in self.failed_saves],
            [(moment, "hang", line.removeprefix("hang: ")) for moment, line in self.hangs],
        ]
        return [event for events in kinds for event in _shortened(events)]

    def _ranges(self) -> list[tuple[int, int, str]]:
        """Returns first step, last step and reason of each row of skipped steps."""
        ranges: list[tuple[int, int, str]] = []
        for step, why in self.skipped:
            if ranges and ranges[-1][1] == step - 1 and ranges[-1][2] == why:
                ranges[-1] = (ranges[-1][0], step, why)
            else:
                ranges.append((step, step, why))
        return ranges


def read_health(folder: Path, records: Sequence[dict[str, Any]]) -> RunHealth:
    """Reads the health of a run.

    Args:
        folder: the run's.
        records: those of its metrics.jsonl.

    Raises:
        ValueError: a file of incidents/ is not a record.
    """
    steps = [record for record in records if record["kind"] == "train"]
    spikes = [
        (r["step"], str(r["spike"]), float(r.get("spike_cross_entropy") or 0), float(r.get("spike_deviations") or 0))
        for r in steps
        if r.get("spike")
    ]
    return RunHealth(
        skipped=[(r["step"], str(r.get("skip_reason") or "")) for r in steps if r.get("skipped")],
        spikes=spikes,
        incidents=read_incidents(folder),
        failed_saves=[(r["step"], str(r.get("reason", ""))) for r in records if r["kind"] == "failed_save"],
        hangs=_hangs(folder / HANG_FILE),
        total_skipped=_total_skipped(folder),
    )


def _hangs(path: Path) -> list[tuple[str, str]]:
    """Returns time and first line of the reports in hang.txt."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return [(found[1], found[2]) for line in text.splitlines() if (found := HANG_LINE.fullmatch(line))]


def _total_skipped(folder: Path) -> int | None:
    """Returns the number of skipped steps in the newest checkpoint's health.json."""
    for path in sorted(folder.glob("checkpoints/step_*/health.json"), reverse=True):
        with suppress(OSError, ValueError, KeyError, TypeError):
            return int(json.loads(path.read_text())["skipped"])
    return None


def _decision(incident: Incident) -> str:
    """Returns what was done about a spike."""
    spike = f"{incident.stream} cross entropy {incident.cross_entropy:.3f}, median {incident.median:.3f}"
    if incident.decision != ROLLED_BACK:
        return f"{spike}: {incident.reason}"
    first, last = incident.skipped_steps
    return f"{spike}: back to step {incident.checkpoint_step:,}, without the data of steps {first:,} to {last:,}"


def _shortened(events: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Returns the newest events, after a line that counts the others."""
    more = len(events) - MOST_SHOWN
    return [("", events[0][1], f"{more} more before"), *events[more:]] if more > 0 else events
