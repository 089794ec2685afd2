"""ssa_pretrain/monitor/spikes.py: spikes of a stream are found at once, other rises and the course of a normal run are not."""

import math
import random

from ssa_pretrain.monitor.spikes import FEWEST, FLOOR, WINDOW, SpikeDetector

THRESHOLD = 8.0  # the setting's default


def filled(detector: SpikeDetector, **means: float) -> SpikeDetector:
    """Returns the detector after a window of values with a deviation of 2% around a mean for each stream."""
    generator = random.Random(0)
    for _ in range(WINDOW):
        assert detector.judge({stream: generator.gauss(mean, 0.02 * mean) for stream, mean in means.items()}) is None
    return detector


def test_stream_is_judged_by_its_own_losses():
    """A sparse loss as high as the full one is a spike, though it is normal for the other stream."""
    detector = filled(SpikeDetector(THRESHOLD), full=6.0, sparse=3.0)
    spike = detector.judge({"sparse": 6.0})
    assert spike is not None and spike.stream == "sparse" and spike.value == 6.0
    assert abs(spike.median - 3.0) < 0.05 and abs(spike.distance * spike.deviation - (6.0 - spike.median)) < 1e-9
    assert detector.judge({"full": 6.0}) is None


def test_tenfold_loss_of_either_stream_is_found_in_the_same_step():
    for stream in ("full", "sparse"):
        detector = filled(SpikeDetector(THRESHOLD), full=2.5, sparse=2.6)
        spike = detector.judge({"full": 2.5, "sparse": 2.6} | {stream: 25.0})
        assert spike is not None and spike.stream == stream


def test_judged_value_is_not_in_its_own_statistics():
    """With it, no value could be far from a window of equal ones by more than sqrt(n) deviations; and the window before it decides alone."""
    detector = SpikeDetector(THRESHOLD)
    for _ in range(FEWEST):
        detector.judge({"full": 1.0})
    spike = detector.judge({"full": 1.0 + 1.01 * THRESHOLD * FLOOR})
    assert spike is not None and (spike.median, spike.deviation) == (1.0, FLOOR)


def test_values_that_are_not_finite_do_not_poison_the_window():
    detector = filled(SpikeDetector(THRESHOLD), full=3.0)
    for bad in (math.nan, math.inf, math.nan):
        assert detector.judge({"full": bad}) is None
    assert all(map(math.isfinite, detector.windows["full"]))
    assert detector.judge({"full": 30.0}) is not None, "the very next spike is found"


def test_too_few_values_are_not_judged():
    detector = SpikeDetector(THRESHOLD)
    for i in range(FEWEST):
        assert detector.judge({"full": 10.0 * (1 + i % 2)}) is None


def test_threshold_of_zero_finds_nothing():
    assert filled(SpikeDetector(0.0), full=3.0).judge({"full": 1e9}) is None


def test_window_follows_a_loss_that_stays_higher():
    detector = filled(SpikeDetector(THRESHOLD), full=2.0)
    flagged = [detector.judge({"full": 4.0}) is not None for _ in range(WINDOW)]
    assert flagged[0] and not any(flagged[WINDOW // 2 + 1 :])


def test_normal_run_raises_no_alarm():
    """20,000 steps that draw their stream: a loss that falls from 10.8 to 2.4, noise of 1.5% (the 78M runs' is 1%) with one tail of twice that."""
    generator, detector, alarms = random.Random(1), SpikeDetector(THRESHOLD), 0
    for step in range(20_000):
        mean = 2.4 + 8.4 / (1.0 + step / 40.0) ** 0.8
        noise = 0.015 * (2.0 if generator.random() < 0.05 else 1.0)
        stream = generator.choice(["full", "sparse"])
        value = (mean + (0.3 if stream == "full" else 0.0)) * (1.0 + generator.gauss(0.0, noise))
        alarms += detector.judge({stream: value}) is not None
    assert alarms == 0
