"""When a launcher starts a run again by itself: which ends a restart can cure, how often, and after how long.

A killed rank, a crash, a hang or a lost node is cured by a restart: the run resumes from its newest checkpoint. A wrong configuration, bad data, a
checkpoint that cannot be used, divergence and a stop on request are not. Neither is an error before the first training step of the first start,
such as too little memory: it would come again.

At most `limit` restarts in a row are made. Published checkpoints set the count back, because the run moves on then. The wait doubles with each
restart in a row. Stdlib only.
"""

from dataclasses import dataclass

from ssa_pretrain.errors import ExitCode

USAGE = 2  # argparse's code for a bad command line
FINAL = {
    ExitCode.DONE,
    USAGE,
    ExitCode.CONFIGURATION,
    ExitCode.DATA,
    ExitCode.CHECKPOINT,
    ExitCode.DIVERGED,
    ExitCode.STOPPED,
    ExitCode.INTERRUPTED,
    ExitCode.READER_GONE,
}
LONGEST_WAIT = 300.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one start of a run ended.

    Attributes:
        code: its exit code.
        crashed: whether a rank ended with an unexpected error, and not by a signal.
        trained: training steps done by the ranks of this node since this start.
        saved: checkpoints that were published.
    """

    code: int
    crashed: bool = False
    trained: int = 0
    saved: int = 0


class Restarts:
    """Counts the restarts of a run.

    Attributes:
        count: restarts in a row without a checkpoint in between.
        limit: the most that are allowed.
    """

    def __init__(self, limit: int, first_wait: float) -> None:
        self.count, self.limit = 0, limit
        self._first_wait, self._has_begun = first_wait, False

    def wait_after(self, outcome: Outcome) -> float | None:
        """Returns the seconds until the run is started again, and counts the restart; None: it is not started again."""
        if not self._is_curable(outcome):
            return None
        self._has_begun |= outcome.trained > 0 or outcome.saved > 0
        if outcome.saved:
            self.count = 0
        if self.count >= self.limit:
            return None
        self.count += 1
        return min(LONGEST_WAIT, self._first_wait * 2 ** (self.count - 1))

    def _is_curable(self, outcome: Outcome) -> bool:
        if outcome.code == ExitCode.CONFIGURATION:
            return self._has_begun  # it was accepted before: the old processes have not left the port or the folder yet
        if outcome.crashed and not outcome.trained and not self._has_begun:
            return False
        return outcome.code not in FINAL
