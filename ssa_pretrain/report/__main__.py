"""Entry point: `python -m ssa_pretrain.report outputs/quickstart` writes a run's report.html and prints the same values as a table.

With several folders it writes a page that compares the runs. A page is one file that needs no network. The report changes nothing else and may run
during training. `RunSummary` (summary.py) is what all views show; page.py and several.py lay out the pages, table.py the table. Exit codes: 0 done,
3 wrong arguments, 4 a folder contains no run.
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
        from ssa_pretrain.report import several
        from ssa_pretrain.report.page import page, write_page
        from ssa_pretrain.report.summary import read_summary
        from ssa_pretrain.report.table import table

        arguments = read_arguments(argv)
        folders: list[Path] = arguments.folders
        summaries = [read_summary(folder) for folder in folders]
        if len(folders) == 1:
            target = arguments.out or folders[0] / "report.html"
            write_page(target, page(summaries[0]))
            print(f"{table(summaries[0])}\n\nreport: {target}")
            return
        runs = list(zip(several.names_of(folders), summaries, strict=True))
        target = arguments.out or folders[0] / "comparison.html"
        write_page(target, several.page(runs))
        print(f"{several.markdown_table(runs)}\nreport: {target}")


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the arguments of the command line; exits with 3 if they are wrong."""
    from ssa_pretrain.monitor.environment import PACKAGES

    parser = argparse.ArgumentParser(
        prog="python -m ssa_pretrain.report",
        description="A run's folder as a page and a table, or several runs side by side.",
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="folder", help="output_dir of a run")
    help_text = "file to write; default: FOLDER/report.html, with several folders comparison.html in the first of them"
    parser.add_argument("--out", type=Path, help=help_text)
    parser.add_argument("--version", action="version", version=version_line("ssa_pretrain", PACKAGES[1:]))
    try:
        return parser.parse_args(argv)
    except SystemExit as exiting:  # argparse's own code is 2
        sys.exit(ExitCode.CONFIGURATION if exiting.code else ExitCode.DONE)


if __name__ == "__main__":
    main()
