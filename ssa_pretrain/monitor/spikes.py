"""Finds loss spikes: a step whose cross entropy lies far above the recent ones of the same main stream.

Full and sparse attention have different losses, so each main stream has a window of its own, and a step that runs both streams is judged by each. A
value is compared with the median of its window; distances are measured in robust standard deviations, 1.4826 times the median distance from that
median (which for normal values is the standard deviation). The window does not contain the value that it judges. Afterwards the value joins the
window, spike or not: the median of 64 values ignores some odd ones, and if the loss stays on a higher level, the window follows within 32 steps. Values
that are not finite never join.

A deviation counts as at least FLOOR of the median, so that a loss that hardly varies (a tiny corpus, seen often) does not turn noise into spikes. A
falling loss widens the window's deviation and lies below its median, so the start of a run raises no alarm.

What it does not do: it sees no slow divergence, which stays within the window's deviations.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

WINDOW = 64  # values of a stream
FEWEST = 32  # values before a stream is judged
NORMAL = 1.4826  # standard deviation of normal values over their median distance from the median
FLOOR = 0.02  # of the median: the smallest deviation


@dataclass(frozen=True, slots=True)
class Spike:
    """A value far above its window.

    Attributes:
        stream: the main stream, "full" or "sparse".
        value: the step's cross entropy, nats.
        median: of the window.
        deviation: robust standard deviation of the window, nats.
    """

    stream: str
    value: float
    median: float
    deviation: float

    @property
    def distance(self) -> float:
        """How many deviations the value lies above the median."""
        return (self.value - self.median) / self.deviation


class SpikeDetector:
    """The windows of a run.

    Args:
        threshold: deviations above the median from which a value is a spike; 0 judges nothing.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.windows: dict[str, list[float]] = {}

    def judge(self, cross_entropies: Mapping[str, float]) -> Spike | None:
        """Returns the spike of a step, the more distant one if both streams have one, and adds the step to the windows.

        Args:
            cross_entropies: by main stream, nats; only those that the step ran.
        """
        found = [spike for stream, value in cross_entropies.items() if (spike := self._judge(stream, value))]
        for stream, value in cross_entropies.items():
            if math.isfinite(value):
                window = self.windows.setdefault(stream, [])
                window.append(value)
                del window[:-WINDOW]
        return max(found, key=lambda spike: spike.distance, default=None)

    def _judge(self, stream: str, value: float) -> Spike | None:
        window = self.windows.get(stream, [])
        if not self.threshold or len(window) < FEWEST or not math.isfinite(value):
            return None
        middle = median(window)
        spread = median(abs(earlier - middle) for earlier in window)
        spike = Spike(stream, value, middle, max(NORMAL * spread, FLOOR * abs(middle), 1e-12))
        return spike if spike.distance > self.threshold else None
