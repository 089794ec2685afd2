"""Overhead: what a step of each method costs, by part. The paper says that SSA adds 17% over MoBA."""

from ssa_pretrain.experiments.recipe import Recipe
from ssa_pretrain.experiments.sizes import Size


def recipe(size: Size) -> Recipe:
    """Returns the recipe; its tables and claim come only from the benchmarks (overhead_report.py)."""
    return Recipe(
        name="overhead",
        title="The cost of a step, by method and part",
        about="Forward and backward of full, moba, ssa at counterpart shares 1, 1/4 and 1/8, and the other methods, on random tokens with one document "
        "per row. A query reads 16 blocks of 16 keys; under indexer 16 blocks of 128, as in its source. The paper says that SSA adds 17% over MoBA. "
        "Parts are the device's times by kernel, from one profiled run; they leave out idle time.",
        benches=size.benches,
    )
