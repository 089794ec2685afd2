"""Runs rows of the matrix, writes their files and renders the page: `PYTHONPATH=tests python -m faults [ROW…]`.

Rows that have a file are left out, unless they are named or `--again` is given. So the same command continues an interrupted one.
"""

import argparse
import sys
import time
import traceback
from pathlib import Path

from faults import page, tally
from faults.catalog import GROUPS
from faults.stage import stage

SHARED_MEMORY = Path("/dev/shm")


def main() -> None:
    """Runs the rows of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", help="names of rows; all that have no file yet, if none is given")
    parser.add_argument("--again", action="store_true", help="run all rows, also those that have a file")
    parser.add_argument("--render", action="store_true", help="only write the page")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the tries of the full matrix")
    parser.add_argument(
        "--folder", type=Path, default=(SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path("/tmp")) / "ssa_faults"
    )
    parser.add_argument("--results", type=Path, default=tally.RESULTS)
    parser.add_argument("--page", type=Path, default=page.PAGE)
    given = parser.parse_args()
    rows = {row.name: row.run for group in GROUPS.values() for row in group if row.run is not None}
    if unknown := set(given.rows) - rows.keys():
        parser.error(f"{sorted(unknown)[0]} is not a row; try one of {', '.join(rows)}")
    broken: list[str] = []
    chosen = given.rows or [name for name in rows if given.again or tally.read(name, given.results) is None]
    if not given.render and chosen:
        with stage(given.folder, given.scale) as place:
            for name in chosen:
                begin = time.monotonic()
                try:
                    found = rows[name](place)
                except (AssertionError, OSError, LookupError, RuntimeError) as error:  # the other rows can still run
                    traceback.print_exc()
                    broken.append(f"{name}: {error}")
                    continue
                found.write(name, begin, given.results)
                print(
                    f"{name}: {found.good} of {found.tries} in {time.monotonic() - begin:.0f} s {found.failures[:2]}",
                    flush=True,
                )
    page.write(given.results, given.page)
    for line in broken:
        print(f"could not be run: {line}")
    sys.exit(bool(broken) or page.num_bad(given.results) > 0)


if __name__ == "__main__":
    main()
