"""All rows of the matrix, by group, in the order of the page."""

from faults import publishing
from faults.rows import Row

GROUPS: dict[str, list[Row]] = {
    "Kills during a save": publishing.ROWS,
}
