"""All rows of the matrix, by group, in the order of the page."""

from faults import corruption, longer, mistakes, peers, publishing, resuming, signalling, surroundings, values
from faults.rows import Row

GROUPS: dict[str, list[Row]] = {
    "Kills during a save": publishing.ROWS,
    "Signals": signalling.ROWS,
    "Damaged files": corruption.ROWS,
    "Numbers": values.ROWS,
    "Ranks that die, hang or are slow": peers.ROWS,
    "Storage, network, clock": surroundings.ROWS,
    "Resuming elsewhere, or with the wrong thing": resuming.ROWS,
    "User errors": mistakes.ROWS,
    "Long runs": longer.ROWS,
}
