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
from ssa_pretrain.experiments.recipe import AtMost, Claim, Comparison, Panel, Recipe, Table, below
from ssa_pretrain.experiments.sizes import Size

WEIGHTS = (1, 3, 10, 20)  # and 0, where directions do not matter
USUAL = 10
ONE_WAY = {"sparsity_only": "attention.commitment_weight=0", "commitment_only": "attention.sparsity_weight=0"}


def recipe(size: Size) -> Recipe:
    """Returns the recipe; alpha = 10 in both directions is the setting `ssa`."""
    both = [size.ssa(f"alpha_{w}", _weight(w)) for w in (0, *WEIGHTS) if w != USUAL]
    one_way = [size.ssa(_named(name, w), override, _weight(w)) for name, override in ONE_WAY.items() for w in WEIGHTS]
    names = [f"ssa_{_named(name, USUAL)}" for name in ONE_WAY]
    return Recipe(
        name="directions",
        title="The alignment's weight and directions",
        about="ssa with alignment weights of 0 to 20, in both directions and in one only (sparsity: full learns from sparse; commitment: sparse learns from full). "
        "The setting `ssa` has both at 10. The paper says that one-way alignment is unstable. Stability is the variance of the logarithm of the "
        "gradient norm, and of the training cross entropy around its running mean, over the last half of the steps.",
        settings=[size.method("ssa"), *both, *one_way],
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


def _weight(weight: float) -> str:
    return f"attention.alignment_weight={weight}"


def _named(direction: str, weight: float) -> str:
    """Returns a name without the usual weight."""
    return direction if weight == USUAL else f"{direction}_{weight}"


def _no_worse(names: list[str]) -> list[AtMost]:
    return [below(measure, "ssa", name, 0.01) for measure in (FULL, SPARSE) for name in names]
