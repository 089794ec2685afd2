"""Sparsity: captured mass and entropy of full attention, by layer, over training."""

from ssa_pretrain.experiments.measures import ENTROPY, FULL, MASS, MASS_SPARSE, last_by_layer, over_training
from ssa_pretrain.experiments.recipe import Claim, Comparison, Panel, Recipe, Table, below
from ssa_pretrain.experiments.sizes import METHODS, Size

OTHERS = [name for name in METHODS if name != "ssa"]


def recipe(size: Size) -> Recipe:
    """Returns the recipe. Mass and entropy are measured by the runs themselves, with every held-out evaluation."""
    return Recipe(
        name="sparsity",
        title="Captured mass and entropy",
        about="How much of full attention falls into the chosen blocks, and how spread it is. The paper says that SSA's attention is the sparsest of all "
        "methods. All methods have the same blocks; a method that chooses by other scores captures the mass of the blocks that it chooses.",
        settings=size.methods(),
        tables=[Table("At the end of training", [MASS, MASS_SPARSE, ENTROPY, FULL])],
        comparisons=[Comparison("ssa", name, [MASS, ENTROPY]) for name in OTHERS],
        panels=[
            Panel("Captured mass over training", "tokens", "share, full mode", over_training("captured_mass", "full")),
            Panel("Entropy over training", "tokens", "nats, full mode", over_training("attention_entropy", "full")),
            Panel("Captured mass by layer", "layer", "share", last_by_layer("captured_mass_by_layer", "full")),
            Panel("Entropy by layer", "layer", "nats", last_by_layer("attention_entropy_by_layer", "full")),
        ],
        claims=[
            Claim("ssa has the highest captured mass", [below(MASS, name, "ssa") for name in OTHERS]),
            Claim("ssa has the lowest attention entropy", [below(ENTROPY, "ssa", name) for name in OTHERS]),
        ],
    )
