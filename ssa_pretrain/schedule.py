"""The learning rate as a pure function of the step: linear warm-up, then cosine, linear or constant.

No state: a resumed run asks for its step and gets the uninterrupted run's rate. Stdlib only.
"""

import math
from typing import Protocol

from ssa_pretrain.config import OptimConfig, Schedule


class Length(Protocol):
    """What a schedule must know of a run; `planning.Plan` is one."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole schedule."""
        ...

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps of its warm-up."""
        ...


def learning_rate(step: int, optim: OptimConfig, plan: Length) -> float:
    """Returns the learning rate of an optimizer step.

    With S steps of which W are warm-up, it is lr * (step + 1) / (W + 1) for step < W, lr at step W, and would reach min_lr
    at step S, one past the last: neither the first nor the last step is spent at zero.

    Args:
        step: optimizer steps done before this one; 0 for the first.
        optim: peak, end and shape.
        plan: the run's length.
    """
    if step < plan.warmup_steps:
        return optim.lr * (step + 1) / (plan.warmup_steps + 1)
    if optim.schedule is Schedule.constant:
        return optim.lr
    progress = min(1.0, (step - plan.warmup_steps) / max(1, plan.steps - plan.warmup_steps))
    share = 1.0 - progress if optim.schedule is Schedule.linear else 0.5 * (1.0 + math.cos(math.pi * progress))
    return optim.min_lr + (optim.lr - optim.min_lr) * share


def is_due(step: int, interval: int, last_step: int) -> bool:
    """Returns whether something that happens every `interval` steps (0: never) and after the last step happens after this one."""
    return step == last_step or bool(interval and step % interval == 0)
