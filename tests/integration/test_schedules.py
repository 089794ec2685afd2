"""What changes over a run: steps of the batch, branches with a new schedule, the running mean of the weights, and model soups. In this process."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ssa_pretrain.average import average_checkpoints
from ssa_pretrain.checkpoint.weights import WeightsReader
from ssa_pretrain.cli import resolve_config
from ssa_pretrain.config.machine import this_machine
from ssa_pretrain.data.batches import Packing
from ssa_pretrain.errors import CheckpointError, UsageError, WeightsError
from ssa_pretrain.evaluate import evaluate_run
from ssa_pretrain.export import export_run
from ssa_pretrain.saved_run import expand, named_checkpoint
from ssa_pretrain.trainer import train
from support.training import records

SETTINGS = (
    "experiment=quickstart",
    "model.num_layers=2",
    "precision=fp32",
    "training.steps=4",
    "training.global_batch_tokens=256",
    "training.micro_batch_size=1",
    "data.sequence_length=128",
    "evaluation.rows=4",
    "evaluation.at_start=false",
    "optim.warmup_fraction=0",
    "checkpoint.interval=1",
    "checkpoint.keep=9",
)
GROWING = "training.batch_steps=[{step:3,global_batch_tokens:512}]"
VALUES = ("loss", "cross_entropy", "alignment_loss", "captured_mass", "grad_norm")
Trained = Callable[..., Path]


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Trained:
    """Returns a function that trains in its own folder with the settings and further overrides."""
    place = tmp_path_factory.mktemp("schedules")

    def trained(*overrides: str, folder: str) -> Path:
        arguments = [*SETTINGS, f"data.path={corpus}", f"output_dir={place / folder}", *overrides]
        train(resolve_config("train", arguments, this_machine()))
        return place / folder

    return trained


@pytest.fixture(scope="module")
def stable(run) -> Path:
    """A run at a constant rate that keeps the running mean of its weights."""
    return run("optim.schedule=constant", "optim.ema_decay=0.15", "evaluation.ema=true", folder="stable")


@pytest.fixture(scope="module")
def growing(run) -> Path:
    return run(GROWING, folder="growing")


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step_{step:08d}"


def facts(folder: Path, step: int) -> dict:
    return json.loads((checkpoint(folder, step) / "checkpoint.json").read_text())["facts"]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    reader = WeightsReader(folder)
    return {name: reader.read(name).double() for name in reader.tensors}


def test_batch_grows_without_leaving_or_repeating_a_row(run, growing, monkeypatch):
    found = records(growing, "train")
    assert [(r["tokens"], r["batch_tokens"]) for r in found] == [(256, 256), (512, 256), (1024, 512), (1536, 512)]
    numbers, plain = [], Packing.microbatch

    def microbatch(self, rows, number, *, index):
        numbers.append(number)
        return plain(self, rows, number, index=index)

    with monkeypatch.context() as patch:
        patch.setattr(Packing, "microbatch", microbatch)
        again = run(GROWING, "evaluation.rows=1", "training.stop_at_step=3", folder="growing_resumed")
        run(GROWING, "evaluation.rows=1", folder="growing_resumed")
    assert [n for i, n in enumerate(numbers) if n not in numbers[:i]] == list(range(12))
    assert records(again, "train") == found, "a resume between changes is exact"


def test_changes_of_the_batch_that_are_done_cannot_be_taken_back(run, growing):
    with pytest.raises(CheckpointError, match=r"training\.batch_steps: checkpoint \[\[2, 512\]\], run None"):
        run("training.steps=6", folder=growing.name)


def test_deepspeed_accumulates_as_many_microbatches_as_the_step_has(run, growing):
    pytest.importorskip("deepspeed")
    other = run(GROWING, "engine=deepspeed", "deepspeed.zero_stage=2", "evaluation.rows=1", folder="deepspeed_growing")
    for one, wanted in zip(records(other, "train"), records(growing, "train"), strict=True):
        assert one["tokens"] == wanted["tokens"] and one["stream"] == wanted["stream"]
        assert [one[key] for key in VALUES] == pytest.approx([wanted[key] for key in VALUES], rel=1e-4)


def test_branch_continues_like_the_run_itself(run, stable):
    same = ("optim.schedule=constant", "optim.ema_decay=0.15", "evaluation.ema=true")
    branch = run(*same, f"checkpoint.branch_from={stable}@2", folder="same")
    assert records(branch, "train") == records(stable, "train")[2:]
    assert records(branch, "evaluation") == records(stable, "evaluation")
    (entry,) = facts(branch, 4)["history"]
    assert (entry["from"], entry["step"], entry["changed"]) == (str(checkpoint(stable, 2)), 2, {})


def test_branch_decays_and_resumes_from_its_own_checkpoint(run, stable, capsys):
    decay = (
        f"checkpoint.branch_from={stable}@3",
        "training.steps=6",
        "optim.pieces=[{steps:3,shape:constant},{to:0}]",
        "optim.weight_decay=0.2",
        "training.batch_steps=[{step:4,global_batch_tokens:512}]",
    )
    run(*decay, "training.stop_at_step=4", folder="decay")
    printed = capsys.readouterr().out
    assert f"branching from step 3 of {checkpoint(stable, 3)}" in printed
    assert "optim.weight_decay: 0.1 -> 0.2" in printed and "training.steps: 4 -> 6" in printed
    branch = run(*decay, folder="decay")
    found = records(branch, "train")
    assert [r["step"] for r in found] == [4, 5, 6]
    assert [r["tokens"] for r in found] == [1280, 1792, 2304]
    peak = records(stable, "train")[0]["learning_rate"]
    assert [r["learning_rate"] for r in found] == pytest.approx([peak, peak * 2 / 3, peak / 3])
    assert facts(branch, 6)["history"][0]["changed"]["optim.weight_decay"] == [0.1, 0.2]
    twice = run(*decay[1:4], decay[4], f"checkpoint.branch_from={branch}@5", folder="twice")
    assert [entry["step"] for entry in facts(twice, 6)["history"]] == [3, 5]
    assert records(twice, "train") == found[2:]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("training.steps=4",), "has done 4 steps, and this run ends after step 4"),
        (("model.ffn_hidden_size=64",), "holds another model"),
        (("training.global_batch_tokens=512",), r"batch_steps=\[\{step:5,global_batch_tokens:512\}\]"),
        (("precision=bf16",), "precision.name: checkpoint 'fp32', run 'bf16'"),
    ],
)
def test_branches_that_cannot_be(run, stable, overrides, message):
    with pytest.raises(CheckpointError, match=message):
        run("training.steps=8", f"checkpoint.branch_from={stable}", *overrides, folder="refused")


def test_mean_of_the_weights_is_the_recurrence_of_its_docstring(stable):
    """fp32, step by step from the saved weights; the first weights are not saved, so the recurrence begins at the mean after step 1."""
    mean = tensors(checkpoint(stable, 1) / "ema")
    for step in range(2, 5):
        decay = min(0.15, (1 + step) / (10 + step))
        own = tensors(checkpoint(stable, step) / "weights")
        mean = {name: value + (1 - decay) * (own[name] - value) for name, value in mean.items()}
        saved = tensors(checkpoint(stable, step) / "ema")
        for name, value in mean.items():
            assert (saved[name] - value).norm() <= 1e-6 * value.norm(), (step, name)
            assert not torch.equal(saved[name], own[name])


def test_mean_is_evaluated_in_the_run_by_evaluate_and_by_export(stable, tmp_path):
    by_mode = {r["mode"]: r["cross_entropy"] for r in records(stable, "evaluation")}
    assert list(by_mode) == ["ema_full", "ema_sparse", "full", "sparse"]
    arguments = [str(stable), "evaluation.ema=true", "evaluation.head_rows=0"]
    config = resolve_config("evaluate", expand(arguments, 1)[0], this_machine())
    evaluate_run(config, named_checkpoint(arguments))
    (path,) = (stable / "evaluations").glob("step_00000004_ema_*.json")
    modes = json.loads(path.read_text())["modes"]
    assert {f"ema_{mode}": value["cross_entropy"] for mode, value in modes.items()} == pytest.approx(
        {mode: by_mode[mode] for mode in ("ema_full", "ema_sparse")}, rel=1e-6
    )
    assert not (stable / "evaluation.json").exists(), "the report shows the weights themselves"
    export_run([str(stable), f"out={tmp_path / 'hf'}", "weights=ema", "dtype=fp32", "check=true"])
    assert "running mean" in (tmp_path / "hf" / "README.md").read_text()


def test_mean_can_begin_in_the_middle_and_is_missed_where_there_is_none(run, growing, capsys):
    run(GROWING, "training.steps=5", "optim.ema_decay=0.9", folder=growing.name)
    assert "has no running mean of the weights: it begins here" in capsys.readouterr().out
    with pytest.raises(WeightsError, match=r"step_00000004 has no running mean of the weights"):
        average_checkpoints([f"{growing}@4", f"{growing}@5", f"out={growing}_soup", "ema=true"])


def test_soup_is_the_average_and_starts_a_run(run, stable, tmp_path):
    out = tmp_path / "soup"
    average_checkpoints([f"{stable}@2", f"{stable}@3", str(checkpoint(stable, 4)), f"out={out}", "weights=[1,2,1]"])
    two, three, four = (tensors(checkpoint(stable, step) / "weights") for step in (2, 3, 4))
    for name, found in tensors(checkpoint(out, 4) / "weights").items():
        exact = (two[name] + 2 * three[name] + four[name]) / 4
        assert torch.equal(found, exact.float().double()), name
    made_of = facts(out, 4)["averaged"]
    assert [(entry["step"], entry["share"]) for entry in made_of] == [(2, 0.25), (3, 0.5), (4, 0.25)]
    config = resolve_config("evaluate", expand([str(out), "evaluation.head_rows=0"], 1)[0], this_machine())
    evaluate_run(config)
    from_soup = json.loads((out / "evaluation.json").read_text())["modes"]["full"]["cross_entropy"]
    begun = run(f"checkpoint.init_from={out}", "training.steps=1", "evaluation.at_start=true", folder="from_soup")
    assert records(begun, "evaluation")[0]["cross_entropy"] == pytest.approx(from_soup, rel=1e-6)
    with pytest.raises(CheckpointError, match="holds averaged weights without an optimizer"):
        arguments = [*SETTINGS, f"data.path={config.data.path}", f"output_dir={out}", "optim.schedule=constant"]
        train(resolve_config("train", arguments, this_machine()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}@2", "out={new}"], "names 1 checkpoint; give two or more"),
        (["{run}@2", "{run}@9", "out={new}"], "run@9 is neither a run nor a checkpoint"),
        (["{run}@2", "{run}@3", "out={new}", "weights=[1]"], "weights=[1.0] has 1 share for 2 checkpoints"),
        (["{run}@2", "{run}@3", "out={new}", "weights=[0,0]"], "must be shares of at least 0 with a sum above 0"),
        (["{run}@2", "{run}@3", "out={run}"], "exists, and nothing is overwritten"),
    ],
)
def test_soups_that_cannot_be(stable, tmp_path, arguments, message):
    (tmp_path / "run").symlink_to(stable)
    places = {"run": str(tmp_path / "run"), "new": str(tmp_path / "new")}
    with pytest.raises(UsageError) as caught:
        average_checkpoints([argument.format(**places) for argument in arguments])
    assert message in str(caught.value)
