"""The trainer's arithmetic: slices of an evaluation put together, when things are due."""

from types import SimpleNamespace

import numpy as np
import pytest

from ssa_pretrain.config import Config
from ssa_pretrain.data.batches import collate
from ssa_pretrain.data.rows import Row
from ssa_pretrain.engine import EvaluationResult
from ssa_pretrain.flops import row_flops
from ssa_pretrain.trainer import combine, due, flops_per_token, mean, start_reporting


def test_slices_weigh_by_labels_and_tokens():
    first = EvaluationResult(2.0, [1.0, 10.0], [0.5, 0.6], num_labels=300, num_tokens=320)
    second = EvaluationResult(4.0, [4.0, 40.0], [0.8, 0.9], num_labels=100, num_tokens=160)
    whole = combine([first, second])
    assert whole.cross_entropy == pytest.approx(2.5)
    assert whole.alignment_by_layer == pytest.approx([2.0, 20.0])
    assert whole.captured_mass_by_layer == pytest.approx([0.6, 0.7])
    assert (whole.num_labels, whole.num_tokens) == (400, 480)


def test_slices_without_a_second_stream_have_no_layers():
    part = EvaluationResult(2.0, [], [], num_labels=1, num_tokens=2)
    assert combine([part, part]) == EvaluationResult(2.0, [], [], num_labels=2, num_tokens=4)


@pytest.mark.parametrize(
    ("step", "interval", "expected"), [(10, 5, True), (11, 5, False), (100, 0, True), (99, 0, False)]
)
def test_due_every_interval_and_at_the_end(step, interval, expected):
    assert due(step, interval, last=100) is expected


def test_a_run_s_banner_warns_of_blocks_that_cover_the_row(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("ssa_pretrain.trainer.start_tracking", lambda *_, **__: None)
    for length in (256, 272):
        config = Config()
        config.data.sequence_length = length
        plan = SimpleNamespace(
            parameters=1, world_size=1, tp=1, pp=1, cp=1, dp=1, vocab_size=1, steps=1, tokens_per_step=1, total_tokens=1
        )
        placement = SimpleNamespace(device=SimpleNamespace(type="cpu"))
        run = SimpleNamespace(config=config, plan=plan, placement=placement, folder=tmp_path)
        start_reporting(run, SimpleNamespace(say=said.append), 0)
    assert "\nwarning  attention.top_k=16 blocks" in said[0] and "warning" not in said[1]


def test_mean_of_nothing_is_none():
    assert mean([]) is None and mean([1.0, 3.0]) == 2.0


def test_a_step_is_counted_by_its_documents():
    config = Config()
    run = SimpleNamespace(config=config, plan=SimpleNamespace(vocab_size=500))
    starts = np.zeros(65, dtype=bool)
    starts[40] = True
    batches = [collate([Row(np.zeros(65, dtype=np.int64), starts)], index=i) for i in range(2)]
    wanted = row_flops(config.model, config.attention, [40, 24], 500).model / 64
    assert flops_per_token(run, batches) == pytest.approx(wanted)
    assert wanted < row_flops(config.model, config.attention, [64], 500).model / 64
