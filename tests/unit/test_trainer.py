"""Parts of a run without training: combined evaluation slices, schedules, the row order of checkpoints, when a run has finished."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch.distributed as dist

from ssa_pretrain.checkpoint.find import Checkpoint
from ssa_pretrain.config import Batches, Config, Method, Score, WandbMode
from ssa_pretrain.data.batches import collate
from ssa_pretrain.data.rows import Row, TrainingRows
from ssa_pretrain.engine import EvaluationResult
from ssa_pretrain.errors import CheckpointError
from ssa_pretrain.evaluation.held_out import combine_results, mean, num_held_out_microbatches
from ssa_pretrain.planning.flops import row_flops
from ssa_pretrain.resume import find_checkpoint, restore, why_finished
from ssa_pretrain.run import Run, training_rows
from ssa_pretrain.schedule import is_due
from ssa_pretrain.step_records import flops_per_token
from ssa_pretrain.trainer import banner_facts
from support.small_datasets import cut, write_dataset


def make_run(config: Config, folder: Path, *, manifest=None, rows=None) -> Run:
    """Returns a run on a CPU without engine and plan."""
    placement = SimpleNamespace(is_rank_0=True, device=SimpleNamespace(type="cpu"))
    return Run(config, None, placement, manifest, None, rows, None, folder)


def test_slices_are_weighted_by_labels_and_tokens():
    first = EvaluationResult(2.0, [1.0, 10.0], [0.5, 0.6], num_labels=300, num_tokens=320)
    second = EvaluationResult(4.0, [4.0, 40.0], [0.8, 0.9], num_labels=100, num_tokens=160)
    whole = combine_results([first, second])
    assert whole.cross_entropy == pytest.approx(2.5)
    assert whole.alignment_by_layer == pytest.approx([2.0, 20.0])
    assert whole.captured_mass_by_layer == pytest.approx([0.6, 0.7])
    assert (whole.num_labels, whole.num_tokens) == (400, 480)


def test_slices_without_a_second_stream_have_no_layers():
    part = EvaluationResult(2.0, [], [], num_labels=1, num_tokens=2)
    assert combine_results([part, part]) == EvaluationResult(2.0, [], [], num_labels=2, num_tokens=4)


def test_slices_without_labels_have_no_weight():
    empty = EvaluationResult(0.0, [1.0], [0.5], num_labels=0, num_tokens=10)
    assert combine_results([empty, EvaluationResult(2.0, [4.0], [1.0], 20, 20)]).cross_entropy == 2.0
    assert np.isnan(combine_results([empty]).cross_entropy)


@pytest.mark.parametrize(
    ("dp", "pp", "vpp", "size", "rows", "expected"),
    [
        (1, 1, 1, 1, 7, 7),
        (1, 1, 1, 3, 7, 3),
        (3, 1, 1, 2, 7, 6),
        (3, 1, 1, 2, 6, 3),
        (2, 4, 1, 2, 7, 4),
        (2, 4, 2, 2, 7, 8),
    ],
)
def test_microbatches_hold_all_held_out_rows(dp, pp, vpp, size, rows, expected):
    """Every data rank has the same number, in whole rounds of an interleaved pipeline, and no slice is only padding."""
    plan = SimpleNamespace(dp=dp, pp=pp, vpp=vpp)
    found = num_held_out_microbatches(size, plan, rows)
    assert found == expected and found * size >= rows and found % dp == 0
    last_slice = (found - 1) // (2 * dp * pp) * 2 * dp * pp
    assert last_slice * size < rows


def test_checkpoint_keeps_its_row_order(tmp_path, monkeypatch):
    """A checkpoint without the fact was written with order 1. The rows that a run has read and will read do not change."""
    manifest = write_dataset(tmp_path, {"english": cut(3000), "python": cut(700, base=10_000)}, {})
    config = Config()
    config.data.sequence_length, config.data.path = 32, str(tmp_path)
    lines = []

    def restored(changes: dict) -> tuple[list[int], dict]:
        run = make_run(config, tmp_path, manifest=manifest, rows=training_rows(config, manifest))
        run.plan, run.engine = SimpleNamespace(padded_vocab_size=30_016), SimpleNamespace(load=lambda _: None)
        written = run.contract()
        assert written.pop("data.order") == 2
        found = Checkpoint(tmp_path / "step_00000007", 7, written | changes)
        monkeypatch.setattr("ssa_pretrain.resume.newest_checkpoint", lambda *_: found)
        monkeypatch.setattr(Run, "print", lambda _, text: lines.append(text))
        assert restore(run, find_checkpoint(run)) == 7
        assert run.contract() == found.facts, "the next checkpoint passes the order on"
        return [int(run.rows.row(i).tokens[0]) for i in range(40)], found.facts

    def rows(order: int) -> list[int]:
        made = TrainingRows(manifest, sequence_length=32, seed=config.seed, weights={}, order=order)
        return [int(made.row(i).tokens[0]) for i in range(40)]

    assert restored({"data.order": 2})[0] == rows(2)
    assert not [text for text in lines if "order" in text]
    assert restored({})[0] == rows(1) != rows(2)
    assert f"{tmp_path / 'step_00000007'} was written under row order 1: the run keeps it to its end" in lines
    with pytest.raises(CheckpointError, match=r"data\.order: checkpoint 3, run 2"):
        restored({"data.order": 3})


@pytest.mark.parametrize(
    ("step", "interval", "expected"), [(10, 5, True), (11, 5, False), (100, 0, True), (99, 0, False)]
)
def test_interval_is_due_at_multiples_and_at_the_end(step, interval, expected):
    assert is_due(step, interval, last_step=100) is expected


def test_banner_warns_of_blocks_that_cover_the_row(tmp_path):
    plan = SimpleNamespace(
        parameters=1,
        world_size=1,
        tp=1,
        pp=1,
        cp=1,
        dp=1,
        vocab_size=1,
        steps=1,
        total_tokens=1,
        batches=Batches(((0, 1),)),
    )
    found = []
    for length in (256, 272):
        config = Config()
        config.data.sequence_length = length
        run = make_run(config, tmp_path)
        run.plan = plan
        found.append(banner_facts(run).get("warning"))
    assert found[0].startswith("attention.top_k=16 blocks") and found[1] is None


def test_mean_of_nothing_is_none():
    assert mean([]) is None and mean([1.0, 3.0]) == 2.0


def test_flops_of_a_step_depend_on_its_documents():
    config = Config()
    run = SimpleNamespace(config=config, plan=SimpleNamespace(vocab_size=500))
    starts = np.zeros(65, dtype=bool)
    starts[40] = True
    batches = [collate([Row(np.zeros(65, dtype=np.int64), starts)], index=i) for i in range(2)]
    wanted = row_flops(config.model, config.attention, [40, 24], 500).model / 64
    assert flops_per_token(run, batches, 0) == pytest.approx(wanted)
    assert wanted < row_flops(config.model, config.attention, [64], 500).model / 64


def test_flops_of_a_warm_up_have_full_attention():
    config = Config()
    config.attention = replace(config.attention, method=Method.indexer, score=Score.indexer, full_ratio=0.0, top_k=2)
    config.attention.indexer.warmup_steps = 3
    run = SimpleNamespace(config=config, plan=SimpleNamespace(vocab_size=500))
    batches = [collate([Row(np.zeros(65, dtype=np.int64), np.zeros(65, dtype=bool))], index=0)]
    row = row_flops(config.model, config.attention, [64], 500)
    found = [flops_per_token(run, batches, step) for step in (2, 3)]
    always = row.linear + row.logits
    assert found == pytest.approx([3 * (always + s) / 64 for s in (row.full_attention, row.sparse_attention)])
    assert row.sparse_attention < row.full_attention


RECEIVED = {"train": 4, "heldout/full": 4, "heldout/sparse": 4}


@pytest.mark.parametrize(
    ("state", "mode", "owed"),
    [
        (None, WandbMode.online, False),  # no W&B run yet, and a finished run starts none
        (RECEIVED, WandbMode.online, False),
        (RECEIVED | {"train": 3}, WandbMode.offline, True),
        (RECEIVED | {"train": 3}, WandbMode.off, False),
        ({"train": 4, "heldout/full": 4}, WandbMode.online, True),
        ({"train": 4, "heldout/full": 4, "heldout/sparse": 2}, WandbMode.online, True),
        ([], WandbMode.online, False),
    ],
)
def test_run_whose_wandb_lacks_records_is_not_finished(tmp_path, state, mode, owed):
    metrics = [{"kind": "train", "step": step} for step in range(1, 5)]
    metrics += [{"kind": "evaluation", "step": 4, "mode": name} for name in ("full", "sparse")]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))
    if state is not None:
        (tmp_path / "wandb.json").write_text(json.dumps({"id": "x", "received": state}))
    config = Config()
    config.training.steps, config.logging.wandb.mode = 4, mode
    run = make_run(config, tmp_path)
    run.plan = SimpleNamespace(steps=4)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert (why_finished(run, 4) is None) is owed
        config.training.steps = run.plan.steps = 3
        assert why_finished(run, 4) is not None, "a shorter run would send other settings"
    finally:
        dist.destroy_process_group()
