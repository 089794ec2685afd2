"""The main stream is a pure function of (seed, step, microbatch) with the configured probability."""

import itertools
import math

import numpy as np
import pytest

from ssa_pretrain.config import AttentionConfig, Method, StreamDraw
from ssa_pretrain.schedule import (
    counterpart_factor,
    counterpart_spans,
    drawn_by_microbatch,
    main_stream,
)


def draws(attention: AttentionConfig, seed: int = 1, steps: int = 500, microbatches: int = 8) -> list[str]:
    return [main_stream(attention, seed=seed, step=s, microbatch=m) for s in range(steps) for m in range(microbatches)]


def test_draw_is_repeatable_and_follows_the_seed():
    attention = AttentionConfig()
    assert draws(attention) == draws(attention)
    assert draws(attention, seed=2) != draws(attention)


def test_draw_never_changes():
    """Runs resume by this sequence. Changing it changes the training of every run."""
    first = draws(AttentionConfig(), seed=1234, steps=2)
    assert "".join(name[0] for name in first) == "sfffsfssffssfssf"


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
def test_full_stream_share_equals_full_ratio(ratio):
    share = draws(AttentionConfig(full_ratio=ratio)).count("full") / 4000
    assert abs(share - ratio) <= 4 * (ratio * (1 - ratio) / 4000) ** 0.5


def test_drawing_per_step_gives_all_microbatches_one_stream():
    attention = AttentionConfig(stream_draw=StreamDraw.step)
    for step in range(50):
        assert len({main_stream(attention, seed=1, step=step, microbatch=m) for m in range(8)}) == 1


def test_neighbouring_steps_and_microbatches_are_independent():
    found = [name == "full" for name in draws(AttentionConfig(), steps=2000, microbatches=1)]
    agree = sum(a == b for a, b in itertools.pairwise(found)) / 1999
    assert abs(agree - 0.5) < 4 * (0.25 / 1999) ** 0.5


@pytest.mark.parametrize(("method", "stream"), [(Method.full, "full"), (Method.moba, "sparse")])
def test_one_stream_methods_never_draw(method, stream):
    assert set(draws(AttentionConfig(method=method), steps=50)) == {stream}


def spans(share: float, step: int, rows: int = 2, length: int = 64, **more) -> list[tuple[int, int]]:
    attention = AttentionConfig(counterpart_share=share, **more)
    return counterpart_spans(attention, seed=1, step=step, microbatch=3, rows=rows, row_length=length)


def test_every_query_has_a_counterpart_if_the_share_is_one():
    assert all(spans(1.0, step) == [(0, 128)] for step in range(20))
    assert spans(0.0, 0) == [] and spans(1.0, 0, method=Method.full) == []


@pytest.mark.parametrize("share", [0.5, 0.25, 0.125, 0.3, 0.05])
def test_each_query_is_drawn_with_probability_equal_to_the_share(share):
    """Each row of a step is as close to the share as its chunks allow."""
    steps, drawn = 4000, np.zeros((4000, 128), dtype=bool)
    for step in range(steps):
        for first, length in spans(share, step):
            drawn[step, first : first + length] = True
    error = (share * (1 - share) / steps) ** 0.5
    assert abs(drawn.mean(axis=0) - share).max() <= 4.5 * error
    counts = {*drawn.reshape(steps, 2, 64).sum(axis=2).ravel()}
    assert counts <= {8 * math.floor(share * 8), 8 * math.ceil(share * 8)}


def test_each_draw_has_the_same_causal_work():
    """Chunks come in mirrored pairs, so every draw has the same number of (query, earlier key) pairs per row."""
    work = {sum(sum(range(first, first + length)) for first, length in spans(0.25, step, rows=1)) for step in range(50)}
    assert len(work) == 1


def test_weights_account_for_microbatches_without_a_sample():
    attention = AttentionConfig(counterpart_share=0.05)
    empty = sum(not spans(0.05, step) for step in range(4000)) / 4000
    assert 1 / counterpart_factor(attention, rows=2) == pytest.approx(1 - empty, abs=0.035)
    assert counterpart_factor(AttentionConfig(counterpart_share=0.25), rows=1) == 1.0


@pytest.mark.parametrize(
    ("attention", "setting"),
    [
        ({}, "attention.full_ratio=0.5"),
        ({"full_ratio": 0.125}, "attention.full_ratio=0.125"),
        ({"stream_draw": StreamDraw.step}, None),
        ({"full_ratio": 0.0}, None),
        ({"full_ratio": 1.0}, None),
        ({"full_ratio": 1.0, "counterpart_share": 0.25}, "attention.counterpart_share=0.25"),
        ({"stream_draw": StreamDraw.step, "counterpart_share": 0.25}, "attention.counterpart_share=0.25"),
        ({"full_ratio": 1.0, "counterpart_share": 0.0}, None),
        ({"method": Method.full}, None),
        ({"method": Method.moba, "counterpart_share": 0.25}, None),
    ],
)
def test_settings_that_tie_streams_to_microbatches_are_named(attention, setting):
    """Without such settings, a batch of four rows draws the same streams as four, two or one microbatches."""
    config = AttentionConfig(**attention)
    assert drawn_by_microbatch(config) == setting

    def streams(size: int, seed: int) -> list[tuple]:
        drawn = []
        for m in range(4 // size):
            main = main_stream(config, seed=seed, step=3, microbatch=m)
            spans = counterpart_spans(config, seed=seed, step=3, microbatch=m, rows=size, row_length=32)
            queries = sorted(m * size * 32 + first + i for first, length in spans for i in range(length))
            drawn += [
                (main, [q - row * 32 for q in queries if q // 32 == row]) for row in range(m * size, (m + 1) * size)
            ]
        return drawn

    alike = all(streams(1, seed) == streams(2, seed) == streams(4, seed) for seed in range(40))
    assert alike is (setting is None)
