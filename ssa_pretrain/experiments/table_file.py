"""A recipe from a file of settings: lines of `NAME key=value ...`, each with the whole configuration of a run (tests/benchmarks/tables/)."""

from collections.abc import Sequence
from pathlib import Path

from ssa_pretrain.errors import UsageError
from ssa_pretrain.experiments.measures import FULL, GAP, MASS, SPARSE, over_training
from ssa_pretrain.experiments.recipe import Comparison, Panel, Recipe, Setting, Table


def recipe_of_file(path: Path) -> Recipe:
    """Returns the recipe of a file. Raises UsageError if a line has no setting, or a name occurs twice."""
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line and not line[0].startswith("#")]
    settings = [Setting(name, tuple(overrides)) for name, *overrides in lines]
    names = [setting.name for setting in settings]
    if not settings or any("=" in name for name in names) or len(set(names)) < len(names):
        raise UsageError(f"{path} must have lines of NAME key=value ..., with different names")
    return Recipe(
        name=path.stem,
        title=f"The settings of {path.name}",
        about="Held-out cross entropy (nats per token) and captured mass.",
        settings=settings,
        tables=[Table("At the end of training", [FULL, SPARSE, GAP, MASS])],
        panels=[
            Panel("Full inference", "tokens", "cross entropy, nats", over_training("cross_entropy", "full")),
            Panel("Sparse inference", "tokens", "cross entropy, nats", over_training("cross_entropy", "sparse")),
        ],
    )


def comparisons(pairs: Sequence[str], names: Sequence[str]) -> list[Comparison]:
    """Returns the differences A-B that a user asks for. Raises UsageError if a name is not a setting's."""
    found = []
    for pair in pairs:
        first, _, second = pair.partition("-")
        if first not in names or second not in names:
            raise UsageError(f"--show {pair} must name two settings of {', '.join(names)}; try {names[0]}-{names[-1]}")
        found.append(Comparison(first, second, [FULL, SPARSE, MASS]))
    return found
