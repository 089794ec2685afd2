"""How long a rank computes in a step before it waits for others: from the count of labels to the reduction of its gradients.

On a GPU two events of the current stream mark the window. Recording them does not wait, and they are read when the step's results are. On a CPU the
clock is read. What the time means, and its limits, is in parallel/stragglers.py.
"""

import time
from collections.abc import Callable

import torch

Mark = torch.cuda.Event | float


class OwnTime:
    """The window of the step that is being queued."""

    def __init__(self) -> None:
        self._begin: Mark | None = None
        self._end: Mark | None = None

    def begin(self, device: torch.device) -> None:
        """Marks the beginning of a step's window."""
        self._begin, self._end = _mark(device), None

    def end(self, device: torch.device) -> None:
        """Marks the end of the window; the last mark of a step counts."""
        self._end = _mark(device)

    def reader(self) -> Callable[[], float]:
        """Returns the function that returns the window's seconds once the device has passed it."""
        begin, end = self._begin, self._end
        if begin is None or end is None:
            return float
        if isinstance(begin, float):
            return lambda: end - begin  # pyright: ignore[reportOperatorIssue]
        return lambda: begin.elapsed_time(end) / 1e3  # pyright: ignore[reportArgumentType]


def _mark(device: torch.device) -> Mark:
    """Returns this moment on the device's stream, or on the clock of the CPU."""
    if device.type != "cuda":
        return time.monotonic()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
