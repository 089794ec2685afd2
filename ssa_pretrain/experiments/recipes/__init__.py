"""The recipes by name: a function of the size each. A recipe is a file here and a line in RECIPES."""

from collections.abc import Callable

from ssa_pretrain.experiments.recipe import Recipe
from ssa_pretrain.experiments.recipes import (
    budgets,
    directions,
    full_ratio,
    length,
    overhead,
    selection,
    sparsity,
    switching,
    theorem,
)
from ssa_pretrain.experiments.sizes import Size

RECIPES: dict[str, Callable[[Size], Recipe]] = {
    "overhead": overhead.recipe,
    "sparsity": sparsity.recipe,
    "switching": switching.recipe,
    "budgets": budgets.recipe,
    "directions": directions.recipe,
    "full_ratio": full_ratio.recipe,
    "length": length.recipe,
    "selection": selection.recipe,
    "theorem": theorem.recipe,
}
