"""A row of the matrix, before it is run."""

from collections.abc import Callable
from dataclasses import dataclass

from faults.stage import Stage
from faults.tally import Tally


@dataclass(frozen=True, slots=True)
class Row:
    """A fault.

    Attributes:
        name: of its file.
        fault: what is done to the run.
        expected: what must come of it.
        run: injects it as often as the stage's scale says; None if the row has a command of its own.
        must_fail: whether no try may end with exit code 0.
    """

    name: str
    fault: str
    expected: str
    run: Callable[[Stage], Tally] | None
    must_fail: bool = False
