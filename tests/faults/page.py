"""docs/fault-matrix.md, rendered from the files of the rows. A row without a file is shown as not run."""

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from faults.catalog import GROUPS
from faults.rows import Row
from faults.tally import RESULTS, read
from support.processes import ROOT

PAGE = ROOT / "docs" / "fault-matrix.md"
HEAD = """# Fault matrix

Each row is a fault that is injected into a run, the outcome that is required, and how often it occurred.
`make test-faults` runs the rows in real processes on a CPU, writes a file for each into `docs/results/faults/`, and
renders this page from them; no number is typed by hand. Rows that already have a file are skipped, so the same command
continues an interrupted one; `make test-faults FAULTS="sigterm --again"` repeats rows. `make test` runs a sample of every
row (`tests/integration/test_fault_matrix.py`).

The model is a tiny SSA Llama on random documents, under the real trainer, its signal handling and its exit codes
([launch.md](launch.md#exit-codes)). Most tries are forked from one process that has already imported everything, so times
exclude the start of Python, which takes seconds; only the soak and the rows of launchers start real commands.
*Bit-identical* means that every value of `metrics.jsonl` except times equals that of a run without a fault. Lost steps
are those after the newest complete checkpoint, which a rerun trains again.
`-9` is the code of a killed process; a launcher turns it into 1. How the rows inject their faults is in `tests/faults/`.
"""
NOT_RUN = """
## Not run here
| fault | why |
|---|---|
| an asynchronous save of the 1B model, kill and resume on a GPU, a skipped step that must not make the device wait | needs a GPU: `tests/benchmarks/save_stall.py`, `tests/gpu/test_deterministic_resume.py`, `tests/gpu/test_skipped_step.py` |
| a node that is lost, a network that is cut between nodes, clocks that differ between nodes, shared storage that shows files late | needs several hosts |
| NCCL timeouts, a GPU that falls off the bus, wrong results of a GPU | needs GPUs; the replica check is in the row of the flipped weight |
| a power failure | judged from the order of writes and flushes; no machine was switched off |
| elastic sizes (4 to 3 ranks without a restart) | not supported: the run is started again on the other layout, see the row of layouts |
"""


def write(results: Path = RESULTS, page: Path = PAGE) -> None:
    """Writes the page."""
    page.write_text(render(results))


def num_bad(results: Path = RESULTS) -> int:
    """Returns how many tries did not end as expected, of the rows that have been run."""
    found = (read(row.name, results) for group in GROUPS.values() for row in group)
    return sum(content["tries"] - content["good"] + bool(content["failures"]) for content in found if content)


def render(results: Path = RESULTS) -> str:
    """Returns the page."""
    contents = [read(row.name, results) for group in GROUPS.values() for row in group]
    done = [content for content in contents if content]
    tries, good = sum(c["tries"] for c in done), sum(c["good"] for c in done)
    dates = sorted(c["when"][:10] for c in done) or [""]
    must_fail = [row for group in GROUPS.values() for row in group if row.must_fail]
    zero = sum(content["codes"].get("0", 0) for row in must_fail if (content := read(row.name, results)))
    lines = [HEAD, f"{good:,} of {tries:,} tries in {len(done)} of {len(contents)} rows ended as expected. "]
    lines[-1] += f"Failures that ended with exit code 0: {zero}. Run between {dates[0]} and {dates[-1]}"
    lines[-1] += f", torch {done[0]['versions']['torch']}, two cores that other work shared.\n" if done else ".\n"
    for name, rows in GROUPS.items():
        lines += [
            f"\n## {name}",
            "| fault | must happen | as expected | lost steps | seconds | exit codes |",
            "|---|---|---|---|---|---|",
        ]
        lines += [_line(row, read(row.name, results)) for row in rows]
    return "\n".join(lines) + "\n" + NOT_RUN


def _line(row: Row, content: dict[str, Any] | None) -> str:
    """Returns a row of the table."""
    if content is None:
        return f"| {row.fault} | {row.expected} | not run | | | |"
    share = f"{content['good']:,} of {content['tries']:,}"
    if content["failures"]:
        share += " (" + content["failures"][0][:120].replace("|", "/").replace("\n", " ") + ")"
    figures = "; ".join(f"{name}: {_number(value)}" for name, value in content["figures"].items())
    lost = content["lost_steps"]
    worst = f"{median(lost):g}, at most {max(lost)}" if lost and max(lost) else "0" if lost else ""
    codes = ", ".join(
        f"{code}: {count:,}" if len(content["codes"]) > 1 else code for code, count in content["codes"].items()
    )
    fault = row.fault + (f". *{figures}*" if figures else "")
    return f"| {fault} | {row.expected} | {share} | {worst} | {', '.join(_seconds(content))} | {codes} |"


def _number(value: Any) -> str:
    return (
        {True: "yes", False: "no"}[value]
        if isinstance(value, bool)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )


def _seconds(content: dict[str, Any]) -> Iterator[str]:
    for key, word in (("detect", "to the end"), ("recover", "to recover")):
        if found := content[key]:
            yield f"{median(found):.2g} {word}, at most {max(found):.2g}"
