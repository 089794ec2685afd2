"""Finds weights and moments that are not finite, with one value per tensor on the device and one read by the host.

The largest magnitude of a tensor is NaN or infinite exactly if one of its elements is. It is reduced in place of an elementwise check, which would
need memory for a mask of the whole tensor. Used before a checkpoint is published, not in a step.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def first_not_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """Returns the name of the first tensor with a value that is not finite, or None. Waits for the device.

    Args:
        named: names and floating-point tensors, on any devices; others are passed over.
    """
    checked = [(name, tensor) for name, tensor in named if tensor.numel() and tensor.is_floating_point()]
    largest = [torch.linalg.vector_norm(tensor.detach(), ord=torch.inf).float() for _, tensor in checked]
    by_device: dict[torch.device, list[int]] = {}
    for i, value in enumerate(largest):
        by_device.setdefault(value.device, []).append(i)
    found = [
        i
        for places in by_device.values()
        for i, good in zip(places, torch.stack([largest[i] for i in places]).isfinite().tolist(), strict=True)
        if not good
    ]
    return checked[min(found)][0] if found else None


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> list[tuple[str, Tensor]]:
    """Returns the weights and moments that optimizers hold on this rank, with names such as "the optimizer's exp_avg"."""
    found: list[tuple[str, Tensor]] = []
    for optimizer in optimizers:
        found += [("the optimizer's weights", p) for group in optimizer.param_groups for p in group["params"]]
        found += [
            (f"the optimizer's {name}", value)
            for state in optimizer.state.values()
            for name, value in state.items()
            if isinstance(value, Tensor)
        ]
    return found
