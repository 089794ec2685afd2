"""Medians of CUDA-event times, peak memory, and the card's ceilings, measured in the same process.

A call is timed by a pair of events around it, after warm-up; the result is the median of the repetitions. The inputs are several times
larger than the L2 cache, so one set of them is enough (k and v are smaller, but q, o and their gradients evict them in between).
"""

import statistics
from collections.abc import Callable

import torch


def median_ms(call: Callable[[], object], repetitions: int = 20, warmup: int = 3) -> float:
    """Returns the median time of `call` in milliseconds, launch gaps included."""
    return medians_ms([call], repetitions, warmup)[0]


def medians_ms(calls: list[Callable[[], object]], repetitions: int = 20, warmup: int = 3) -> list[float]:
    """Returns the calls' median times. The calls alternate, so that a change of the GPU's clock affects all of them alike."""
    for _ in range(warmup):
        for call in calls:
            call()
    times = [[] for _ in calls]
    for _ in range(repetitions):
        for call, taken in zip(calls, times, strict=True):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            taken.append((begin, end))
    torch.cuda.synchronize()
    return [statistics.median(begin.elapsed_time(end) for begin, end in taken) for taken in times]


def repetitions_for(expected_ms: float) -> int:
    """Returns how often to repeat a call of about this length: 3 to 40 times, for about a second in total."""
    return max(3, min(40, int(1000 / max(expected_ms, 1.0))))


def workspace_bytes(call: Callable[[], object], kept: Callable[[object], int]) -> int:
    """Returns the peak of memory during `call`, minus what was allocated before it and minus the bytes that `kept` finds in its result."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - kept(result)


def copy_bandwidth() -> float:
    """Returns the bytes per second, read plus written, of a device-to-device copy of 2 GiB."""
    source = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source)) * 1e3


def matmul_rate() -> float:
    """Returns the bf16 operations per second of a square matrix product of 8192 on random data."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / median_ms(lambda: a @ b) * 1e3
