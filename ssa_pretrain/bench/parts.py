"""The device's time by kind of kernel, of one profiled run of each variant: parts.csv beside the results.

The kinds are those of monitor/profiling.py. The profiler slows the host, so the parts are compared with each other and not with the time of the step. A
variant that is a mean of others has the mean of their parts.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ssa_pretrain.monitor.profiling import breakdown, profiled, read_trace

if TYPE_CHECKING:
    from ssa_pretrain.bench.variants import Variant

PARTS = "parts.csv"


def write_parts(folder: Path, variants: "Sequence[Variant]") -> None:
    """Profiles every variant once and appends a line per variant and part, in ms. Traces are in the folder `profile`."""
    found: dict[str, dict[str, float]] = {}
    for number, variant in enumerate(variants):
        if variant.run is None:
            found[variant.name] = _mean([(weight, found[name]) for name, weight in variant.mean_of.items()])
            continue
        with profiled(folder / "profile", step=number, rank=0, memory=False):
            variant.run()
        trace = folder / "profile" / f"step_{number}.rank_0.trace.json.gz"
        found[variant.name] = {part: us / 1e3 for part, us in breakdown(read_trace(trace)).categories.items()}
    fresh = not (folder / PARTS).exists()
    with (folder / PARTS).open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([("variant", "part", "ms")] * fresh)
        writer.writerows((name, part, f"{ms:.4f}") for name, parts in found.items() for part, ms in parts.items())


def read_parts(folder: Path) -> dict[str, dict[str, float]]:
    """Returns the newest time of each part in ms by variant; empty without the file."""
    path = folder / PARTS
    found: dict[str, dict[str, float]] = {}
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                found.setdefault(line["variant"], {})[line["part"]] = float(line["ms"])
    return found


def _mean(parts: Sequence[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """Returns the weighted mean of times by part."""
    names = dict.fromkeys(name for _, one in parts for name in one)
    return {name: sum(weight * one.get(name, 0.0) for weight, one in parts) for name in names}
