"""Times taken in turns, so that a drifting clock meets every variant alike, and the peak of memory in each."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Measured:
    """One variant's figures.

    Attributes:
        ms: median over the turns of the mean time of one run.
        spread: (largest - smallest) / median of the turns.
        peak_bytes: largest memory in use during its turns, None on a CPU.
    """

    ms: float
    spread: float
    peak_bytes: int | None


def in_turns(runs: Sequence[Callable[[], object]], *, rounds: int, runs_a_turn: int, warmup: int) -> list[Measured]:
    """Return each run's figures.

    Args:
        runs: what to time; each queues one piece of work and does not wait for it.
        rounds: turns that each of them takes; every other round in reverse order.
        runs_a_turn: runs between two looks at the clock.
        warmup: runs of each before the first turn.
    """
    peaks = [0] * len(runs)
    for run in runs:
        for _ in range(warmup):
            run()
    times: list[list[float]] = [[] for _ in runs]
    for number in range(rounds):
        order = range(len(runs)) if number % 2 == 0 else reversed(range(len(runs)))
        for index in order:
            ms, peak = _turn(runs[index], runs_a_turn)
            times[index].append(ms)
            peaks[index] = max(peaks[index], peak or 0)
    on_gpu = torch.cuda.is_available()
    medians = [statistics.median(taken) for taken in times]
    return [
        Measured(median, (max(taken) - min(taken)) / median, peak if on_gpu else None)
        for median, taken, peak in zip(medians, times, peaks, strict=True)
    ]


def _turn(run: Callable[[], object], count: int) -> tuple[float, int | None]:
    """Return the mean time of a run in ms, launch gaps included, and the peak of memory."""
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - begin) * 1e3 / count, None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(count):
        run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / count, torch.cuda.max_memory_allocated()
