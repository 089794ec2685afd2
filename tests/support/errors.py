"""Judges low precision: its distance from the exact result is compared with that of a baseline in the same precision.

A constant bound would hold for one processor only: bf16 instructions, the order of sums and fused multiplications differ between machines. They
move both errors alike.
"""

import torch


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Returns the norm of the difference over the norm of the exact result."""
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).norm() / exact.norm())


def require_means_as_near(found: torch.Tensor, baseline: torch.Tensor, exact: torch.Tensor) -> None:
    """Fails unless means, such as losses, are at most twice as far from the exact ones as the baseline's: relative errors, over all means together.

    The error of a mean has either sign and may be small by chance, and a few means do not average that out. So one rounding to bf16 is always
    allowed. Means that are exactly 0 are left out.
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
    """Fails unless `found` is at most `factor` times as far from `exact` as `baseline` is, plus `floor`."""
    own, allowed = relative(found, exact), factor * relative(baseline, exact) + floor
    assert own <= allowed, f"{name}: off by {own:.2e}, and {factor} times the baseline's error is {allowed:.2e}"
