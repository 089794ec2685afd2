"""A save that fails does not end the run: training goes on as if nothing had happened, later saves succeed, and too many in a row end the run."""

import errno
import json
import os
from functools import partial
from pathlib import Path

import pytest

from ssa_pretrain import saving
from ssa_pretrain.checkpoint import publish, storage
from ssa_pretrain.checkpoint.integrity import find_damage
from ssa_pretrain.errors import CheckpointError
from ssa_pretrain.settings.files import file_sha256
from support.processes import SUPPORT, Ended, ranks, run_ranks
from support.short_runs import SETTINGS, train
from support.training import records

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture
def run(corpus, tmp_path, monkeypatch):
    """Returns a function that trains in a folder of its own."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return partial(train, corpus, tmp_path / "run")


@pytest.fixture(scope="module")
def plain(corpus, tmp_path_factory) -> list[dict]:
    """Returns the training records of a run whose saves do not fail."""
    return records(train(corpus, tmp_path_factory.mktemp("plain")), "train")


@pytest.fixture
def fail(monkeypatch):
    """Returns a function that lets the saves of some steps fail, as on storage that does not answer."""

    def install(*steps: int) -> None:
        def read(path: Path) -> str:
            if any(f".step_{step:08d}.tmp" in path.parts for step in steps):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return file_sha256(path)

        monkeypatch.setattr(publish, "file_sha256", read)

    monkeypatch.setattr(storage, "PAUSES", (0.01,))
    return install


def intact(folder: Path) -> list[int]:
    """Returns the steps of a run's checkpoints, all of which must be intact; nothing else may be there."""
    found = sorted((folder / "checkpoints").iterdir())
    assert [p.name for p in found if find_damage(p)] == []
    return [int(p.name.removeprefix("step_")) for p in found]


@pytest.mark.parametrize("asynchronous", ["false", "true"])
@pytest.mark.parametrize("interval", ["2", "auto"])
def test_failed_save_is_reported_and_costs_nothing(run, plain, fail, monkeypatch, capsys, interval, asynchronous):
    monkeypatch.setattr(saving, "FIRST_STEPS", 2)
    fail(2)
    settings = (f"checkpoint.interval={interval}", f"checkpoint.asynchronous={asynchronous}", "checkpoint.keep=9")
    folder = run(*settings, "training.stop_at_step=4")
    output = capsys.readouterr().err
    assert "step 2 could not be saved in" in output and "Input/output error" in output
    line = next(line for line in output.splitlines() if "step 2 could not be saved in" in line)
    assert line.endswith(
        "; earlier checkpoints are unchanged; training goes on, the next save is that of step 4, and 9 more in a row may fail "
        "(checkpoint.max_failed_saves=10)"
    )
    (failed,) = records(folder, "failed_save")
    assert failed.pop("reason").startswith("step 2 could not be saved in")
    assert failed == {"kind": "failed_save", "step": 2, "failed_in_a_row": 1, "next_step": 4}
    assert intact(folder) == [4]
    run(*settings)
    assert "resuming after step 4" in capsys.readouterr().out
    assert records(folder, "train") == plain


def test_failed_save_is_tried_again_before_the_next_regular_one(run, plain, fail, monkeypatch):
    monkeypatch.setattr(saving, "RETRY_SECONDS", 1e-9)
    fail(2, 3)
    folder = run("checkpoint.interval=2", "checkpoint.keep=9", "training.steps=9", "training.stop_at_step=6")
    assert [record["next_step"] for record in records(folder, "failed_save")] == [3, 4]
    assert intact(folder) == [4, 6]
    assert [record["step"] for record in records(folder, "train")] == [1, 2, 3, 4, 5, 6]


def test_successful_save_sets_the_count_back(run, plain, fail):
    fail(1, 3, 5)
    folder = run("checkpoint.interval=1", "checkpoint.keep=9", "checkpoint.max_failed_saves=1")
    assert intact(folder) == [2, 4, 6]
    assert records(folder, "train") == plain


@pytest.mark.parametrize(("most", "last"), [(0, 1), (2, 3)])
def test_too_many_failed_saves_in_a_row_end_the_run(run, fail, tmp_path, most, last):
    fail(1, 2, 3, 4, 5)
    with pytest.raises(CheckpointError, match="free space and run the same command again") as caught:
        run("checkpoint.interval=1", f"checkpoint.max_failed_saves={most}")
    assert caught.value.exit_code == 5 and f"step {last} could not be saved" in str(caught.value)
    assert ("; 3 saves in a row have failed: free space" in str(caught.value)) == (most == 2)
    assert [record["step"] for record in records(tmp_path / "run", "train")] == list(range(1, last + 1))
    assert intact(tmp_path / "run") == []


def test_failure_of_the_last_save_ends_the_run(run, fail):
    fail(6)
    with pytest.raises(CheckpointError, match="step 6 could not be saved"):
        run("checkpoint.interval=4")


CASES = {
    "sharded state, rank 1": ("tp2", 1, "ssa_pretrain.checkpoint.writer:write", False),
    "common weights, rank 0": ("tp2", 0, "ssa_pretrain.checkpoint.sharded_weights:write_whole", False),
    "beside training, rank 1": ("tp2", 1, "ssa_pretrain.saving:publish", True),
    "ZeRO 1, rank 1": ("zero1", 1, "ssa_pretrain.engine.deepspeed.checkpoint:save", False),
    "ZeRO 1 beside training, rank 1": ("zero1", 1, "ssa_pretrain.saving:publish", True),
    "ZeRO 3, rank 1": ("zero3", 1, "ssa_pretrain.engine.deepspeed.checkpoint:save", False),
}
LAYOUTS = {
    "tp2": ("parallel=tp2",),
    "zero1": ("engine=deepspeed", "deepspeed.zero_stage=1"),
    "zero3": ("engine=deepspeed", "deepspeed.zero_stage=3"),
}


def train_ranks(corpus: Path, folder: Path, fault: dict, *overrides: str) -> list[Ended]:
    """Trains with two ranks, one of which has a fault."""
    settings = (*SETTINGS, f"data.path={corpus}", f"output_dir={folder}", *overrides)
    return run_ranks([str(SUPPORT / "failing_saves.py"), json.dumps(fault), *settings], ranks(2), timeout=500)


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    """Returns a function that returns the folder of a layout's run without a fault."""
    done: dict[str, Path] = {}

    def folder_of(layout: str) -> Path:
        if layout not in done:
            folder = tmp_path_factory.mktemp(layout)
            ended = train_ranks(corpus, folder, {"rank": -1}, *LAYOUTS[layout])
            assert [one.code for one in ended] == [0, 0], ended[0].stderr[-3000:]
            done[layout] = folder
        return done[layout]

    return folder_of


def hashes(folder: Path) -> dict[str, str]:
    """Returns the sha256 of the last checkpoint's files with weights, and with moments of megatron-core."""
    listed = json.loads((folder / "checkpoints/step_00000006/checkpoint.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in listed.items() if name.endswith((".distcp", ".safetensors"))}


@pytest.mark.parametrize("case", CASES)
def test_write_that_fails_on_one_rank_leaves_all_ranks_in_step(corpus, tmp_path, undisturbed, case):
    """In whichever part of a save, of either engine: the run goes on, and ends as the one without a fault, to the bit."""
    layout, rank, place, asynchronous = CASES[case]
    if "zero" in layout:
        pytest.importorskip("deepspeed")
    fault = {"rank": rank, "place": place, "steps": [2]}
    ended = train_ranks(
        corpus,
        tmp_path,
        fault,
        *LAYOUTS[layout],
        "checkpoint.interval=2",
        "checkpoint.keep=9",
        f"checkpoint.asynchronous={str(asynchronous).lower()}",
    )
    assert [one.code for one in ended] == [0, 0], ended[0].stderr[-3000:]
    assert "step 2 could not be saved in" in ended[0].stderr and f"(rank {rank}: " in ended[0].stderr
    assert [record["step"] for record in records(tmp_path, "failed_save")] == [2]
    assert intact(tmp_path) == [4, 6]
    whole = undisturbed(layout)
    assert records(tmp_path, "train") == records(whole, "train")
    assert hashes(tmp_path) == hashes(whole)


def test_too_many_failures_beside_training_end_all_ranks(corpus, tmp_path):
    fault = {"rank": 1, "place": "ssa_pretrain.saving:publish", "steps": list(range(40))}
    settings = ("checkpoint.interval=2", "checkpoint.asynchronous=true", "checkpoint.max_failed_saves=1")
    ended = train_ranks(corpus, tmp_path, fault, *LAYOUTS["tp2"], *settings, "training.steps=40")
    assert [one.code for one in ended] == [5, 5], ended[0].stderr[-3000:]
    assert "; 2 saves in a row have failed: free space and run the same command again" in ended[0].stderr
    assert records(tmp_path, "train")[-1]["step"] < 40 and intact(tmp_path) == []
