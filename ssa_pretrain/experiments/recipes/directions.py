"""Directions: the weight of the alignment, and what happens if only one of its two directions is trained."""

from ssa_pretrain.experiments.measures import (
    FULL,
    GAP,
    LOSS_VARIANCE,
    MASS,
    NORM_VARIANCE,
    SPARSE,
    SPIKES,
    over_training,
)
from ssa_pretrain.experiments.recipe import Claim, Comparison, Panel, Recipe, Setting, Table, below
from ssa_pretrain.experiments.sizes import Size

WEIGHTS = (0, 1, 3, 20)  # besides the usual 10
ONE_WAY = {"sparsity_only": "attention.commitment_weight=0", "commitment_only": "attention.sparsity_weight=0"}


def recipe(size: Size) -> Recipe:
    """Returns the recipe; alpha = 10 in both directions is the setting `ssa`."""
    weights = [size.ssa(f"alpha_{w}", f"attention.alignment_weight={w}") for w in WEIGHTS]
    one_way: list[Setting] = [size.ssa(name, override) for name, override in ONE_WAY.items()]
    names = [setting.name for setting in one_way]
    return Recipe(
        name="directions",
        title="The alignment's weight and directions",
        about="ssa with alignment weights of 0 to 20 in both directions, and with one direction only (sparsity: full learns from sparse; commitment: sparse "
        "learns from full) at the usual weight of 10. The paper says that one-way alignment is unstable. Stability is the variance of the logarithm of the "
        "gradient norm, and of the training cross entropy around its running mean, over the last half of the steps.",
        settings=[size.method("ssa"), *weights, *one_way],
        tables=[
            Table("At the end of training", [FULL, SPARSE, GAP, MASS]),
            Table("Stability", [NORM_VARIANCE, LOSS_VARIANCE, SPIKES]),
        ],
        comparisons=[Comparison(name, "ssa", [FULL, SPARSE, MASS]) for name in ("ssa_alpha_0", *names)],
        panels=[
            Panel("Sparse inference", "tokens", "cross entropy, nats", over_training("cross_entropy", "sparse")),
            Panel("Captured mass", "tokens", "share, full mode", over_training("captured_mass", "full")),
        ],
        claims=[
            Claim(
                "one-way alignment is unstable: its gradient norm varies more than with both directions",
                [below(NORM_VARIANCE, "ssa", name) for name in names],
            ),
            Claim("one-way alignment's loss varies more", [below(LOSS_VARIANCE, "ssa", name) for name in names]),
            Claim("both directions are not worse than one, in either mode", _no_worse(names)),
            Claim("the alignment helps: 10 is below 0 in sparse mode", [below(SPARSE, "ssa", "ssa_alpha_0")]),
        ],
    )


def _no_worse(names: list[str]) -> list:
    return [below(measure, "ssa", name, 0.01) for measure in (FULL, SPARSE) for name in names]
