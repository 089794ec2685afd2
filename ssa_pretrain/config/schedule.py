"""The settings that change over a run: the pieces of the learning rate, and the steps of the batch.

`optim.pieces` lists the learning rate piece by piece. It replaces `optim.schedule`, its warm-up and `optim.min_lr`. `training.batch_steps` lists where the global batch changes.

    optim:
      pieces:
        - {steps: 2000}                          # warm-up: from 0 to optim.lr
        - {to: 1.0, shape: constant}             # without a length: what the others leave
        - {fraction: 0.2, to: 0.0, shape: sqrt}  # the last fifth, down to 0
    training:
      global_batch_tokens: 1048576
      batch_steps:
        - {tokens: 5e9, global_batch_tokens: 2097152}

Both are pure functions of the configuration, so a resumed run has the same rate and the same batch at each step. Megatron-LM has
`--lr-wsd-decay-style` and `--rampup-batch-size` for this, torchtitan `lr_scheduler.decay_ratio`, OLMo-core `SequentialScheduler` and a scheduler of the
batch size. Standard library only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ssa_pretrain.config.choices import Schedule, Shape
from ssa_pretrain.settings.problems import Problem, at_least, between

if TYPE_CHECKING:
    from ssa_pretrain.config.schema import OptimConfig, TrainingConfig

OF_DECAY = ("decay_fraction", "decay_shape")


@dataclass(kw_only=True, slots=True)
class PieceConfig:
    """A piece of the learning rate: how long it is, and where it ends. It begins where the piece before it ends, the first one at 0."""

    steps: int = 0  # its length in optimizer steps
    tokens: int = 0  # its length in tokens, rounded up to whole steps
    fraction: float = 0.0  # its length as a fraction of all steps; without any length it takes what the others leave
    to: float = 1.0  # learning rate at its end, as a multiple of optim.lr
    shape: Shape = Shape.linear

    @property
    def has_length(self) -> bool:
        """Whether it says how long it is."""
        return bool(self.steps or self.tokens or self.fraction)


@dataclass(kw_only=True, slots=True)
class BatchStepConfig:
    """A change of the global batch: where, and to what."""

    step: int = 0  # first step with this batch, counted from 1
    tokens: int = 0  # instead of step: the first step after this many tokens
    global_batch_tokens: int = 0  # tokens per optimizer step from there on


@dataclass(frozen=True, slots=True)
class Batches:
    """The tokens of each step of a run.

    Attributes:
        phases: (steps before it, tokens per step) of each span of steps with equal batches, in order; the first begins at 0.
    """

    phases: tuple[tuple[int, int], ...]

    def tokens_at(self, step: int) -> int:
        """Returns the tokens of the step after `step` steps."""
        return next(tokens for first, tokens in reversed(self.phases) if first <= step or first == 0)

    def tokens_before(self, step: int) -> int:
        """Returns the tokens of the first `step` steps."""
        ends = [first for first, _ in self.phases[1:]]
        total = 0
        for (first, tokens), end in zip(self.phases, [*ends, step], strict=True):
            total += max(0, min(end, step) - first) * tokens
        return total

    def steps_for(self, tokens: int) -> int:
        """Returns the fewest steps that together have at least so many tokens."""
        first, per_step = self.phases[0]
        for start, size in self.phases[1:]:
            if self.tokens_before(start) >= tokens:
                break
            first, per_step = start, size
        return first + -(-(tokens - self.tokens_before(first)) // max(1, per_step))

    @property
    def is_constant(self) -> bool:
        """Whether all steps have the same batch."""
        return len(self.phases) == 1


def batches(training: "TrainingConfig") -> Batches:
    """Returns the tokens of each step of a run; `training.batch_steps` has no problem."""
    found = Batches(((0, training.global_batch_tokens),))
    for change in training.batch_steps:
        first = change.step - 1 if change.step else found.steps_for(change.tokens)
        found = Batches((*found.phases, (first, change.global_batch_tokens)))
    return found


def piece_bounds(pieces: Sequence[PieceConfig], steps: int, sizes: Batches) -> list[int]:
    """Returns the steps before each piece and, last, before the end of the last one; they are `steps` and ascend unless the pieces have a problem.

    Pieces before the one without a length are laid from the start, those after it from the end. Fractions are rounded where they end, so they
    do not add up their rounding.

    Args:
        pieces: one or more, at most one of them without a length.
        steps: of the whole run.
        sizes: the tokens of each step.
    """
    rest = next((i for i, piece in enumerate(pieces) if not piece.has_length), len(pieces))
    front, place = [0], 0.0
    for piece in pieces[:rest]:
        start = round(place)
        if piece.tokens:
            place = float(sizes.steps_for(sizes.tokens_before(start) + piece.tokens))
        else:
            place += piece.steps or piece.fraction * steps
        front.append(round(place))
    back, place = [steps], float(steps)
    for piece in reversed(pieces[rest + 1 :]):
        end = round(place)
        if piece.tokens:
            place = float(sizes.steps_for(max(0, sizes.tokens_before(end) - piece.tokens)))
        else:
            place -= piece.steps or piece.fraction * steps
        back.append(round(place))
    return front if rest == len(pieces) else front + back[::-1]


def schedule_problems(optim: "OptimConfig") -> list[Problem]:
    """Returns the problems of the learning rate's settings by themselves; their lengths are compared with the run's in rules/schedule.py."""
    found = between("optim", optim, 0.0, 1.0, "decay_fraction")
    if optim.pieces:
        found += _piece_problems(optim)
    elif optim.schedule is not Schedule.wsd:
        found += _without_effect(optim, OF_DECAY, f"under optim.schedule={optim.schedule}")
    elif optim.warmup_fraction + optim.decay_fraction > 1.0:
        rule = f"and optim.warmup_fraction={optim.warmup_fraction:g} are together more than the whole run"
        advice, reads = f"try {1.0 - optim.warmup_fraction:g}", ("optim.warmup_fraction",)
        found.append(Problem("optim.decay_fraction", optim.decay_fraction, rule, advice, reads))
    return found


def _without_effect(optim: "OptimConfig", names: Sequence[str], where: str) -> list[Problem]:
    """Returns a problem for each field that is set and not read."""
    defaults = type(optim)()
    changed = [name for name in names if getattr(optim, name) != getattr(defaults, name)]
    rule = f"has no effect {where}"
    return [
        Problem(f"optim.{name}", getattr(optim, name), rule, f"try {getattr(defaults, name)}", ("optim.schedule",))
        for name in changed
    ]


def _piece_problems(optim: "OptimConfig") -> list[Problem]:
    """Returns the problems of `optim.pieces`."""
    found = _without_effect(optim, OF_DECAY, "beside optim.pieces, which are the whole schedule")
    if optim.schedule is Schedule.wsd:
        rule = "and optim.pieces both say how the learning rate goes down"
        found.append(Problem("optim.schedule", optim.schedule, rule, "leave out one"))
    for i, piece in enumerate(optim.pieces):
        key = f"optim.pieces[{i}]"
        found += at_least(key, piece, 0, "steps", "tokens", "to") + between(key, piece, 0.0, 1.0, "fraction")
        if sum(map(bool, (piece.steps, piece.tokens, piece.fraction))) > 1:
            rule, advice = "has several lengths", "give one of steps, tokens and fraction"
            found.append(Problem(key, None, rule, advice))
    rests = [i for i, piece in enumerate(optim.pieces) if not piece.has_length]
    if len(rests) > 1:
        rule = f"has no length, and optim.pieces[{rests[0]}] has none either"
        found.append(Problem(f"optim.pieces[{rests[1]}]", None, rule, "give one of steps, tokens and fraction"))
    if not any(piece.to > 0 for piece in optim.pieces):
        found.append(Problem("optim.pieces", None, "must rise above 0 somewhere", "give a piece with to=1.0"))
    return found


def batch_problems(training: "TrainingConfig") -> list[Problem]:
    """Returns the problems of `training.batch_steps`."""
    found, before = [], 0
    sizes = Batches(((0, max(1, training.global_batch_tokens)),))
    for i, change in enumerate(training.batch_steps):
        key = f"training.batch_steps[{i}]"
        found += at_least(key, change, 0, "step", "tokens") + at_least(key, change, 1, "global_batch_tokens")
        if (change.step > 0) == (change.tokens > 0):
            rule, advice = "must have either a step or tokens", "give the first step with this batch, such as step: 101"
            found.append(Problem(key, None, rule, advice))
        if found:
            return found
        first = change.step - 1 if change.step else sizes.steps_for(change.tokens)
        if first <= before:
            rule = (
                f"begins at step {first + 1}, which must come after step {before + 1}, where the batch before it begins"
            )
            found.append(Problem(key, None, rule, f"try step: {before + 2}"))
            return found
        sizes, before = Batches((*sizes.phases, (first, change.global_batch_tokens))), first
    return found
