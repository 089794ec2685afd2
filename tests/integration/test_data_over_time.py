"""A run with stages of the mixture and best fit: resumed on another layout, with a later stage that was another one before."""

import json
from pathlib import Path

import pytest

from support.training import records, run

SETTINGS = (
    "experiment=quickstart",
    "model.num_layers=2",
    "training.steps=6",
    "training.global_batch_tokens=1024",
    "training.micro_batch_size=2",
    "data.sequence_length=256",
    "data.packing=best_fit",
    "evaluation.rows=4",
    "evaluation.at_start=false",
)
FIRST = "{from_step:3,weights:{python:1}}"
BOTH = f"data.stages=[{FIRST},{{from_tokens:4096,weights:{{english:3,python:1}}}}]"
EXACT = ("step", "tokens", "labels_by_source", "tokens_by_source", "epochs_by_source", "padding_share", "stream")


def test_resumed_on_another_layout_with_another_later_stage(corpus: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = (*SETTINGS, f"data.path={corpus}", f"data.index_path={tmp_path}")
    done = run("ssa_pretrain.train", *common, BOTH, f"output_dir={whole}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "best fit: " in done.stdout and "; built the index " in done.stdout
    assert "stage 3 of the mixture begins with step 5: english 3, python 1" in done.stderr
    assert done.stderr.splitlines()[-4].split() == ["source", "tokens", "share", "epochs", "loss"]
    half = (*common, f"data.stages=[{FIRST},{{from_step:6,weights:{{python:1}}}}]", f"output_dir={parts}")
    assert run("ssa_pretrain.train", *half, "parallel=tp2", "training.stop_at_step=4", processes=2).returncode == 0
    done = run("ssa_pretrain.train", *common, BOTH, f"output_dir={parts}")
    assert done.returncode == 0 and "resuming after step 4" in done.stdout, done.stderr[-3000:]
    found, wanted = records(parts, "train"), records(whole, "train")
    assert [record["step"] for record in found] == list(range(1, 7))
    for one, other in zip(found, wanted, strict=True):
        assert {key: one.get(key) for key in EXACT} == {key: other.get(key) for key in EXACT}
        assert one["cross_entropy_by_source"] == pytest.approx(other["cross_entropy_by_source"], rel=1e-5)
        labels = one["labels_by_source"]
        mean = sum(one["cross_entropy_by_source"][name] * count for name, count in labels.items()) / sum(
            labels.values()
        )
        assert mean == pytest.approx(one["cross_entropy"], rel=1e-6)
    assert [sorted(record["labels_by_source"]) for record in wanted[2:4]] == [["python"]] * 2
    assert all(record["padding_share"] > 0 for record in wanted if "padding_share" in record)
    last = wanted[-1]
    listing = json.loads(next(tmp_path.glob("packing/*/index.json")).read_text())
    rows = {part["name"]: part["rows"] for part in listing["parts"]}
    read = {name: round(epochs * rows[name]) for name, epochs in last["epochs_by_source"].items()}
    assert sum(read.values()) == 6 * 4, "four rows per step"
    assert 0.9 * last["tokens"] < sum(last["tokens_by_source"].values()) <= last["tokens"]
