"""Theorem 1 on trained models: the distance of the full stream's output from the sparse one's, against its bound, by layer."""

import statistics
from collections.abc import Callable

from ssa_pretrain.experiments.measures import by_layer, layer_mean
from ssa_pretrain.experiments.recipe import (
    Claim,
    Evaluation,
    Measure,
    Panel,
    Points,
    Recipe,
    Table,
    below,
    within,
)
from ssa_pretrain.experiments.results import RunResult
from ssa_pretrain.experiments.sizes import Size

NAME = "theorem"
SHOWN = (
    "full",
    "moba",
    "indexer",
    "ssa",
)  # nsa adds further branches to the sparse stream, which the theorem does not cover


def recipe(size: Size) -> Recipe:
    """Returns the recipe."""
    rows = f"evaluation.bound_rows={size.observed_rows}"

    def values(key: str) -> Callable[[RunResult], Points]:
        return by_layer(NAME, "full", "bound", f"{key}_by_layer")

    gap, bound, dropped = (
        layer_mean(NAME, "full", head, "bound", f"{key}_by_layer", form=form)
        for head, key, form in (
            ("‖h_full − h_sparse‖", "gap", ".4f"),
            ("bound", "bound", ".4f"),
            ("dropped mass δ", "dropped_mass", ".4f"),
        )
    )
    settings = [size.method(name) for name in SHOWN]
    others = [s.name for s in settings if s.name != "ssa"]
    return Recipe(
        name="theorem",
        title="Theorem 1 on trained models",
        about="For each query and head, ‖h_full − h_sparse‖ ≤ δ (max ‖v‖ over dropped keys + ‖h_sparse‖) with the dropped mass δ. Computed in fp32 from the "
        f"queries, keys and values of {size.observed_rows} held-out rows in full mode, before the gate; means over queries and heads that drop a key.",
        settings=settings,
        evaluations=[Evaluation(NAME, (rows, "evaluation.head_rows=0"), tuple(s.name for s in settings))],
        tables=[Table("Means over layers", [gap, bound, _ratio(), _largest(), dropped])],
        panels=[
            Panel("Distance", "layer", "‖h_full − h_sparse‖", values("gap"), log_y=True),
            Panel("Bound", "layer", "bound", values("bound"), log_y=True),
            Panel("Mean distance / mean bound", "layer", "ratio", lambda run: list(enumerate(_ratios(run), start=1))),
            Panel("Dropped mass", "layer", "δ", values("dropped_mass"), log_y=True),
        ],
        claims=[
            Claim(
                "the bound is respected by every query and head of every layer",
                [within(_violations(), s.name, 0.0) for s in settings],
            ),
            Claim("ssa's streams are closest to each other", [below(gap, "ssa", name) for name in others]),
            Claim("ssa drops the least mass", [below(dropped, "ssa", name) for name in others]),
        ],
    )


def _ratios(run: RunResult) -> list[float]:
    """Returns the mean distance over the mean bound, by layer; 0 for a layer that drops nothing."""
    gaps, bounds = (run.evaluated(NAME, "full", "bound", f"{key}_by_layer") or [] for key in ("gap", "bound"))
    return [gap / bound if bound else 0.0 for gap, bound in zip(gaps, bounds, strict=True)]


def _ratio() -> Measure:
    def value(run: RunResult, step: int) -> float | None:
        ratios = _ratios(run)
        return statistics.fmean(ratios) if ratios else None

    return Measure("distance / bound", value, ".3f")


def _largest() -> Measure:
    def value(run: RunResult, step: int) -> float | None:
        values = run.evaluated(NAME, "full", "bound", "largest_ratio_by_layer")
        return max(values) if values else None

    return Measure("largest distance / bound", value, ".3f")


def _violations() -> Measure:
    return layer_mean(NAME, "full", "share of violations", "bound", "violations_by_layer")
