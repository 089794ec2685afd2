"""The engine's interface: everything the trainer may ask of the library that runs the model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ssa_pretrain.data.batches import Batch


@dataclass(frozen=True, slots=True)
class StepResult:
    """The results of one optimizer step over the global batch; the same on every rank.

    Attributes:
        cross_entropy: mean over the labels that count, nats.
        alignment_by_layer: mean over drawn queries other than padding, heads and head dims, one entry per layer; empty if no query was drawn.
        captured_mass_by_layer: mean attention mass of the chosen blocks, as above.
        grad_norm: global norm before clipping; not finite if the step was skipped.
        full_share: share of microbatches whose main stream was the full one.
        cross_entropy_by_stream: mean over the labels of the microbatches with this main stream, "full" or "sparse"; only streams that occurred.
    """

    cross_entropy: float
    alignment_by_layer: list[float]
    captured_mass_by_layer: list[float]
    grad_norm: float
    full_share: float
    cross_entropy_by_stream: dict[str, float] = field(default_factory=dict)

    @property
    def was_skipped(self) -> bool:
        """Whether the optimizer skipped this step on all ranks, because the gradient norm is not finite. Weights and moments are unchanged then."""
        return not math.isfinite(self.grad_norm)


class PendingStep:
    """A step that the device may still be running.

    On a GPU a step is only queued when `train_step` returns. Its values are copied to pinned host memory behind it. A caller who asks for a
    result after queueing the next step keeps the device busy.

    Args:
        values: float64 vector on the device.
        interpret: builds the result from the vector's values.
    """

    def __init__(self, values: Tensor, interpret: Callable[[list[float]], StepResult]) -> None:
        self._interpret = interpret
        self._copied: torch.cuda.Event | None = None
        self._values = values
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def result(self) -> StepResult:
        """Returns the step's results; blocks until this step is done, and not for later ones."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._interpret(self._values.tolist())


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Held-out metrics of one stream; the same on every rank.

    Attributes:
        cross_entropy: mean over `num_labels`; 0 without any.
        alignment_by_layer: as in a step, over `num_tokens`: all queries are drawn.
        captured_mass_by_layer: as in a step, over `num_tokens`.
        num_labels: labels that count.
        num_tokens: tokens other than padding.
    """

    cross_entropy: float
    alignment_by_layer: list[float]
    captured_mass_by_layer: list[float]
    num_labels: int
    num_tokens: int


class Engine(Protocol):
    """A model on its devices with its optimizer."""

    def train_step(self, batches: Sequence[Batch], *, step: int, learning_rate: float) -> PendingStep:
        """Runs forward, backward and the optimizer step over this rank's microbatches of one global batch.

        If the loss or a gradient of any rank is not finite, no rank changes its weights, moments and step counts.
        """
        ...

    def evaluate(self, batches: Sequence[Batch], *, mode: str) -> EvaluationResult:
        """Returns held-out metrics over all ranks' microbatches with `mode` ("full" or "sparse") as the main stream; weights stay as they are."""
        ...

    def last_logits(self, batch: Batch, *, mode: str) -> Tensor:
        """Returns the logits after each document's last token, fp32 [documents, padded V], on every rank."""
        ...

    def first_not_finite(self) -> str | None:
        """Returns the name of this rank's first weight or moment with a value that is not finite; None if all are. Waits for the device."""
        ...

    def save(self, folder: Path) -> None:
        """Writes weights and optimizer into an existing, empty folder; every rank calls it."""
        ...

    def load(self, folder: Path) -> None:
        """Restores weights and optimizer from a checkpoint of any layout; every rank calls it."""
        ...

    def load_weights(self, folder: Path) -> None:
        """Restores only the weights, from either engine's checkpoint or from common weights, and resets the optimizer."""
        ...

    def save_weights(self, folder: Path) -> None:
        """Writes the weights to `folder`/weights in the common format (checkpoint/weights.py); every rank calls it."""
        ...
