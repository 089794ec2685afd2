"""Stragglers: ranks whose own part of a step takes much longer than that of the median rank.

In a synchronous step every rank takes as long as the slowest, so the step's time names nobody. What differs is the time that a rank does not wait
for others. Each engine measures it from the step's first collective (the count of labels) to the reduction of gradients, on a GPU between two events
of its stream, which cost nothing and are read with the step's results. The time to read the rows is added on a CPU; on a GPU, where the host
works ahead of the device, the longer of both counts.

A rank reports the median of its last `WINDOW` steps with its heartbeat, so a single slow step (a collection of garbage, a disk) names nobody. Rank 0
compares the reports once per window. A rank is named if it was `RATIO` times slower than the median rank in two windows in a row.

Limits. Ranks that share a model (tensor, context and pipeline parallelism) wait for each other between the two events. There the replica is slow as a
whole, and all of its ranks are named. DeepSpeed reduces gradients during its last backward pass, so its time ends before that pass. A slow network
between replicas is not a slow rank and names nobody. Stdlib only.
"""

from collections import deque
from collections.abc import Sequence
from statistics import median, median_low

from ssa_pretrain.parallel.heartbeat import Beat

WINDOW = 20  # steps
RATIO = 1.5
REPEATED = 25  # windows after which a rank that is still slow is named again
MAX_LISTED = 4


class OwnTime:
    """The median of this rank's own seconds per step over the last WINDOW steps."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=WINDOW)

    def add(self, seconds: float) -> None:
        """Adds a step."""
        self._seconds.append(seconds)

    @property
    def median(self) -> float | None:
        """Seconds per step; None until the window is full."""
        return median(self._seconds) if len(self._seconds) == WINDOW else None


def slow_ranks(beats: Sequence[Beat]) -> dict[int, float]:
    """Returns the ranks that are RATIO times slower than the median rank, with their own seconds per step. Empty until all ranks have measured."""
    times = {beat.rank: beat.own_seconds for beat in beats if beat.own_seconds is not None}
    if len(times) < len(beats) or len(times) < 2:
        return {}
    usual = median_low(times.values())  # of two ranks the faster one
    return {rank: seconds for rank, seconds in times.items() if seconds > RATIO * usual}


class Stragglers:
    """Rank 0's view of the ranks' own times, window by window."""

    def __init__(self) -> None:
        self._window = 0
        self._slow: set[int] = set()  # in the last window
        self._named: set[int] = set()
        self._named_in = 0

    def check(self, beats: Sequence[Beat]) -> str | None:
        """Returns the sentence that names new stragglers, or old ones again after a while; None if there is nothing to say.

        Args:
            beats: the last beat of every rank.
        """
        window = min(beat.trained for beat in beats) // WINDOW
        if window == self._window:
            return None
        self._window, before = window, self._slow
        slow = slow_ranks(beats)
        self._slow = set(slow)
        named = self._slow & before
        repeated = window - self._named_in >= REPEATED
        if not named or (named <= self._named and not repeated):
            return None
        self._named, self._named_in = named, window
        usual = median_low([beat.own_seconds for beat in beats if beat.own_seconds is not None])
        worst = sorted(named, key=lambda rank: -slow[rank])
        hosts = {beat.rank: beat.host for beat in beats}
        listed = [
            f"rank {rank} ({hosts[rank]}) {slow[rank]:.3g} s, {slow[rank] / usual:.1f} times"
            for rank in worst[:MAX_LISTED]
        ]
        more = f"; and {len(worst) - MAX_LISTED} more" if len(worst) > MAX_LISTED else ""
        return f"slow: {'; '.join(listed)}{more} the median rank's own time per step ({usual:.3g} s)"
