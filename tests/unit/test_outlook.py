"""The plan's last lines: whether the data is prepared, and what the command would do with output_dir."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from ssa_pretrain.checkpoint.facts import run_facts
from ssa_pretrain.cli import read_config, resolve_config
from ssa_pretrain.config.machine import Machine
from ssa_pretrain.run_folder import lock_folder
from support.small_datasets import write_dataset

BASE = ("experiment=quickstart", "model.vocab_size=4096", "training.steps=9")


def rows(*arguments: str, capsys: pytest.CaptureFixture[str], entry: str = "train") -> dict[str, str]:
    """Returns the plan's rows by name; the last one for a repeated name."""
    with pytest.raises(SystemExit) as left:
        read_config(entry, [*BASE, *arguments, "--dry-run"])
    out, err = capsys.readouterr()
    assert (left.value.code, err) == (0, "")
    return {line[:11].strip(): line[11:] for line in out.splitlines()}


def add_checkpoint(folder: Path, step: int, *arguments: str) -> None:
    """Writes the facts of a checkpoint, as a command's run would."""
    config = resolve_config("train", [*BASE, *arguments], Machine(world_size=1, has_files=False))
    facts = run_facts(config, fingerprint="data", padded_vocab_size=4096, tokenizer_sha256="tokenizer")
    path = folder / "checkpoints" / f"step_{step:08d}" / "checkpoint.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"schema": 1, "step": step, "facts": facts, "files": {}}))


def test_missing_data_is_shown_with_the_command_that_prepares_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = rows("data.path=data/quickstart", f"output_dir={tmp_path}", capsys=capsys)["data"]
    command = "python -m data_prep source=quickstart tokenizer=bpe8k out=data/quickstart"
    assert found == f"data/quickstart is not prepared yet: {command}"
    found = rows("data.path='my data'", f"output_dir={tmp_path}", capsys=capsys)["data"]
    assert found == "my data is not prepared yet: python -m data_prep source=… tokenizer=… out='my data'"


def test_plan_describes_the_output_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    place = f"output_dir={run}"
    assert rows(place, capsys=capsys)["output"] == f"{run} holds no checkpoint: the run starts at step 0"
    assert rows(place, capsys=capsys, entry="evaluate")["output"] == f"{run} holds no checkpoint"
    assert not run.exists()
    add_checkpoint(run, 3)
    add_checkpoint(run, 6)
    (run / "checkpoints" / "step_00000009_copy").mkdir()  # the user's
    assert rows(place, capsys=capsys)["output"] == f"{run}: the run resumes after step 6 of 9"
    assert rows(place, capsys=capsys, entry="plan")["output"] == f"{run}: the run resumes after step 6 of 9"
    assert rows(place, capsys=capsys, entry="evaluate")["output"] == f"{run}: the checkpoint of step 6 is evaluated"
    new = f"{tmp_path / 'new'} holds no checkpoint: the run"
    begun = (f"output_dir={tmp_path / 'new'}", f"checkpoint.init_from={run}@6")
    assert rows(*begun, capsys=capsys)["output"] == f"{new} starts at step 0 from the weights of {run}@6"
    refused = f"{new} would be refused at checkpoint.init_from={run}@6, which holds another model"
    differs = "(attention.gate: checkpoint True, run False)"
    assert rows(*begun, "attention.gate=false", capsys=capsys)["output"] == f"{refused} {differs}"
    for asked, last in (("training.steps=6", 6), ("training.stop_at_step=5", 5)):
        finished = f"{run} is finished: it has 6 steps, and {last} are asked for"
        assert rows(place, asked, capsys=capsys)["output"] == finished
    assert rows(place, "optim.beta2=0.99", "seed=5", capsys=capsys)["output"] == (
        f"{run}: the run would be refused at the checkpoint of step 6, which differs "
        "(optim.beta2: checkpoint 0.95, run 0.99; seed: checkpoint 1234, run 5)"
    )


def test_plan_and_resume_agree_on_a_changed_micro_batch_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    smaller, drawn_by_step = "training.micro_batch_size=1", "attention.stream_draw=step"
    add_checkpoint(tmp_path / "microbatch", 6)
    add_checkpoint(tmp_path / "step", 6, drawn_by_step)
    found = rows(f"output_dir={tmp_path / 'microbatch'}", smaller, capsys=capsys)["output"]
    assert "would be refused" in found and "each microbatch draws its streams at attention.full_ratio=0.5" in found
    found = rows(f"output_dir={tmp_path / 'step'}", smaller, drawn_by_step, capsys=capsys)["output"]
    assert found.endswith("the run resumes after step 6 of 9")


def test_plan_reports_a_folder_in_use_or_unwritable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = lock_folder(tmp_path / "run")
    assert lock is not None
    with lock:
        found = rows(f"output_dir={tmp_path / 'run'}", capsys=capsys)["output"]
    assert found.startswith(f"{tmp_path / 'run'} is in use by process {os.getpid()} on ")
    assert found.endswith(": the run would be refused")
    assert "is in use" not in rows(f"output_dir={tmp_path / 'run'}", capsys=capsys)["output"]
    (tmp_path / "file").touch()
    found = rows(f"output_dir={tmp_path / 'file'}", capsys=capsys)["output"]
    assert found == f"{tmp_path / 'file'} is a file, not a folder"


def test_plan_takes_the_length_of_documents_from_prepared_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(
        tmp_path, {"text": [np.full(length, 7) for length in (100, 300, 500)] * 200}, {"text": [np.full(4000, 7)]}
    )
    with pytest.raises(SystemExit):
        read_config("plan", [*BASE, f"data.path={tmp_path}", "hardware=h200", "parallel.world_size=1"])
    assert "documents of 300 tokens" in capsys.readouterr().out
