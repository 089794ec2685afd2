"""Several runs as a markdown table: `python -m ssa_pretrain.report.compare RUN RUN … [out=FILE.html]`.

Prints the newest held-out metrics of each run in both modes. With `out=`, also writes the page of several.py, as `python -m ssa_pretrain.report RUN RUN …`
does. Exit codes: 3 wrong arguments, 4 a run's files cannot be read.
"""

import sys
from pathlib import Path

from ssa_pretrain.errors import UsageError
from ssa_pretrain.monitor.metrics_file import FILE_NAME
from ssa_pretrain.process import command
from ssa_pretrain.report.page import write_page
from ssa_pretrain.report.several import markdown_table, names_of, page
from ssa_pretrain.report.summary import read_summary
from ssa_pretrain.settings.output import pipe_may_close

USAGE = "give folders of runs, and out=FILE.html for a page with charts"


def main() -> None:
    """Reads the command line, prints the table, writes the page; raises UsageError if it cannot be used."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    folders = [Path(argument) for argument in sys.argv[1:] if not argument.startswith("out=")]
    out = next((Path(argument[4:]) for argument in sys.argv[1:] if argument.startswith("out=")), None)
    missing = [str(folder) for folder in folders if not (folder / FILE_NAME).is_file()]
    if not folders or missing or (out and out.suffix != ".html"):
        problem = (
            f"no {FILE_NAME} in {', '.join(missing)}" if missing else "no run given" if not folders else f"out={out}"
        )
        raise UsageError(f"{problem}; {USAGE}")
    runs = list(zip(names_of(folders), map(read_summary, folders), strict=True))
    print(markdown_table(runs), end="")
    if out:
        write_page(out, page(runs))


if __name__ == "__main__":
    with command("ssa_pretrain.report.compare"), pipe_may_close():
        main()
