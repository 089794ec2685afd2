"""The commands on a run of TP 2 x PP 2 and on one of DeepSpeed: any number of processes writes the same folder, which starts and scores as the run does."""

import json
from pathlib import Path

import pytest

from support.foreign_llama import LLAMA3_ROPE, llama_record, random_tensors, write_folder
from support.run_folders import without_common_weights
from support.training import records, run, train

SETTINGS = (
    "experiment=quickstart",
    "model=tiny",
    "model.init_std=0.2",
    "training.steps=1",
    "training.global_batch_tokens=512",
    "training.micro_batch_size=1",
    "data.sequence_length=128",
    "evaluation.rows=4",
    "evaluation.at_start=false",
)
SIZE = "max_shard_size=300KB"


def export(source: Path, out: Path, *settings: str, processes: int = 1) -> Path:
    done = run("ssa_pretrain.export", str(source), f"out={out}", SIZE, *settings, processes=processes)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f": {out}\n" in done.stdout
    assert ("checked: relative errors of the logits" in done.stdout) is ("check=true" in settings)
    return out


def require_same(one: Path, other: Path, *, but: tuple[str, ...] = ()) -> None:
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in other.iterdir()}
    for name in names - set(but):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def trained(folder: Path, corpus: Path, *settings: str, processes: int) -> Path:
    train(*SETTINGS, f"data.path={corpus}", f"output_dir={folder}", *settings, processes=processes)
    return folder


def imported_from(folder: Path, out: Path, *settings: str) -> list[str]:
    """Imports a folder; returns the model's settings, as the command prints them."""
    done = run("ssa_pretrain.import_hf", str(folder), f"out={out}", *settings)
    assert done.returncode == 0, done.stderr
    assert f"checkpoint.init_from={out}" in done.stdout
    return done.stdout.splitlines()[-1].split()


def test_every_number_of_processes_exports_the_same_and_an_import_scores_the_same(corpus, tmp_path):
    source = trained(tmp_path / "run", corpus, "parallel=tp2_pp2", processes=4)
    alone = export(source, tmp_path / "alone", "dtype=fp32", "check=true")
    assert len(list(alone.glob("*.safetensors"))) >= 4
    require_same(export(source / "checkpoints/step_00000001", tmp_path / "four", "dtype=fp32", processes=4), alone)
    imported_from(alone, tmp_path / "imported", f"data={corpus}")
    scores = [evaluate(folder, corpus) for folder in (source, tmp_path / "imported")]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)
    without_common_weights(source / "checkpoints/step_00000001")
    require_same(export(source, tmp_path / "by_engine", "dtype=fp32", processes=4), alone)


def test_deepspeed_exports_and_starts_from_an_import(corpus, tmp_path):
    layout = ("engine=deepspeed", "parallel=tp2")
    source = trained(tmp_path / "run", corpus, *layout, processes=2)
    alone = export(source, tmp_path / "alone", "dtype=fp32")
    settings = imported_from(alone, tmp_path / "imported")
    start = (f"checkpoint.init_from={tmp_path / 'imported'}", "optim.lr=1e-30", *settings)
    begun = trained(tmp_path / "begun", corpus, *layout, *start, processes=2)
    require_same(export(begun, tmp_path / "unchanged", "dtype=fp32"), alone, but=("README.md",))
    without_common_weights(source / "checkpoints/step_00000001")
    require_same(export(source, tmp_path / "by_engine", "dtype=fp32", processes=2), alone)


def test_convert_llama_trains_a_llama_from_an_import(corpus, tmp_path):
    """The recipe at its own settings, but for size, precision and the number of steps; the import prints the settings of the model."""
    record = llama_record(rope=LLAMA3_ROPE) | {"vocab_size": 4096}
    folder = write_folder(tmp_path / "llama", record, random_tensors(vocab=4096))
    imported, out = tmp_path / "imported", tmp_path / "out"
    settings = imported_from(folder, imported, "gate=open")
    assert "attention.gate=true" in settings
    small = ("precision=fp32", "data.sequence_length=512", "training.global_batch_tokens=1024", "training.steps=2")
    small += ("evaluation.rows=2", "attention.impl=reference", "attention.top_k=4")
    paths = (f"data.path={corpus}", f"output_dir={out}", f"checkpoint.init_from={imported}")
    train("experiment=convert_llama", *settings, *small, *paths)
    losses = {(r["step"], r["mode"]): r["cross_entropy"] for r in records(out, "evaluation")}
    assert set(losses) == {(step, mode) for step in (0, 2) for mode in ("full", "sparse")}
    assert losses[0, "full"] != losses[0, "sparse"]
    assert losses[2, "full"] < losses[0, "full"], "the weights of the import were trained"
    assert (out / "checkpoints/step_00000002").is_dir()


def evaluate(folder: Path, corpus: Path) -> list[float]:
    """Returns the cross entropy of each mode."""
    done = run("ssa_pretrain.evaluate", str(folder), f"data.path={corpus}", "precision.name=fp32", "evaluation.rows=4")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = (folder / "evaluations").glob("*.json")
    modes = json.loads(path.read_text())["modes"]
    (folder / "evaluation.json").unlink(missing_ok=True)
    return [modes[mode]["cross_entropy"] for mode in ("full", "sparse")]
