"""Entry point: `python -m ssa_pretrain.report outputs/quickstart` writes a run's report.html and prints the same values as a table.

The page is one file that needs no network. The report changes nothing else and may run during training. `RunSummary` (summary.py) is what
both views show; page.py lays out the page, table.py the table. Exit codes: 0 done, 3 wrong arguments, 4 the folder contains no run.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ssa_pretrain.errors import ExitCode
from ssa_pretrain.process import command
from ssa_pretrain.settings.output import pipe_may_close, version_line


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, writes the page, prints the table."""
    with command("report"), pipe_may_close():
        from ssa_pretrain.report.page import page, write_page
        from ssa_pretrain.report.summary import read_summary
        from ssa_pretrain.report.table import table

        arguments = read_arguments(argv)
        target = arguments.out or arguments.folder / "report.html"
        summary = read_summary(arguments.folder)
        write_page(target, page(summary))
        print(f"{table(summary)}\n\nreport: {target}")


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the arguments of the command line; exits with 3 if they are wrong."""
    from ssa_pretrain.monitor.environment import PACKAGES

    parser = argparse.ArgumentParser(
        prog="python -m ssa_pretrain.report", description="A run's folder as a page and a table."
    )
    parser.add_argument("folder", type=Path, help="output_dir of a run")
    parser.add_argument("--out", type=Path, help="file to write; default: FOLDER/report.html")
    parser.add_argument("--version", action="version", version=version_line("ssa_pretrain", PACKAGES[1:]))
    try:
        return parser.parse_args(argv)
    except SystemExit as exiting:  # argparse's own code is 2
        sys.exit(ExitCode.CONFIGURATION if exiting.code else ExitCode.DONE)


if __name__ == "__main__":
    main()
