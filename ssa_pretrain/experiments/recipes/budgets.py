"""Budgets: models trained at several numbers of keys per query, evaluated at many, both by blocks per query (S) and by block size (B)."""

from itertools import pairwise

from ssa_pretrain.experiments.measures import FULL, SPARSE, by_evaluation, evaluated
from ssa_pretrain.experiments.recipe import (
    AtMost,
    Claim,
    Evaluation,
    Measure,
    Panel,
    Recipe,
    Setting,
    Table,
    paired,
    within,
)
from ssa_pretrain.experiments.results import RunResult
from ssa_pretrain.experiments.sizes import Size

MARGIN = 0.01  # nats: a rise that counts
BLOCK_SIZES = (16, 32, 64, 128)  # that the kernels take


def recipe(size: Size) -> Recipe:
    """Returns the recipe."""
    by_s = [(float(budget), f"budget_S_{budget}") for budget in size.evaluated_budgets]
    by_b = [(float(size.top_k * b), f"budget_B_{b}") for b in BLOCK_SIZES if size.top_k * b <= size.length]
    evaluations = [
        Evaluation(name, _blocks(size, size.block_size, int(budget) // size.block_size)) for budget, name in by_s
    ] + [Evaluation(name, _blocks(size, int(keys) // size.top_k, size.top_k)) for keys, name in by_b]
    settings = [_trained(size, method, budget) for budget in size.budgets for method in ("moba", "ssa")]
    names = [setting.name for setting in settings]
    return Recipe(
        name="budgets",
        title="Training and inference at different budgets",
        about="Sparse cross entropy of models trained at one number of keys per query and evaluated at another. By S: more or fewer blocks of the trained "
        "size. By B: as many blocks as the smallest budget has, of another size. The paper says that SSA's perplexity changes smoothly with the budget.",
        settings=[size.method("full"), *settings],
        evaluations=evaluations,
        tables=[
            Table("By S: sparse cross entropy at so many keys", [_at(name, f"{x:g}") for x, name in by_s]),
            Table("By B: sparse cross entropy at so many keys", [_at(name, f"{x:g}") for x, name in by_b]),
            Table("With the blocks of training", [FULL, SPARSE]),
        ],
        panels=[
            Panel(
                "By S",
                "keys per query",
                "sparse cross entropy",
                by_evaluation(by_s, "sparse", "cross_entropy"),
                log_x=True,
            ),
            Panel(
                "By B",
                "keys per query",
                "sparse cross entropy",
                by_evaluation(by_b, "sparse", "cross_entropy"),
                log_x=True,
            ),
        ],
        claims=[
            Claim(
                f"smooth in the budget: doubling the keys never raises ssa's cross entropy by more than {MARGIN} nats",
                [
                    within(_largest_rise(points), name, MARGIN)
                    for points in (by_s, by_b)
                    for name in names
                    if "ssa" in name
                ],
            ),
            Claim(
                "at a quarter of the keys, ssa loses less than moba",
                [_loses_less(size)] if size.budget // 4 >= size.block_size else [],
            ),
        ],
    )


def _trained(size: Size, method: str, budget: int) -> Setting:
    """Returns a method trained at a budget; the usual one is the setting that other recipes train."""
    usual = size.method(method)
    if budget == size.budget:
        return usual
    return Setting(f"{method}_{budget}", (*usual.overrides, f"attention.top_k={budget // size.block_size}"))


def _blocks(size: Size, block_size: int, top_k: int) -> tuple[str, ...]:
    blocks = (f"attention.block_size={block_size}", f"attention.top_k={top_k}")
    return (*blocks, "evaluation.head_rows=0", f"evaluation.rows={size.tokens // size.length}")


def _at(name: str, head: str) -> Measure:
    return evaluated(name, "sparse", head, "cross_entropy")


def _largest_rise(points: list[tuple[float, str]]) -> Measure:
    """Returns the largest rise of sparse cross entropy from one budget to the next larger one."""

    def value(run: RunResult, step: int) -> float | None:
        losses = [run.evaluated(name, "sparse", "cross_entropy") for _, name in points]
        if any(loss is None for loss in losses):
            return None
        return max((b - a for a, b in pairwise(losses)), default=0.0)

    return Measure("largest rise from a budget to the next", value)


def _loses_less(size: Size) -> AtMost:
    """Returns the test that ssa loses at most as much as moba at a quarter of the keys that both were trained with."""
    quarter, whole = (f"budget_S_{keys}" for keys in (size.budget // 4, size.budget))

    def lost(run: RunResult) -> float | None:
        few, usual = (run.evaluated(name, "sparse", "cross_entropy") for name in (quarter, whole))
        return None if few is None or usual is None else few - usual

    return paired("loss at a quarter of the keys", lost, "ssa", "moba")
