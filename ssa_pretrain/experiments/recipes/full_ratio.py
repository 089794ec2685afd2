"""Full ratio: the probability p that full attention is the main stream."""

from ssa_pretrain.experiments.measures import FULL, GAP, MASS, SPARSE, over_training
from ssa_pretrain.experiments.recipe import Claim, Comparison, Panel, Recipe, Table, below
from ssa_pretrain.experiments.sizes import Size

RATIOS = (0, 0.25, 0.75, 1)  # besides the usual 0.5
MARGIN = 0.01  # nats


def recipe(size: Size) -> Recipe:
    """Returns the recipe; p = 0.5 is the setting `ssa`. At 0 and 1 the other stream is still computed and aligned."""
    ratios = [size.ssa(f"p_{p:g}", f"attention.full_ratio={p}") for p in RATIOS]
    return Recipe(
        name="full_ratio",
        title="The share of microbatches whose main stream is full",
        about="ssa at p = 0, 0.25, 0.5, 0.75 and 1. The paper trains at 0.5, which serves both kinds of inference. "
        f"{MARGIN} nats count as no worse.",
        settings=[size.method("ssa"), *ratios],
        tables=[Table("At the end of training", [FULL, SPARSE, GAP, MASS])],
        comparisons=[Comparison("ssa", setting.name, [FULL, SPARSE]) for setting in ratios],
        panels=[
            Panel("Full inference", "tokens", "cross entropy, nats", over_training("cross_entropy", "full")),
            Panel("Sparse inference", "tokens", "cross entropy, nats", over_training("cross_entropy", "sparse")),
        ],
        claims=[
            Claim("p = 0.5 is not above p = 1 in full mode", [below(FULL, "ssa", "ssa_p_1", MARGIN)]),
            Claim("p = 0.5 is not above p = 0 in sparse mode", [below(SPARSE, "ssa", "ssa_p_0", MARGIN)]),
        ],
    )
