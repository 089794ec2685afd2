"""Streams beside the current one, for work of a different kind: small kernels behind a large one, the next chunk's product beside a top-k.

Streams are made once a device and kept: making one costs more than the work that it hides. Whoever uses one makes it wait for the current
stream first and the current stream wait for it afterwards, so that to the caller everything happens in order; both are captured by
CUDA graphs, and neither waits on the host.
"""

from functools import cache

import torch


@cache
def side_streams(device: torch.device, count: int, *, urgent: bool = False) -> tuple[torch.cuda.Stream, ...]:
    """Returns `count` streams of a device, the same at every call; urgent: their kernels are placed before others that wait."""
    return tuple(torch.cuda.Stream(device, priority=-1 if urgent else 0) for _ in range(count))
