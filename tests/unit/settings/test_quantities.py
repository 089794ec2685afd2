"""ssa_pretrain/settings/quantities.py: counts and times as short texts."""

import pytest

from ssa_pretrain.settings.quantities import compact, duration


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (950, "950"),
        (999.6, "1.00k"),
        (8192, "8.19k"),
        (16_384_000, "16.4M"),
        (9.996e6, "10.0M"),
        (1e11, "100B"),
        (5e15, "5000T"),
    ],
)
def test_compact(number: float, text: str) -> None:
    assert compact(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0s"), (59.4, "59s"), (59.6, "1m00s"), (248, "4m08s"), (7500, "2h05m"), (273_600, "3d04h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
