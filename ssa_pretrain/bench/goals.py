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


STEP_GOALS = (
    Goal(label="full over plain megatron-core, 8k", over="full 8k", under="plain 8k", must=1.0, aim=1.05),
    Goal(
        label="full over plain megatron-core, 8k, gradient accumulation fused in neither",
        over="full 8k unfused",
        under="plain 8k",
    ),
    Goal(label="ssa over full, 8k", over="ssa 8k", under="full 8k", must=0.93, aim=0.95),
    Goal(label="ssa over full, 32k", over="ssa 32k", under="full 32k", must=0.96, aim=0.97),
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
    Goal(label="indexer over full, 8k", over="indexer 8k sparse", under="full 8k"),
    Goal(label="indexer in its warm-up over full, 8k", over="indexer 8k warm-up", under="full 8k"),
    Goal(label="ssa with a trained scorer over ssa, 8k", over="ssa with indexer 8k", under="ssa 8k"),
    Goal(label="QK-norm, speed", over="ssa 8k QK-norm", under="ssa 8k plain keys"),
    Goal(label="QK-norm, memory", over="ssa 8k QK-norm", under="ssa 8k plain keys", of="memory"),
    Goal(label="key convolution, speed", over="ssa 8k key convolution", under="ssa 8k plain keys"),
    Goal(label="key convolution, memory", over="ssa 8k key convolution", under="ssa 8k plain keys", of="memory"),
    Goal(label="dp 2 over one GPU, per GPU", over="ssa step dp2", under="ssa step", must=0.95, aim=0.98),
    Goal(label="tp 2 over one GPU, per GPU", over="ssa step tp2", under="ssa step", must=0.80, aim=0.88),
    Goal(label="tp 2 with user buffers over one GPU, per GPU", over="ssa step tp2 overlap", under="ssa step"),
)
SHARE_GOALS = {
    "8k": {"1": (0.93, 0.95), "1/4": (1.05, 1.08), "1/8": (1.07, 1.10)},
    "32k": {"1": (0.96, 0.97), "1/4": (1.20, 1.25), "1/8": (1.26, 1.31)},
    "128k": {"1": None, "1/4": None},
    "8k short": {"1": None, "1/4": None},
    "8k real": {"1": None, "1/4": None},
    "32k real": {"1": None, "1/4": None},
}  # (must, aim) by rows and share


def _share_goals() -> list[Goal]:
    """Returns the ratios over full attention of ssa at each share, and of moba."""
    found = []
    for rows, goals in SHARE_GOALS.items():
        full = f"share full {rows}"
        for share, limits in goals.items():
            must, aim = limits or (None, None)
            name = f"ssa r={share}"
            found.append(
                Goal(label=f"{name} over full, {rows}", over=f"share {name} {rows}", under=full, must=must, aim=aim)
            )
        found.append(Goal(label=f"moba over full beside them, {rows}", over=f"share moba {rows}", under=full))
    return found


GOALS = (*STEP_GOALS, *_share_goals())
SMALLER_IS_BETTER = ("memory", "time")
