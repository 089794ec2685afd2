"""Entry point: `python -m ssa_pretrain.report outputs/quickstart` writes a run's report.html and prints the same values as a table.

The page is one file that needs no network. The report changes nothing else and may run during training. `RunSummary` (summary.py) is what
both views show; page.py lays out the page. Exit codes: 0 done, 3 wrong arguments, 4 the folder contains no run.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ssa_pretrain.monitor.environment import PACKAGES
from ssa_pretrain.monitor.metrics import perplexity
from ssa_pretrain.report.page import page
from ssa_pretrain.report.summary import ReportError, RunSummary, read_summary
from ssa_pretrain.settings.output import pipe_may_close, version_line
from ssa_pretrain.signals import leaves_on_ctrl_c


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the command line, writes the page, prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m ssa_pretrain.report", description="A run's folder as a page and a table."
    )
    parser.add_argument("folder", type=Path, help="output_dir of a run")
    parser.add_argument("--out", type=Path, help="file to write; default: FOLDER/report.html")
    parser.add_argument("--version", action="version", version=version_line("ssa_pretrain", PACKAGES[1:]))
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as exiting:
        return 3 if exiting.code else 0
    try:
        summary = read_summary(arguments.folder)
    except ReportError as error:
        print(f"report: {error}", file=sys.stderr)
        return 4
    target = arguments.out or arguments.folder / "report.html"
    try:
        write_page(target, page(summary))
    except ReportError as error:
        print(f"report: {error}", file=sys.stderr)
        return 3
    print(table(summary))
    print(f"\nreport: {target}")
    return 0


def table(summary: RunSummary) -> str:
    """Returns the report as text for a terminal, at most 120 columns unless names are long."""
    modes = list(summary.final)
    steps = [record["step"] for record in summary.final.values() or summary.steps[-1:]]
    lines = [f"{summary.name}: held-out text after {max(steps, default=0)} steps"]
    if modes:
        lines.append(
            f"  {'':<24}" + "".join(f"{mode:>12}" for mode in modes) + ("     unigram" if summary.unigram else "")
        )
        entropy = f"{summary.unigram:>12.3f}" if summary.unigram else ""
        unigram_perplexity = f"{perplexity(summary.unigram):>12.1f}" if summary.unigram else ""
        lines.append(f"  {'cross entropy (nats)':<24}" + _cells(summary, "cross_entropy", "12.3f") + entropy)
        lines.append(f"  {'perplexity':<24}" + _cells(summary, "perplexity", "12.1f") + unigram_perplexity)
        if any(summary.final[mode].get("captured_mass") is not None for mode in modes):
            lines.append(f"  {'captured mass':<24}" + _cells(summary, "captured_mass", "12.3f"))
    layers = [row for row in summary.layers("captured_mass_by_layer") if row]
    if layers:
        lines.append("captured mass in training, by layer: first step -> last step")
        lines.append("  " + "  ".join(f"{i}: {row[0][1]:.2f} -> {row[-1][1]:.2f}" for i, row in enumerate(layers)))
    lines += [f"{name:<14}{value}" for name, value in summary.facts()]
    shown = list(dict.fromkeys(sample["prompt"] for sample in summary.samples))[:2]
    for sample in sorted((s for s in summary.samples if s["prompt"] in shown), key=lambda s: shown.index(s["prompt"])):
        prompt, text = (" ".join(sample[part].split()) for part in ("prompt", "text"))
        lines.append(f"sample, {sample['mode']:<7}{prompt[-40:]} [{text[:60]}]")
    return "\n".join(lines)


def write_page(target: Path, text: str) -> None:
    """Writes a page atomically.

    Raises:
        ReportError: it cannot be written.
    """
    temporary = target.with_name(target.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    except OSError as error:
        raise ReportError(
            f"{target} cannot be written ({error.strerror}); give --out=FILE in an existing, writable folder"
        ) from error


def _cells(summary: RunSummary, key: str, form: str) -> str:
    """Returns one metric of every mode in columns."""
    values = [summary.final[mode].get(key) for mode in summary.final]
    return "".join(f"{'-':>12}" if value is None else format(value, form) for value in values)


if __name__ == "__main__":
    with leaves_on_ctrl_c("ssa_pretrain.report"), pipe_may_close():
        sys.exit(main())
