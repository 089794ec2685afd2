"""Timing in turns, so that a drifting clock affects all variants equally, with the peak memory of each."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Timing:
    """Time and memory of one variant.

    Attributes:
        ms: time of a run: mean within a turn, median over the turns.
        spread: (largest - smallest) / median over the turns.
        peak_bytes: peak memory during its turns; None on a CPU.
    """

    ms: float
    spread: float
    peak_bytes: int | None


def mean_timing(parts: Sequence[tuple[float, Timing]]) -> Timing:
    """Returns the mean time of (weight, timing) pairs, with the largest spread and peak among them; the weights add up to 1."""
    peaks = [timing.peak_bytes for _, timing in parts if timing.peak_bytes is not None]
    return Timing(
        ms=sum(weight * timing.ms for weight, timing in parts),
        spread=max(timing.spread for _, timing in parts),
        peak_bytes=max(peaks, default=None),
    )


def time_in_turns(
    runs: Sequence[Callable[[], object]], *, rounds: int, runs_per_turn: int, warmup: int
) -> list[Timing]:
    """Returns the timing of each run.

    Args:
        runs: what to time; each queues its work and does not wait for it.
        rounds: turns per run; every other round is in reverse order.
        runs_per_turn: runs between two readings of the clock.
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
            ms, peak = _turn(runs[index], runs_per_turn)
            times[index].append(ms)
            peaks[index] = max(peaks[index], peak or 0)
    on_gpu = torch.cuda.is_available()
    medians = [statistics.median(taken) for taken in times]
    return [
        Timing(median, (max(taken) - min(taken)) / median, peak if on_gpu else None)
        for median, taken, peak in zip(medians, times, peaks, strict=True)
    ]


def _turn(run: Callable[[], object], count: int) -> tuple[float, int | None]:
    """Returns the mean time of a run in ms, launch gaps included, and the peak memory."""
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
