"""A run with a trained scorer: warm-up, sparse attention, both modes of evaluation, a resume to the bit, an export, and what is refused."""

import pytest

from support.training import records, run, train

pytestmark = pytest.mark.timeout(900)
SETTINGS = (
    "experiment=quickstart",
    "attention=indexer",
    "attention.block_size=16",
    "attention.top_k=4",
    "attention.indexer.warmup_steps=2",
    "model.num_layers=2",
    "training.steps=4",
    "training.global_batch_tokens=1024",
    "training.micro_batch_size=2",
    "data.sequence_length=256",
    "evaluation.rows=4",
    "evaluation.at_start=false",
    "logging.wandb.mode=off",
)


def test_run_trains_resumes_and_is_refused_where_it_must_be(corpus, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    settings = (*SETTINGS, f"data.path={corpus}")
    train(*settings, f"output_dir={whole}")
    train(*settings, f"output_dir={stopped}", "training.stop_at_step=2")
    done = run("ssa_pretrain.train", *settings, f"output_dir={stopped}")
    assert done.returncode == 0 and "resuming after step 2" in done.stdout, done.stderr
    assert "  index " in done.stderr, "the console shows the index loss"
    steps = records(whole, "train")
    assert records(stopped, "train") == steps and records(stopped, "evaluation") == records(whole, "evaluation")
    assert [step["stream"] for step in steps] == ["full", "full", "sparse", "sparse"]
    assert all(len(step["index_loss_by_layer"]) == 2 and step["index_loss"] > 0 for step in steps)
    assert all(step["alignment_loss"] is None and step["loss"] == step["cross_entropy"] for step in steps)
    assert {record["mode"] for record in records(whole, "evaluation")} == {"full", "sparse"}

    changed = run("ssa_pretrain.train", *settings, f"output_dir={whole}", "attention.indexer.heads=2")
    assert changed.returncode == 5 and "attention.indexer" in changed.stderr
    export = run("ssa_pretrain.export", str(whole), f"out={tmp_path / 'export'}", "check=true")
    assert export.returncode == 0 and "checked: relative errors" in export.stdout, export.stderr
