"""The trainer's arithmetic: slices of an evaluation put together, when things are due."""

import pytest

from ssa_pretrain.engine import EvaluationResult
from ssa_pretrain.trainer import combine, due, mean


def test_slices_weigh_by_labels_and_microbatches():
    first = EvaluationResult(2.0, [1.0, 10.0], [0.5, 0.6], num_labels=300)
    second = EvaluationResult(4.0, [4.0, 40.0], [0.8, 0.9], num_labels=100)
    whole = combine([(first, 2), (second, 1)])
    assert whole.cross_entropy == pytest.approx(2.5)
    assert whole.alignment_by_layer == pytest.approx([2.0, 20.0])
    assert whole.captured_mass_by_layer == pytest.approx([0.6, 0.7])
    assert whole.num_labels == 400


def test_slices_without_a_second_stream_have_no_layers():
    part = EvaluationResult(2.0, [], [], num_labels=1)
    assert combine([(part, 1), (part, 1)]) == EvaluationResult(2.0, [], [], num_labels=2)


@pytest.mark.parametrize(
    ("step", "interval", "expected"), [(10, 5, True), (11, 5, False), (100, 0, True), (99, 0, False)]
)
def test_due_every_interval_and_at_the_end(step, interval, expected):
    assert due(step, interval, last=100) is expected


def test_mean_of_nothing_is_none():
    assert mean([]) is None and mean([1.0, 3.0]) == 2.0
