"""Means and errors over seeds, and the rule by which a claim holds.

*Mean ± standard error* is over seeds: s / sqrt(n) with the sample's standard deviation.

*The rule.* A test has one number per seed, and claims that it is at most a margin. With the mean d, the standard error e and Student's 95% quantile t
for n - 1 degrees of freedom (one-sided),

    d + t e <= margin: it holds.    d - t e > margin: it does not hold.    Else, or with fewer than two seeds, it cannot be told.

So if the truth lies on the other side, a verdict is wrong in at most one of twenty experiments, as far as seeds are normally distributed. A claim with
several tests holds if all hold, and does not hold if one does not. No correction is made for the number of tests.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

# Student's t, one-sided 95%, for 1, 2, 3, ... degrees of freedom.
QUANTILES = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771, 1.761, 1.753)
NORMAL = 1.753  # for more: a little too cautious


class Verdict(StrEnum):
    """What the numbers say about a claim."""

    holds = "holds"
    does_not = "does not hold"
    cannot_be_told = "cannot be told"


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over seeds with its standard error, NaN for one seed."""

    mean: float
    error: float
    count: int

    def text(self, form: str = ".4f", *, signed: bool = False) -> str:
        """Returns "mean ± error", or the mean of one seed."""
        mean = format(self.mean, f"+{form}" if signed else form).replace("-", "−")
        return mean if self.count < 2 else f"{mean} ± {format(self.error, form)}"


def mean_of(values: Sequence[float]) -> Mean | None:
    """Returns the mean and standard error of one number per seed; None without any."""
    if not values:
        return None
    mean = sum(values) / len(values)
    if len(values) < 2 or not math.isfinite(mean):
        return Mean(mean, math.nan, len(values))
    return Mean(mean, statistics.stdev(values) / math.sqrt(len(values)), len(values))


def judge(values: Sequence[float], margin: float) -> Verdict:
    """Returns whether the mean of one number per seed is at most a margin, by the rule above.

    -inf and inf stand for a seed whose number is beyond any bound, such as a run that diverged: they count only if every other number agrees.
    """
    if len(values) < 2 or any(map(math.isnan, values)):
        return Verdict.cannot_be_told
    if not all(map(math.isfinite, values)):
        finite = [value for value in values if math.isfinite(value)]
        if math.inf not in values and all(value <= margin for value in finite):
            return Verdict.holds
        if -math.inf not in values and all(value > margin for value in finite):
            return Verdict.does_not
        return Verdict.cannot_be_told
    found = mean_of(values)
    assert found is not None
    width = quantile(found.count - 1) * found.error
    if found.mean + width <= margin:
        return Verdict.holds
    return Verdict.does_not if found.mean - width > margin else Verdict.cannot_be_told


def combined(verdicts: Sequence[Verdict]) -> Verdict:
    """Returns the verdict on a claim from those on its tests."""
    if Verdict.does_not in verdicts:
        return Verdict.does_not
    if verdicts and all(verdict is Verdict.holds for verdict in verdicts):
        return Verdict.holds
    return Verdict.cannot_be_told


def quantile(degrees: int) -> float:
    """Returns Student's one-sided 95% quantile."""
    return QUANTILES[degrees - 1] if degrees <= len(QUANTILES) else NORMAL
