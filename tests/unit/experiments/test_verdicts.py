"""The rule of ssa_pretrain/experiments/verdicts.py: means, errors, quantiles, and what may be said."""

import math
import random

import pytest

from ssa_pretrain.experiments.verdicts import QUANTILES, Verdict, combined, judge, mean_of, quantile


def test_mean_and_standard_error() -> None:
    found = mean_of([1.0, 2.0, 4.0])
    assert found is not None
    assert found.mean == pytest.approx(7 / 3) and found.error == pytest.approx(math.sqrt(7 / 3) / math.sqrt(3))
    assert found.text(".2f") == "2.33 ± 0.88" and found.text(".1f", signed=True) == "+2.3 ± 0.9"
    one = mean_of([-0.5])
    assert one is not None and one.text(".2f") == "−0.50" and mean_of([]) is None


def test_quantiles_are_students() -> None:
    """By integrating the density, which has no closed form for the quantile."""
    for degrees in (1, 2, 3, 7, 15):
        t, steps = QUANTILES[degrees - 1], 20_000
        scale = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
        xs = [(i + 0.5) * t / steps for i in range(steps)]
        inside = sum(scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2) for x in xs) * t / steps
        assert 0.5 + inside == pytest.approx(0.95, abs=5e-5)
    assert quantile(100) == QUANTILES[-1]


@pytest.mark.parametrize(
    ("values", "margin", "verdict"),
    [
        ([-0.10, -0.11, -0.12], 0.0, Verdict.holds),
        ([0.10, 0.11, 0.12], 0.0, Verdict.does_not),
        ([0.002, 0.004, 0.003], 0.01, Verdict.holds),
        ([-0.1, 0.1, -0.1], 0.0, Verdict.cannot_be_told),
        ([-0.1], 0.0, Verdict.cannot_be_told),
        ([], 0.0, Verdict.cannot_be_told),
        ([0.0, 0.0], 0.0, Verdict.holds),
        ([-math.inf, -0.1, -0.2], 0.0, Verdict.holds),
        ([math.inf, 0.1], 0.0, Verdict.does_not),
        ([-math.inf, 0.1], 0.0, Verdict.cannot_be_told),
        ([-math.inf, math.inf], 0.0, Verdict.cannot_be_told),
        ([math.nan, 0.1], 0.0, Verdict.cannot_be_told),
    ],
)
def test_judge(values, margin, verdict) -> None:
    assert judge(values, margin) is verdict


def test_wrong_verdicts_are_rare_where_the_truth_is_at_the_margin() -> None:
    draw = random.Random(0)
    found = [judge([draw.gauss(0, 1) for _ in range(3)], 0.0) for _ in range(4000)]
    for verdict in (Verdict.holds, Verdict.does_not):
        assert found.count(verdict) / len(found) == pytest.approx(0.05, abs=0.012)  # 3.5 standard deviations


def test_combined() -> None:
    holds, does_not, unknown = Verdict.holds, Verdict.does_not, Verdict.cannot_be_told
    assert combined([holds, holds]) is holds and combined([holds, unknown]) is unknown
    assert combined([unknown, does_not, holds]) is does_not and combined([]) is unknown
