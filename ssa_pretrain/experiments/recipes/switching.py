"""Switching: every method's model under full and under sparse inference."""

from ssa_pretrain.experiments.measures import FULL, GAP, MASS, SPARSE, over_training
from ssa_pretrain.experiments.recipe import AtMost, Claim, Comparison, Measure, Panel, Recipe, Table, below
from ssa_pretrain.experiments.results import RunResult
from ssa_pretrain.experiments.sizes import METHODS, Size

MARGIN = 0.01  # nats, 1% of perplexity: what counts as no worse
OTHERS = [name for name in METHODS if name != "ssa"]


def recipe(size: Size) -> Recipe:
    """Returns the recipe. Both modes are measured by the runs themselves."""
    return Recipe(
        name="switching",
        title="Full and sparse inference of each model",
        about="Held-out cross entropy (nats per token) under both kinds of inference, with the blocks of training. The paper says that SSA's sparse mode is "
        f"better than MoBA's and its full mode as good as full attention's. {MARGIN} nats, 1% of perplexity, count as no worse.",
        settings=size.methods(),
        tables=[Table("At the end of training", [FULL, SPARSE, GAP, MASS])],
        comparisons=[Comparison("ssa", name, [FULL, SPARSE]) for name in OTHERS],
        panels=[
            Panel("Full inference", "tokens", "cross entropy, nats", over_training("cross_entropy", "full")),
            Panel("Sparse inference", "tokens", "cross entropy, nats", over_training("cross_entropy", "sparse")),
        ],
        claims=[
            Claim("ssa's sparse perplexity is below moba's", [below(SPARSE, "ssa", "moba")]),
            Claim("ssa's full mode is not above full attention's", [below(FULL, "ssa", "full", MARGIN)]),
            Claim("ssa loses less than moba and full when the mode is switched", _switched()),
        ],
    )


def _switched() -> list[AtMost]:
    """Returns the tests: the worse mode of ssa is not above the worse mode of the other models."""

    def worse(run: RunResult, step: int) -> float | None:
        values = [run.metric("cross_entropy", mode, step) for mode in ("full", "sparse")]
        known = [value for value in values if value is not None]
        return max(known) if len(known) == 2 else None

    return [below(Measure("worse mode", worse), "ssa", name) for name in ("moba", "full")]
