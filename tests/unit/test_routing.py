"""The main stream is a pure function of (seed, step, microbatch) with the right odds."""

import itertools

import pytest

from ssa_pretrain.config import AttentionConfig, Method, StreamDraw
from ssa_pretrain.parallel.routing import main_stream


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
