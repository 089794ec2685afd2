"""Runs beside each other: `python -m ssa_pretrain.bench.curves RUN RUN … out=FILE.png`.

Reads the runs' metrics.jsonl, prints the last held-out figures of each in both modes as a markdown table, and plots the training cross entropy (mean
over a window of steps) of all of them in one picture, with captured mass below it. The plot needs matplotlib (the `bench` extra).
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssa_pretrain.metrics import FILE_NAME, read_records
from ssa_pretrain.settings.output import pipe_may_close

WINDOW = 10  # steps that a point of a curve averages


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Return the last evaluation of each run in both modes.

    Args:
        runs: records of metrics.jsonl by name.
    """
    lines = ["| run | tokens | mode | cross entropy | perplexity | captured mass |", "|---|---|---|---|---|---|"]
    for name, records in runs.items():
        last = {r["mode"]: r for r in records if r["kind"] == "evaluation"}
        for mode, r in last.items():
            mass = "–" if r["captured_mass"] is None else f"{r['captured_mass']:.3f}"
            lines.append(
                f"| {name} | {r['tokens']:,} | {mode} | {r['cross_entropy']:.4f} | {r['perplexity']:.2f} | {mass} |"
            )
    return "\n".join(lines) + "\n"


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the mean of each value and up to WINDOW - 1 before it."""
    return [sum(part) / len(part) for end in range(1, len(values) + 1) if (part := values[max(0, end - WINDOW) : end])]


def plot(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw training cross entropy, from the first tenth of each run on, and captured mass over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (loss, mass) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=(2, 1))
    for name, records in runs.items():
        steps = [r for r in records if r["kind"] == "train" and r["cross_entropy"] is not None]
        tokens = [r["tokens"] / 1e6 for r in steps]
        loss.plot(tokens, smoothed([r["cross_entropy"] for r in steps]), label=name, linewidth=1)
        seen = [
            r for r in records if r["kind"] == "evaluation" and r["mode"] == "full" and r["captured_mass"] is not None
        ]
        mass.plot([r["tokens"] / 1e6 for r in seen], [r["captured_mass"] for r in seen], "o-", label=name, markersize=3)
    # The first tenth falls so far that the curves would lie on each other after it.
    shown = [y for line in loss.get_lines() for y in line.get_ydata()[len(line.get_ydata()) // 10 :]]
    if shown:
        loss.set_ylim(min(shown) - 0.1, max(shown) + 0.1)
    loss.set_ylabel(f"cross entropy, nats (mean of {WINDOW} steps)")
    mass.set_ylabel("captured mass, held out, full mode")
    mass.set_xlabel("million tokens")
    loss.legend()
    for axes in (loss, mass):
        axes.grid(True, alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Reads the command line, prints the table, draws the plot."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    folders = [Path(argument) for argument in sys.argv[1:] if not argument.startswith("out=")]
    out = next((argument[4:] for argument in sys.argv[1:] if argument.startswith("out=")), "")
    missing = [str(folder) for folder in folders if not (folder / FILE_NAME).is_file()]
    if not folders or missing:
        wrong = f"{', '.join(missing)}: no {FILE_NAME} there" if missing else "no run was named"
        print(f"ssa_pretrain.bench.curves: {wrong}; give folders of runs, and out=FILE.png for a plot", file=sys.stderr)
        raise SystemExit(3)
    runs = {folder.name: list(read_records(folder / FILE_NAME)) for folder in folders}
    print(table(runs), end="")
    if out:
        plot(runs, Path(out))


if __name__ == "__main__":
    with pipe_may_close():
        main()
