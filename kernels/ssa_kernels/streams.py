"""A stream beside the current one, for work of a different kind: small kernels behind a large one, top-k beside later softmax sums.

It is made once a device and kept: making one costs more than the work that it hides. Whoever uses it makes it wait for the current
stream first and the current stream wait for it afterwards, so that to the caller everything happens in order; both are captured by
CUDA graphs, and neither waits on the host.
"""

from functools import cache

import torch


@cache
def urgent_stream(device: torch.device) -> torch.cuda.Stream:
    """Returns a device's stream whose kernels are placed before others that wait, the same at every call."""
    return torch.cuda.Stream(device, priority=-1)
