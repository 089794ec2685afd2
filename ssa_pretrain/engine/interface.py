"""The engine's interface: everything the trainer may ask of the library that runs the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from ssa_pretrain.data.batches import Batch


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer step over the global batch; the same on every rank.

    Attributes:
        cross_entropy: mean over the labels that count, nats.
        alignment_by_layer: mean over tokens (padding apart), heads and head dims, one entry a layer; empty where no second stream ran.
        captured_mass_by_layer: mean attention mass of the chosen blocks, likewise.
        grad_norm: global norm before clipping.
        full_share: share of microbatches whose main stream was the full one.
    """

    cross_entropy: float
    alignment_by_layer: list[float]
    captured_mass_by_layer: list[float]
    grad_norm: float
    full_share: float


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Held-out metrics of one mode; the same on every rank. Means as in a step, over `num_labels` and `num_tokens`, padding apart; 0 over none."""

    cross_entropy: float
    alignment_by_layer: list[float]
    captured_mass_by_layer: list[float]
    num_labels: int
    num_tokens: int


class Engine(Protocol):
    """A model on its devices with its optimizer."""

    def train_step(self, batches: Sequence[Batch], *, step: int, learning_rate: float) -> StepResult:
        """Run forward, backward and the optimizer step over this rank's microbatches of one global batch."""
        ...

    def evaluate(self, batches: Sequence[Batch], *, mode: str) -> EvaluationResult:
        """Return held-out figures over all ranks' microbatches with `mode` ("full" or "sparse") as the main stream; weights unchanged."""
        ...

    def last_logits(self, batch: Batch, *, mode: str) -> Tensor:
        """Return the logits after each document's last token, fp32 [documents, padded vocabulary], on every rank."""
        ...

    def save(self, folder: Path) -> None:
        """Write weights and optimizer into an existing, empty folder; every rank calls it."""
        ...

    def load(self, folder: Path) -> None:
        """Restore weights and optimizer, whatever layout wrote them; every rank calls it."""
        ...

    def load_weights(self, folder: Path) -> None:
        """Restore the weights alone, from a checkpoint of either engine or common weights, and start the optimizer afresh."""
        ...

    def save_weights(self, folder: Path) -> None:
        """Write the weights into `folder`/weights in the common format (weights.py); every rank calls it."""
        ...
