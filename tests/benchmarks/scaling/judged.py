"""What the results mean: each beside one GPU, the plan and the other variants, and whether it reaches what is required.

The requirements hold for the 1B model on H100s or H200s; on other devices the numbers are printed without a verdict.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from benchmarks.scaling.cases import FULL, ONE_GPU, OTHER_GPU, QUARTER, SSA

# Tokens/s per GPU relative to one GPU's, ssa.
REQUIRED = {
    ("dp2", "8k"): 0.99,
    ("tp2 overlapped", "8k"): 0.86,
    ("cp2", "32k"): 0.90,
    ("dp8", "8k"): 0.95,
    ("tp2 pp2 dp2", "8k"): 0.75,
}
LOSS_TOLERANCE = 4e-3  # bf16 losses of a layout beside one GPU's (docs/results/h200.md)
NO_RANK_WAITS = 0.01  # exposed time of r = 1/4 above that of r = 1, in shares of the step of r = 1
SAME_RATIO = 0.03
PLAN_ERROR = 0.10

Result = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A requirement and what was measured."""

    what: str
    value: float
    limit: float
    is_minimum: bool = False

    @property
    def passed(self) -> bool:
        """Whether the value reaches the limit."""
        return self.value >= self.limit if self.is_minimum else self.value <= self.limit


def measured(results: Sequence[Result]) -> list[Result]:
    """Returns the results of steps."""
    return [r for r in results if "tokens_per_second" in r]


def find(results: Sequence[Result], layout: str, length: str, variant: str) -> Result | None:
    """Returns the result of a layout, None if it was not measured."""
    names = (layout, length, variant)
    return next((r for r in measured(results) if (r["layout"], r["length"], r["variant"]) == names), None)


def relative_speed(results: Sequence[Result], result: Result) -> float | None:
    """Returns tokens/s per GPU relative to one GPU's, None without that. Where both GPUs were measured alone, one GPU's are their mean."""
    alone = [find(results, layout, result["length"], result["variant"]) for layout in (ONE_GPU, OTHER_GPU)]
    speeds = [base["tokens_per_second"] for base in alone if base]
    return result["tokens_per_second"] / mean(speeds) if speeds else None


def over_full(results: Sequence[Result], result: Result) -> float | None:
    """Returns tokens/s relative to full attention in the same layout."""
    full = find(results, result["layout"], result["length"], FULL)
    return result["tokens_per_second"] / full["tokens_per_second"] if full else None


def loss_difference(result: Result, other: Result | None) -> float | None:
    """Returns the largest relative difference of two results' losses."""
    if other is None or "losses" not in result or "losses" not in other:
        return None
    pairs = zip(result["losses"], other["losses"], strict=True)
    return max(abs(a[0] - b[0]) / abs(b[0]) for a, b in pairs)


def plan_errors(result: Result) -> dict[str, float]:
    """Returns the planned peak memory and time of a step over the measured ones, minus 1, where both are known."""
    pairs = {"memory": ("planned_gib", "peak_gib"), "time": ("planned_ms", "ms")}
    known = {what: (result.get(plan), result.get(found)) for what, (plan, found) in pairs.items()}
    return {what: plan / found - 1.0 for what, (plan, found) in known.items() if plan and found}


def checks(results: Sequence[Result]) -> list[Check]:
    """Returns every requirement that the results allow to judge."""
    found = []
    for result in measured(results):
        name, speed = result["case"], relative_speed(results, result)
        limit = REQUIRED.get((result["layout"], result["length"]))
        if limit and speed and result["variant"] == SSA:
            found.append(
                Check(what=f"{name}: tokens/s per GPU over one GPU", value=speed, limit=limit, is_minimum=True)
            )
        base = find(results, ONE_GPU, result["length"], SSA)
        difference = loss_difference(result, base)
        if difference is not None and result is not base:
            found.append(Check(what=f"{name}: losses beside one GPU's", value=difference, limit=LOSS_TOLERANCE))
        if result["variant"] == SSA:
            errors = plan_errors(result).items()
            found += [Check(what=f"{name}: planned {what}", value=abs(off), limit=PLAN_ERROR) for what, off in errors]
        ratio = over_full(results, result)
        base_ratio = over_full(results, base) if base else None
        if result["variant"] == SSA and result is not base and ratio and base_ratio:
            moved = abs(ratio / base_ratio - 1.0)
            found.append(Check(what=f"{name}: ssa over full beside one GPU's", value=moved, limit=SAME_RATIO))
        if result["variant"] == QUARTER and "exposed" in result:
            whole = find(results, result["layout"], result["length"], SSA)
            if whole and "exposed" in whole:
                ours, theirs = (one["exposed"] * one["traced_ms"] for one in (result, whole))
                waits = (ours - theirs) / whole["traced_ms"]
                found.append(Check(what=f"{name}: exposed, r=1/4 minus r=1", value=waits, limit=NO_RANK_WAITS))
    for result in results:
        if "resumed_losses" in result:
            other = {"losses": result["resumed_losses"]}
            difference = loss_difference(result, other) or 0.0
            found.append(Check(what=f"{result['case']}: resumed losses", value=difference, limit=LOSS_TOLERANCE))
        if "difference" in result:
            found.append(
                Check(what="kill -9: losses of steps done twice", value=result["difference"], limit=LOSS_TOLERANCE)
            )
    return found


def has_requirements(results: Sequence[Result], size: str) -> bool:
    """Returns whether the requirements hold for this model and device."""
    names = {r["device"] for r in measured(results)}
    return size.startswith("1b") and bool(names) and all("H100" in name or "H200" in name for name in names)
