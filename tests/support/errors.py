"""How tests judge low precision: by its distance from the exact result, beside the distance of another way to compute it in that precision.

A constant would be of one processor: instructions for bf16, the order of sums and fused multiplications differ between machines, and move both
ways' errors alike.
"""

import torch


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of the exact result."""
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).norm() / exact.norm())


def require_means_as_near(found: torch.Tensor, baseline: torch.Tensor, exact: torch.Tensor) -> None:
    """Fail unless losses and other means are at most twice as far from the exact ones as the baseline's, each relative to itself, all taken together.

    A mean's error is of either sign and may be small by chance, which a few of them do not average out: one rounding to bf16 is always allowed. What is
    0 in the exact result is left out.
    """
    counted = exact != 0
    ours, theirs = ((means[counted] / exact[counted]) for means in (found, baseline))
    require_as_near(ours, theirs, torch.ones_like(ours), factor=2.0, floor=2**-9, name="means")


def require_as_near(
    found: torch.Tensor,
    baseline: torch.Tensor,
    exact: torch.Tensor,
    *,
    factor: float,
    floor: float = 0.0,
    name: str = "",
) -> None:
    """Fail unless `found` is at most `factor` times as far from `exact` as `baseline` is, or as near as `floor`."""
    own, allowed = relative(found, exact), factor * relative(baseline, exact) + floor
    assert own <= allowed, f"{name}: off by {own:.2e}, and {factor} times the baseline's error is {allowed:.2e}"
