"""The engine's interface: everything the trainer may ask of the library that runs the model."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ssa_pretrain.data.batches import Batch
from ssa_pretrain.engine.replicas import ReplicaCheck
from ssa_pretrain.model.text_cache import TextCache


@dataclass(frozen=True, slots=True)
class StepResult:
    """The results of one optimizer step over the global batch; the same on every rank.

    Attributes:
        cross_entropy: mean over the labels that count, nats.
        alignment_by_layer: mean over drawn queries other than padding, heads and head dims, one entry per layer; empty if no query was drawn.
        captured_mass_by_layer: mean attention mass of the chosen blocks, as above.
        grad_norm: global norm before clipping; not finite if the step was skipped.
        full_share: share of microbatches whose main stream was the full one.
        differing_weights: weights whose copies differed between data ranks before the update; None if they were not compared.
        index_loss_by_layer: mean over drawn queries other than padding and kv heads, nats, one entry per layer; empty without a trained scorer.
        cross_entropy_by_stream: mean over the labels of the microbatches with this main stream, "full" or "sparse"; only streams that occurred.
        z_loss: mean over the labels of the z-loss, which `cross_entropy` does not include; None without one.
        num_tokens: tokens of the global batch without padding.
        by_part: sum of the cross entropies of each part of the corpus, nats, and its number of labels, by the part's number; parts that did not
            occur may be missing at the end.
    """

    cross_entropy: float
    alignment_by_layer: list[float]
    captured_mass_by_layer: list[float]
    grad_norm: float
    full_share: float
    cross_entropy_by_stream: dict[str, float] = field(default_factory=dict)
    differing_weights: int | None = None
    index_loss_by_layer: list[float] = field(default_factory=list)
    z_loss: float | None = None
    num_tokens: int = 0
    by_part: list[tuple[float, int]] = field(default_factory=list)

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
        own_seconds: returns this rank's own time on the device, without waits for other ranks; called when the step is done.
    """

    def __init__(
        self,
        values: Tensor,
        interpret: Callable[[list[float]], StepResult],
        own_seconds: Callable[[], float] = float,
    ) -> None:
        self._interpret, self._own_seconds = interpret, own_seconds
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

    def own_seconds(self) -> float:
        """Returns the seconds that this rank has computed before its gradients are reduced (parallel/stragglers.py); call it after `result`."""
        return self._own_seconds()


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Held-out metrics of one stream; the same on every rank.

    Attributes:
        cross_entropy: mean over `num_labels`; 0 without any.
        alignment_by_layer: as in a step, over `num_tokens`: all queries are drawn.
        captured_mass_by_layer: as in a step, over `num_tokens`.
        num_labels: labels that count.
        num_tokens: tokens other than padding.
        cross_entropy_by_position: sums over the labels of a bucket of positions in the document, nats. Bucket 0 is position 0, and
            bucket i holds the positions from 2^(i-1) to 2^i - 1.
        labels_by_position: labels that count, by the same buckets.
    """

    cross_entropy: float
    alignment_by_layer: list[float]
    captured_mass_by_layer: list[float]
    num_labels: int
    num_tokens: int
    cross_entropy_by_position: list[float] = field(default_factory=list)
    labels_by_position: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A copy of a rank's part of the state, and how it is written while training continues.

    Attributes:
        write: writes into an existing, empty folder what `save` would have written; a thread of every rank calls it, with a process group of all
            ranks that only these threads use.
        device_seconds: returns how long the device was busy copying; for after `write`.
    """

    write: Callable[[Path, dist.ProcessGroup], None]
    device_seconds: Callable[[], float]


class Evaluator(Protocol):
    """A model on its devices, without an optimizer. `mode` is the main stream, "full" or "sparse". No method changes the weights but `load_weights`."""

    def evaluate(
        self, batches: Sequence[Batch], *, mode: str, observe: Callable[..., None] | None = None
    ) -> EvaluationResult:
        """Returns held-out metrics over all ranks' microbatches; every rank calls it.

        Args:
            batches: this data rank's microbatches; data ranks may have different numbers.
            mode: the main stream.
            observe: receives each layer's queries, keys and values (model/attention.py `PackedTokens.observe`).
        """
        ...

    def score_labels(self, batch: Batch, *, mode: str) -> Tensor:
        """Returns, for each of the T labels, its log-probability in nats and whether no other token is likelier (1 or 0), fp32 [T, 2].

        Every tensor, context and pipeline rank has the result for its data rank's batch. Data ranks call it equally often.
        """
        ...

    def last_logits(self, batch: Batch, *, mode: str, texts: TextCache | None = None) -> Tensor:
        """Returns the logits after each document's last token, fp32 [documents, padded V], on every rank.

        Args:
            batch: whole.
            mode: the main stream.
            texts: keeps keys and values of the first documents.
        """
        ...

    def next_logits(self, batch: Batch, *, mode: str, texts: TextCache) -> Tensor:
        """Returns the logits after each text's newest token, fp32 [texts, padded V], on every rank; of texts without one, without meaning.

        Args:
            batch: one token per document: first the newest token of each text at its position, then padding.
            mode: the main stream.
            texts: filled by `last_logits`, and advanced since.
        """
        ...

    def load_weights(self, folder: Path) -> None:
        """Restores only the weights, from either engine's checkpoint or from common weights; an engine also resets its optimizer."""
        ...


class Engine(Evaluator, Protocol):
    """A model on its devices with its optimizer.

    Attributes:
        replicas: compares the data ranks' copies of the weights.
    """

    replicas: ReplicaCheck

    def train_step(self, batches: Sequence[Batch], *, step: int, learning_rate: float) -> PendingStep:
        """Runs forward, backward and the optimizer step over this rank's microbatches of one global batch.

        If the loss or a gradient of any rank is not finite, no rank changes its weights, moments and step counts. On a GPU that needs
        `training.max_skipped_steps` above 0.
        """
        ...

    def require_equal_replicas(self, step: int) -> None:
        """Raises ReplicaError on every rank if data ranks hold different weights after `step` updates; every rank calls it before a save."""
        ...

    def first_not_finite(self) -> str | None:
        """Returns the name of this rank's first weight or moment with a value that is not finite; None if all are. Waits for the device."""
        ...

    def save(self, folder: Path) -> None:
        """Writes weights and optimizer into an existing, empty folder; every rank calls it."""
        ...

    def snapshot(self, *, weights: bool) -> Snapshot:
        """Copies this rank's part of the state to host memory, between two steps; every rank calls it.

        The next snapshot may be taken only when this one is written.

        Args:
            weights: whether `write` also does what `save_weights` does.
        """
        ...

    def load(self, folder: Path) -> None:
        """Restores weights and optimizer from a checkpoint of any layout; every rank calls it."""
        ...

    def ema_weights(self) -> AbstractContextManager[None]:
        """Returns the context in which the model has the running mean of its weights (ema.py); every rank opens it, between two steps."""
        ...

    def save_weights(self, folder: Path) -> None:
        """Writes the weights to `folder`/weights in the common format (checkpoint/weights.py); every rank calls it."""
        ...
