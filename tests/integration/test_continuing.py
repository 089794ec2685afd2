"""Rerunning a command continues the run, or finds nothing left to do and changes nothing. Trains in this process, on real data."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from ssa_pretrain.cli import resolve_config
from ssa_pretrain.config.machine import this_machine
from ssa_pretrain.errors import CheckpointError
from ssa_pretrain.trainer import train
from support.training import records

SETTINGS = (
    "experiment=quickstart",
    "model.num_layers=2",
    "precision=fp32",
    "training.steps=4",
    "training.global_batch_tokens=512",
    "training.micro_batch_size=1",
    "data.sequence_length=128",
    "evaluation.rows=4",
    "evaluation.interval=2",
    "evaluation.at_start=false",
)


@pytest.fixture
def run(corpus, tmp_path, monkeypatch):
    """Returns a function that trains in its own folder with the settings and further overrides."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def trained(*overrides: str, folder: str = "run") -> Path:
        arguments = [*SETTINGS, f"data.path={corpus}", f"output_dir={tmp_path / folder}", *overrides]
        train(resolve_config("train", arguments, this_machine()))
        return tmp_path / folder

    return trained


def contents(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_rerun_of_a_finished_run_reports_it_and_changes_nothing(run, capsys):
    folder = run("logging.timestamps=time", "checkpoint.interval=2")
    lines = capsys.readouterr().err.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines), lines
    lines = [line[9:] for line in lines]
    saved = [line for line in lines if line.startswith("saved step ")]
    assert [re.sub(r"[\d.]+ s", "S", line) for line in saved] == [
        f"saved step {step}: stalled training S, written in S  {folder}/checkpoints/step_{step:08d}" for step in (2, 4)
    ]
    assert re.fullmatch(r"done: step 4/4, 2\.05k tokens, \d+s", lines[-1])
    before = contents(folder)
    at = f"{folder} is finished at step 4, and"
    for overrides, reason in (
        ((), f"{at} training.steps=4"),
        (("training.steps=3",), f"{at} training.steps=3"),
        (("training.steps=0", "training.total_tokens=1024"), f"{at} training.total_tokens=1024 (2 steps)"),
        (("training.steps=8", "training.stop_at_step=4"), f"{folder} is at step 4, and training.stop_at_step=4"),
        (("training.steps=8", "training.stop_at_step=3"), f"{folder} is at step 4, and training.stop_at_step=3"),
    ):
        run(*overrides, "logging.wandb.mode=offline")
        printed = capsys.readouterr()
        assert printed.out == f"{reason} is reached: nothing was changed; a larger value continues the run\n"
        assert printed.err == ""
        assert contents(folder) == before, overrides


def test_run_without_its_last_evaluation_is_not_finished(run, capsys):
    """As after a signal at the last step, which leaves the checkpoint but no evaluation."""
    folder = run()
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if json.loads(line)["step"] < 4 or '"train"' in line))
    run()
    assert [(r["step"], r["mode"]) for r in records(folder, "evaluation")] == [
        (step, mode) for step in (2, 4) for mode in ("full", "sparse")
    ]
    assert metrics.read_text().splitlines(keepends=True)[:6] == lines[:6]
    assert "nothing was changed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "attention",
    [
        ("attention=full",),
        ("attention.full_ratio=0",),
        ("attention.stream_draw=step", "seed=3", "attention.counterpart_share=0.3"),
    ],
)
def test_micro_batch_size_may_change_if_no_draw_depends_on_it(run, attention):
    whole = run(*attention, folder="whole")
    run(*attention, "training.stop_at_step=2")
    folder = run(*attention, "training.micro_batch_size=4")
    found, wanted = records(folder, "train"), records(whole, "train")
    assert len(found) == len(wanted) == 4
    for one, other in zip(found, wanted, strict=True):
        for key in ("loss", "cross_entropy", "alignment_loss", "captured_mass", "grad_norm"):
            near = other[key] if other[key] is None else pytest.approx(other[key], rel=1e-5, abs=1e-9)
            assert one[key] == near, (one["step"], key)
        assert one["stream"] == other["stream"]


def test_micro_batch_size_may_not_change_if_a_draw_depends_on_it(run):
    run("attention.full_ratio=0.5", "training.stop_at_step=1")
    with pytest.raises(CheckpointError) as caught:
        run("attention.full_ratio=0.5", "training.micro_batch_size=2", "seed=8")
    assert str(caught.value).endswith(
        "\n  seed: checkpoint 1234, run 8"
        "\n  training.micro_batch_size: checkpoint 1, run 2 (each microbatch draws its streams at attention.full_ratio=0.5, "
        "so other microbatches would draw other streams)"
    )
