"""The learning rate of a step: a chain of pieces, as a pure function of the configuration and the step.

A piece goes from one rate to another over a number of steps, by a shape. `optim.schedule` is two or three pieces, and `optim.pieces` lists them itself.
With a piece of n steps that begins after step F, the rate after `step` steps is

    end + (start - end) * left(p),   p = (step - F) / n,   left(p) = 1 - p (linear), (1 + cos(pi * p)) / 2 (cosine), 1 - sqrt(p) (sqrt), 0 (constant)

so the end is reached one step past the piece, where the next one begins. A piece that starts at 0 has p = (step - F + 1) / (n + 1) instead: neither the
first step of a run nor its last one is wasted at rate 0. After the last piece the rate stays.

Source: linear to zero, arXiv 2502.15938; warm-up, stable, decay, arXiv 2404.06395; 1 - sqrt, arXiv 2405.18392. Standard library only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ssa_pretrain.config import Batches, OptimConfig, Schedule, Shape, piece_bounds
from ssa_pretrain.settings.quantities import compact


class Length(Protocol):
    """The length of a run, as a schedule reads it; `planning.Plan` provides it."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole schedule."""
        ...

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps of its warm-up."""
        ...

    @property
    def batches(self) -> Batches:
        """The tokens of each step."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of the learning rate.

    Attributes:
        first: steps before it.
        steps: its length.
        start, end: rates before and after it.
        shape: the way between them.
    """

    first: int
    steps: int
    start: float
    end: float
    shape: Shape

    def rate(self, step: int) -> float:
        """Returns the rate after `step` steps of the run, at or after this piece's first."""
        done = step - self.first
        if self.shape is Shape.constant:
            return self.end
        if self.start == 0.0:
            done, steps = done + 1, self.steps + 1
            if self.shape is Shape.linear:
                return self.end * min(done, steps) / steps
        else:
            steps = max(1, self.steps)
        return self.end + (self.start - self.end) * _left(self.shape, min(1.0, done / steps))


def _left(shape: Shape, progress: float) -> float:
    """Returns the part of the way that is left, 1 at progress 0 and 0 at progress 1."""
    if shape is Shape.cosine:
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - (math.sqrt(progress) if shape is Shape.sqrt else progress)


def learning_rate(step: int, optim: OptimConfig, plan: Length) -> float:
    """Returns the learning rate of an optimizer step.

    Args:
        step: optimizer steps done before this one; 0 for the first.
        optim: peak, end and shape, or the pieces.
        plan: the run's length.
    """
    return next(piece for piece in reversed(rate_pieces(optim, plan)) if piece.first <= step).rate(step)


def rate_pieces(optim: OptimConfig, plan: Length) -> list[Piece]:
    """Returns the pieces of a run's learning rate in order; the first begins at step 0."""
    if optim.pieces:
        bounds = piece_bounds(optim.pieces, plan.steps, plan.batches)
        found, rate = [], 0.0
        for piece, first, last in zip(optim.pieces, bounds[:-1], bounds[1:], strict=True):
            end = optim.lr * piece.to
            found.append(Piece(first, last - first, rate, end, piece.shape))
            rate = end
        return found
    warmup, steps = plan.warmup_steps, plan.steps
    found = [Piece(0, warmup, 0.0, optim.lr, Shape.linear)] if warmup else []
    if optim.schedule is Schedule.constant:
        return [*found, Piece(warmup, steps - warmup, optim.lr, optim.lr, Shape.constant)]
    if optim.schedule is Schedule.wsd:
        decay = min(round(optim.decay_fraction * steps), steps - warmup)
        found.append(Piece(warmup, steps - warmup - decay, optim.lr, optim.lr, Shape.constant))
        return [*found, Piece(steps - decay, decay, optim.lr, optim.min_lr, optim.decay_shape)]
    shape = Shape.cosine if optim.schedule is Schedule.cosine else Shape.linear
    return [*found, Piece(warmup, steps - warmup, optim.lr, optim.min_lr, shape)]


def describe_pieces(pieces: Sequence[Piece], sizes: Batches) -> list[str]:
    """Returns a line for each piece that has steps, such as "steps 1 to 100 (1.05M tokens): from 0 to 0.001, linear"."""
    lines = []
    for piece in pieces:
        if not piece.steps:
            continue
        last = piece.first + piece.steps
        tokens = compact(sizes.tokens_before(last) - sizes.tokens_before(piece.first))
        way = f"{piece.end:.4g}" if piece.shape is Shape.constant else f"from {piece.start:.4g} to {piece.end:.4g}"
        lines.append(f"steps {piece.first + 1:,} to {last:,} ({tokens} tokens): {way}, {piece.shape}")
    return lines
