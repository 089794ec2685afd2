"""The streams are pure functions of (seed, step, place in the global batch), with the configured probabilities and in balance."""

import math

import numpy as np
import pytest

from ssa_pretrain.config import AttentionConfig, Method, Score, StreamDraw
from ssa_pretrain.schedule import (
    WINDOW,
    Place,
    counterpart_pairs,
    counterpart_spans,
    drawn_by_microbatch,
    group_size,
    main_stream,
    num_pairs,
    share_drawn,
)

SIZES = (1, 2, 3, 6, 8, 192, 384, 1024)  # microbatches of a global batch


def streams(attention: AttentionConfig, step: int, count: int, seed: int = 1) -> list[str]:
    """Returns the main streams of a step's microbatches."""
    places = (Place(seed=seed, step=step, microbatch=m, num_microbatches=count) for m in range(count))
    return [main_stream(attention, place) for place in places]


def draws(attention: AttentionConfig, seed: int = 1, steps: int = 500, microbatches: int = 8) -> list[str]:
    return [name for step in range(steps) for name in streams(attention, step, microbatches, seed)]


def test_draw_is_repeatable_and_follows_the_seed():
    attention = AttentionConfig()
    assert draws(attention) == draws(attention)
    assert draws(attention, seed=2) != draws(attention)


def test_draw_never_changes():
    """Runs resume by this sequence. Changing it changes the training of every run."""
    first = draws(AttentionConfig(), seed=1234, steps=4, microbatches=6)
    assert "".join(name[0] for name in first) == "ssssffffffssffssffssssff"


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.7])
def test_every_microbatch_is_full_with_probability_equal_to_full_ratio(count, ratio):
    """Each group and each step, over seeds."""
    attention, seeds = AttentionConfig(full_ratio=ratio), 1500
    size = group_size(count)
    for step in (0, 5):
        full = np.zeros(count // size)
        for seed in range(seeds):
            places = (Place(seed=seed, step=step, microbatch=m, num_microbatches=count) for m in range(0, count, size))
            full += [main_stream(attention, place) == "full" for place in places]
        assert abs(full / seeds - ratio).max() <= 4 * (ratio * (1 - ratio) / seeds) ** 0.5


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.7])
def test_steps_have_the_share_to_within_one_group(count, ratio):
    """Each window too. A logging interval of eight steps never sees one stream only, if there is room for both."""
    attention, size = AttentionConfig(full_ratio=ratio), group_size(count)
    groups = count // size
    assert size & (size - 1) == 0 and (count == 1 or groups > 1)
    for window in range(20):
        found = [streams(attention, step, count) for step in range(window * WINDOW, (window + 1) * WINDOW)]
        num_full = [names.count("full") / size for names in found]
        assert {*num_full} <= {math.floor(ratio * groups), math.ceil(ratio * groups)}
        assert abs(sum(num_full) - WINDOW * ratio * groups) < 1
        for names in found:
            assert all(len({*names[i : i + size]}) == 1 for i in range(0, count, size)), "a group has one stream"
    alike = [streams(attention, step, count) for step in range(2 * WINDOW)]
    assert count == 1 or len({tuple(names) for names in alike}) > 1, "not the same microbatches in every step"


@pytest.mark.parametrize(("count", "dp"), [(384, 64), (384, 128), (192, 64), (4096, 512), (1024, 8), (6, 2), (2, 1)])
def test_data_ranks_compute_the_same_stream_at_the_same_time(count, dp):
    for step in range(20):
        names = streams(AttentionConfig(), step, count)
        assert all(len({*names[slot : slot + dp]}) == 1 for slot in range(0, count, dp))


@pytest.mark.parametrize("ratio", [0.0, 1.0])
@pytest.mark.parametrize("draw", StreamDraw)
def test_a_ratio_without_chance_draws_one_stream(ratio, draw):
    attention = AttentionConfig(full_ratio=ratio, stream_draw=draw)
    assert {*draws(attention, steps=50)} == {"full" if ratio else "sparse"}


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_drawing_per_step_gives_all_microbatches_one_stream(ratio):
    attention = AttentionConfig(stream_draw=StreamDraw.step, full_ratio=ratio)
    found = [streams(attention, step, 8) for step in range(2000)]
    assert all(len({*names}) == 1 for names in found)
    share = sum(names[0] == "full" for names in found) / 2000
    assert abs(share - ratio) <= 4 * (ratio * (1 - ratio) / 2000) ** 0.5


@pytest.mark.parametrize(("method", "stream"), [(Method.full, "full"), (Method.moba, "sparse")])
def test_one_stream_methods_never_draw(method, stream):
    assert set(draws(AttentionConfig(method=method), steps=50)) == {stream}


def spans(share: float, step: int, rows: int = 2, length: int = 64, **more) -> list[tuple[int, int]]:
    """Returns the spans of a microbatch; by default its main stream is full as in all others, so that its share is the setting's."""
    place = Place(seed=1, step=step, microbatch=3, num_microbatches=12)
    attention = AttentionConfig(**{"full_ratio": 1.0, "counterpart_share": share, **more})
    return counterpart_spans(attention, place, rows=rows, row_length=length)


def test_every_query_has_a_counterpart_if_the_share_is_one():
    assert all(spans(1.0, step) == [(0, 128)] for step in range(20))
    assert spans(0.0, 0) == [] and spans(1.0, 0, method=Method.full) == []


def test_counterpart_draw_never_changes():
    assert spans(0.25, 7, rows=2, length=64) == [(12, 4), (28, 8), (48, 4), (72, 4), (88, 4), (100, 4), (116, 4)]


@pytest.mark.parametrize("length", [64, 96, 16, 70])
@pytest.mark.parametrize("share", [0.5, 0.25, 0.125, 0.3, 0.05])
def test_each_query_is_drawn_with_probability_equal_to_the_share(share, length):
    """Each row of a step is as close to the share as its chunks allow."""
    steps = 4000
    drawn = np.zeros((steps, 2 * length), dtype=bool)
    for step in range(steps):
        for first, number in spans(share, step, length=length):
            drawn[step, first : first + number] = True
    error = (share * (1 - share) / steps) ** 0.5
    assert abs(drawn.mean(axis=0) - share).max() <= 4.5 * error
    if length % 16 == 0:
        counts = {*drawn.reshape(steps, 2, length).sum(axis=2).ravel()}
        assert counts <= {length // 8 * math.floor(share * 8), length // 8 * math.ceil(share * 8)}


@pytest.mark.parametrize("share", [0.25, 0.125, 0.5, 1.0])
@pytest.mark.parametrize("length", [64, 96, 70])
def test_each_draw_has_the_same_causal_work(share, length):
    """Chunks come in mirrored pairs, so the pairs of (query, earlier key) are the drawn queries times (length - 1) / 2."""
    for step in range(50):
        found = spans(share, step, rows=1, length=length)
        work = sum(sum(range(first, first + number)) for first, number in found)
        assert 2 * work == sum(number for _, number in found) * (length - 1)


@pytest.mark.parametrize(
    ("length", "pairs", "chunk"), [(8192, 8, 512), (16384, 8, 1024), (32768, 16, 1024), (131072, 64, 1024)]
)
def test_long_rows_have_more_chunks_and_not_longer_ones(length, pairs, chunk):
    assert num_pairs(length) == pairs
    found = spans(1 / pairs, 0, rows=1, length=length)
    assert {number for _, number in found} <= {chunk, 2 * chunk}


@pytest.mark.parametrize(("share", "cp"), [(0.25, 2), (0.5, 4), (0.125, 1), (0.5, 2)])
def test_context_ranks_have_equal_numbers_of_pairs(share, cp):
    """Rank i of cp holds the pairs i * 8 / cp ... of a row (parallel/context.py)."""
    for step in range(200):
        pairs = [
            first // 4 for first, number in spans(share, step, rows=1) for first in range(first, first + number, 4)
        ]
        held = [sum(pair * cp // 8 == rank for pair in pairs if pair < 8) for rank in range(cp)]
        assert {*held} == {round(share * 8) // cp}


@pytest.mark.parametrize("share", [0.9, 0.6, 0.5, 0.3, 0.25, 0.125, 0.05])
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
def test_the_two_shares_average_to_the_setting(share, ratio):
    attention = AttentionConfig(counterpart_share=share, full_ratio=ratio)
    full, sparse = (share_drawn(attention, main) for main in ("full", "sparse"))
    assert 0 < sparse <= full <= 1 and ratio * full + (1 - ratio) * sparse == pytest.approx(share)
    assert full == 1.0 or full == pytest.approx(3 * sparse)
    for one in (0.0, 1.0):
        alone = AttentionConfig(counterpart_share=share, full_ratio=one)
        assert share_drawn(alone, "full" if one else "sparse") == pytest.approx(share)


def test_a_share_of_one_draws_all():
    assert {share_drawn(AttentionConfig(full_ratio=p), main) for p in (0.3, 0.5) for main in ("full", "sparse")} == {
        1.0
    }


@pytest.mark.parametrize("share", [0.25, 0.125])
def test_each_query_is_drawn_with_its_streams_probability(share):
    attention, steps, drawn = AttentionConfig(counterpart_share=share), 4000, {"full": [], "sparse": []}
    for step in range(steps):
        place = Place(seed=1, step=step, microbatch=5, num_microbatches=8)
        mask = np.zeros(64, dtype=bool)
        for first, number in counterpart_spans(attention, place, rows=1, row_length=64):
            mask[first : first + number] = True
        drawn[main_stream(attention, place)].append(mask)
    for main, masks in drawn.items():
        expected = share_drawn(attention, main)
        error = (expected * (1 - expected) / len(masks)) ** 0.5
        assert len(masks) > steps / 3 and abs(np.mean(masks, axis=0) - expected).max() <= 4.5 * error


def pairs_of_step(share: float, num_rows: int, step: int, ratio: float) -> tuple[list[int], list[str]]:
    """Returns the pairs that each row of a step draws and the rows' main streams, with one row per microbatch."""
    attention, counts, mains = AttentionConfig(counterpart_share=share, full_ratio=ratio), [], []
    for number in range(num_rows):
        place = Place(seed=5, step=step, microbatch=number, num_microbatches=num_rows)
        counts += counterpart_pairs(attention, place, rows=1, row_length=64)
        mains.append(main_stream(attention, place))
    return counts, mains


@pytest.mark.parametrize("share", [0.3, 0.1, 0.05, 1 / 16, 0.9])
@pytest.mark.parametrize("num_rows", [1, 6, 384, 1000])
@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_the_rows_of_a_stream_have_their_share_to_within_one_pair(share, num_rows, ratio):
    attention = AttentionConfig(counterpart_share=share, full_ratio=ratio)
    for step in range(10):
        counts, mains = pairs_of_step(share, num_rows, step, ratio)
        for main in {*mains}:
            own = [count for count, name in zip(counts, mains, strict=True) if name == main]
            assert abs(sum(own) - 8 * share_drawn(attention, main) * len(own)) < 1 + 1e-9


@pytest.mark.parametrize("share", [0.3, 0.1, 1 / 16])
@pytest.mark.parametrize("dp", [2, 8, 64, 128])
@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_a_data_rank_has_its_share_to_within_one_pair_of_each_stream(share, dp, ratio):
    attention = AttentionConfig(counterpart_share=share, full_ratio=ratio)
    for step in range(10):
        counts, mains = pairs_of_step(share, 384, step, ratio)
        for main in {*mains}:
            own = np.array([count if name == main else 0 for count, name in zip(counts, mains, strict=True)])
            rows = mains[::dp].count(main)
            assert abs(own.reshape(-1, dp).sum(axis=0) - 8 * share_drawn(attention, main) * rows).max() < 1 + 1e-9


@pytest.mark.parametrize(
    ("attention", "setting"),
    [
        ({}, "attention.full_ratio=0.5"),
        ({"full_ratio": 0.125}, "attention.full_ratio=0.125"),
        ({"stream_draw": StreamDraw.step}, None),
        ({"full_ratio": 0.0}, None),
        ({"full_ratio": 1.0}, None),
        ({"full_ratio": 1.0, "counterpart_share": 0.25}, None),
        ({"stream_draw": StreamDraw.step, "counterpart_share": 0.3}, None),
        ({"full_ratio": 1.0, "counterpart_share": 0.0}, None),
        ({"method": Method.full}, None),
        ({"method": Method.moba, "counterpart_share": 0.25}, None),
    ],
)
def test_settings_that_tie_streams_to_microbatches_are_named(attention, setting):
    """Without such settings, a batch of four rows draws the same streams as four, two or one microbatches."""
    config = AttentionConfig(**attention)
    assert drawn_by_microbatch(config) == setting

    def drawn(size: int, seed: int) -> list[tuple]:
        """Returns each row's main stream and its drawn queries."""
        found = []
        for m in range(4 // size):
            place = Place(seed=seed, step=3, microbatch=m, num_microbatches=4 // size)
            queries = [
                first + i
                for first, length in counterpart_spans(config, place, rows=size, row_length=32)
                for i in range(length)
            ]
            rows = [[q - row * 32 for q in queries if q // 32 == row] for row in range(size)]
            found += [(main_stream(config, place), row) for row in rows]
        return found

    alike = all(drawn(1, seed) == drawn(2, seed) == drawn(4, seed) for seed in range(40))
    assert alike is (setting is None)


def test_trained_scorer_has_full_attention_first_and_sparse_attention_then():
    attention = AttentionConfig(method=Method.indexer, score=Score.indexer, full_ratio=0.0, counterpart_share=0.25)
    attention.indexer.warmup_steps = 3
    assert [set(streams(attention, step, 4)) for step in range(5)] == [{"full"}] * 3 + [{"sparse"}] * 2
    assert share_drawn(attention, "full") == 0.75 and share_drawn(attention, "sparse") == 0.25
    for step, share in ((0, 0.75), (4, 0.25)):
        place = Place(seed=1, step=step, microbatch=0, num_microbatches=4)
        drawn = counterpart_spans(attention, place, rows=4, row_length=64)
        assert sum(length for _, length in drawn) == share * 4 * 64
