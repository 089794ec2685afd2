"""A step's figures before the device has finished it.

A step is only queued on a GPU when `train_step` returns. Its figures start their way into pinned host memory behind it; whoever reads one of them
waits for just that step, so that a caller who reads the last step's figures after queueing the next keeps the device busy.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from ssa_pretrain.engine.interface import StepResult


class PendingStep:
    """Reads like a `StepResult`; the first reading waits for the device.

    Args:
        figures: float64 vector on the device.
        interpret: makes the result of the vector's values.
    """

    def __init__(self, figures: Tensor, interpret: Callable[[list[float]], StepResult]) -> None:
        self._interpret = interpret
        self._event: torch.cuda.Event | None = None
        if figures.is_cuda:
            self._host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
            self._host.copy_(figures, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = figures

    @cached_property
    def _result(self) -> StepResult:
        if self._event is not None:
            self._event.synchronize()
        return self._interpret(self._host.tolist())

    @property
    def cross_entropy(self) -> float:
        """See `StepResult`; likewise below."""
        return self._result.cross_entropy

    @property
    def alignment_by_layer(self) -> list[float]:
        """As in `StepResult`."""
        return self._result.alignment_by_layer

    @property
    def captured_mass_by_layer(self) -> list[float]:
        """As in `StepResult`."""
        return self._result.captured_mass_by_layer

    @property
    def grad_norm(self) -> float:
        """As in `StepResult`."""
        return self._result.grad_norm

    @property
    def full_share(self) -> float:
        """As in `StepResult`."""
        return self._result.full_share

    def __eq__(self, other: object) -> bool:
        return self._result == (other._result if isinstance(other, PendingStep) else other)

    def __hash__(self) -> int:
        return hash(self.cross_entropy)

    def __repr__(self) -> str:
        return repr(self._result)
