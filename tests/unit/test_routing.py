"""The main stream is a pure function of (seed, step, microbatch) with the right odds."""

import itertools
import math

import numpy as np
import pytest

from ssa_pretrain.config import AttentionConfig, Method, StreamDraw
from ssa_pretrain.parallel.routing import counterpart_factors, counterpart_shares, main_stream


def draws(attention: AttentionConfig, seed: int = 1, steps: int = 500, microbatches: int = 8) -> list[str]:
    return [main_stream(attention, seed=seed, step=s, microbatch=m) for s in range(steps) for m in range(microbatches)]


def test_the_draw_is_repeatable_and_follows_the_seed():
    attention = AttentionConfig()
    assert draws(attention) == draws(attention)
    assert draws(attention, seed=2) != draws(attention)


def test_the_draw_never_changes():
    """Runs resume by this sequence; changing it changes the training of every run."""
    first = draws(AttentionConfig(), seed=1234, steps=2)
    assert "".join(name[0] for name in first) == "sfffsfssffssfssf"


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
def test_the_share_of_full_is_full_ratio(ratio):
    share = draws(AttentionConfig(full_ratio=ratio)).count("full") / 4000
    assert abs(share - ratio) <= 4 * (ratio * (1 - ratio) / 4000) ** 0.5


def test_once_a_step_gives_all_microbatches_one_stream():
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


def factors(attention: AttentionConfig, microbatches: int, step: int, seed: int = 1) -> list[float]:
    streams = [main_stream(attention, seed=seed, step=step, microbatch=m) for m in range(microbatches)]
    return counterpart_factors(attention, seed=seed, step=step, streams=streams)


def test_every_microbatch_counts_once_where_the_share_is_one():
    assert all(factors(AttentionConfig(), 8, step) == [1.0] * 8 for step in range(20))
    assert all(factors(AttentionConfig(method=Method.full), 8, step) == [0.0] * 8 for step in range(20))


@pytest.mark.parametrize("microbatches", [1, 3, 8, 30])
@pytest.mark.parametrize(("share", "tilt"), [(0.25, 0.0), (0.125, 0.0), (0.3, 0.0), (0.25, 0.5), (0.5, 0.9)])
def test_the_alignments_gradient_is_unbiased(share, tilt, microbatches):
    """The mean factor of each position over draws is 1, and as many microbatches compute a counterpart as the share and the batch allow."""
    attention, steps = AttentionConfig(counterpart_share=share, counterpart_tilt=tilt), 4000
    found = np.array([factors(attention, microbatches, step) for step in range(steps)])
    standard_error = found.std(axis=0) / steps**0.5
    assert (abs(found.mean(axis=0) - 1) <= 4.5 * standard_error).all()
    counts = (found > 0).sum(axis=1)
    assert abs(counts.mean() - share * microbatches) <= 4.5 * counts.std() / steps**0.5 + 1e-9
    if not tilt:
        assert {*counts} <= {math.floor(share * microbatches), math.ceil(share * microbatches)}


def test_tilted_shares_are_rarer_where_the_sparse_stream_is_the_main_one():
    attention = AttentionConfig(counterpart_share=0.25, counterpart_tilt=0.5)
    assert counterpart_shares(attention) == {"full": 0.375, "sparse": 0.125}
