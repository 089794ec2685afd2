"""The ratios that are reported, and their goals.

The goals hold for the 1B model on one H200 or H100. On other models and devices ratios are printed without them.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A ratio of two variants.

    Attributes:
        label: as in the table.
        over, under: names of the variants, numerator and denominator.
        of: the compared value: "speed" (tokens/s), "memory" (peak) or "time" (ms).
        must, aim: the required ratio and the desired one; None: only reported.
    """

    label: str
    over: str
    under: str
    of: str = "speed"
    must: float | None = None
    aim: float | None = None


GOALS = (
    Goal(label="full over plain megatron-core, 8k", over="full 8k", under="plain 8k", must=1.0, aim=1.05),
    Goal(label="ssa over full, 8k", over="ssa 8k", under="full 8k", must=0.91, aim=0.95),
    Goal(label="ssa over full, 32k", over="ssa 32k", under="full 32k", must=0.93, aim=0.965),
    Goal(label="moba over full, 8k", over="moba 8k", under="full 8k", must=1.15, aim=1.23),
    Goal(label="moba over full, 32k", over="moba 32k", under="full 32k", must=1.7, aim=2.0),
    Goal(label="optimizer's share of a step", over="optimizer", under="ssa step", of="time", must=0.04, aim=0.025),
    Goal(label="peak memory, ssa over full, 8k", over="ssa 8k", under="full 8k", of="memory", must=1.25, aim=1.15),
    Goal(label="short documents over one per row, ssa", over="ssa 8k short", under="ssa 8k", must=1.0, aim=1.1),
    Goal(label="short documents over one per row, full", over="full 8k short", under="full 8k", must=1.0, aim=1.1),
    Goal(label="ssa fp8 over bf16, 8k", over="ssa 8k fp8", under="ssa 8k bf16"),
    Goal(label="full fp8 over bf16, 8k", over="full 8k fp8", under="full 8k bf16"),
    Goal(label="ssa fp8 over full fp8, 8k", over="ssa 8k fp8", under="full 8k fp8"),
    Goal(label="selective recomputation, speed", over="ssa 8k selective", under="ssa 8k none"),
    Goal(label="selective recomputation, memory", over="ssa 8k selective", under="ssa 8k none", of="memory"),
    Goal(label="full recomputation, speed", over="ssa 8k full recompute", under="ssa 8k none"),
    Goal(label="full recomputation, memory", over="ssa 8k full recompute", under="ssa 8k none", of="memory"),
    Goal(label="dp 2 over one GPU, per GPU", over="ssa step dp2", under="ssa step", must=0.95, aim=0.98),
    Goal(label="tp 2 over one GPU, per GPU", over="ssa step tp2", under="ssa step", must=0.80, aim=0.88),
    Goal(label="tp 2 with user buffers over one GPU, per GPU", over="ssa step tp2 overlap", under="ssa step"),
)
SMALLER_IS_BETTER = ("memory", "time")
