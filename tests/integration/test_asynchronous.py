"""Training goes on while a checkpoint is written: the losses are the same, and whatever happens to the save, the run resumes bit for bit."""

import errno
import json
import os
import shutil
import threading
import time
from concurrent.futures import wait as wait_for
from functools import partial
from pathlib import Path

import pytest

from ssa_pretrain import saving
from ssa_pretrain.checkpoint import publish
from ssa_pretrain.checkpoint.background import BackgroundSave
from ssa_pretrain.checkpoint.integrity import find_damage
from ssa_pretrain.errors import CheckpointError, DivergedError
from ssa_pretrain.health import Health
from ssa_pretrain.settings.files import file_sha256
from support.s3_server import s3_server
from support.short_runs import train
from support.training import records

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def run(corpus, tmp_path, monkeypatch):
    """Returns a function that trains in a folder of its own."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return partial(train, corpus, tmp_path / "run", "checkpoint.asynchronous=true")


@pytest.fixture(scope="module")
def plain(corpus, tmp_path_factory) -> list[dict]:
    """Returns the training records of a run that saves only at its end."""
    folder = train(corpus, tmp_path_factory.mktemp("plain"), "checkpoint.asynchronous=false")
    return records(folder, "train")


@pytest.fixture
def slow(monkeypatch):
    """A save beside training begins to hash its files when training waits for it. One file after the other takes a tenth of a second: together a second."""
    read, wait, is_awaited = publish.file_sha256, BackgroundSave.wait, threading.Event()

    def slow_hash(path: Path) -> str:
        if ".step_00000006.tmp" not in path.parts:  # the last save, which has nothing to run beside
            is_awaited.wait(60)
        time.sleep(0.1)
        return read(path)

    def wait_for_it(self):
        is_awaited.set()
        try:
            return wait(self)
        finally:
            is_awaited.clear()

    monkeypatch.setattr(publish, "HASHED_AT_ONCE", 1)
    monkeypatch.setattr(publish, "file_sha256", slow_hash)
    monkeypatch.setattr(BackgroundSave, "wait", wait_for_it)


def full_in_step_4(path: Path) -> str:
    """Hashes a file as a save does, and fails in that of step 4 as on a full disk."""
    if ".step_00000004.tmp" in path.parts:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return file_sha256(path)


def intact(folder: Path) -> list[int]:
    """Returns the steps of a run's checkpoints, all of which must be intact."""
    found = sorted((folder / "checkpoints").iterdir())
    assert [p.name for p in found if find_damage(p)] == []
    return [int(p.name.removeprefix("step_")) for p in found]


@pytest.mark.usefixtures("slow")
def test_saves_back_to_back_wait_for_each_other_and_change_no_loss(run, plain, capsys):
    overlapping = run("checkpoint.interval=1", "checkpoint.keep=3")
    lines = capsys.readouterr().err
    assert intact(overlapping) == [4, 5, 6]
    assert "the save of step 2 waited" in lines and "raise checkpoint.interval" in lines
    saves = [json.loads(line) for line in (overlapping / "metrics.jsonl").read_text().splitlines()]
    saves = [record for record in saves if record["kind"] == "checkpoint"]
    assert [record["step"] for record in saves] == [1, 2, 3, 4, 5, 6]
    assert saves[0]["stall_seconds"] < saves[0]["write_seconds"] - 0.5, "training did not wait for the hashes"
    assert saves[1]["stall_seconds"] > 0.5, "it had to wait for the first"
    assert saves[5]["stall_seconds"] == saves[5]["write_seconds"], "nothing is left to do beside the last save"
    size = sum(p.stat().st_size for p in (overlapping / "checkpoints" / "step_00000006").rglob("*") if p.is_file())
    assert saves[5]["bytes"] == size
    assert records(overlapping, "train") == plain


@pytest.mark.usefixtures("slow")
def test_exit_with_an_error_waits_for_the_save_that_is_under_way(run, tmp_path, monkeypatch):
    """A divergence in step 3 ends the run; the checkpoint of step 2 is good."""
    check = Health.require_progress

    def diverged(self, result, step: int, folder: Path) -> None:
        if step == 3:
            raise DivergedError("step 3 has diverged")
        check(self, result, step, folder)

    monkeypatch.setattr(Health, "require_progress", diverged)
    with pytest.raises(DivergedError, match="step 3"):
        run("checkpoint.interval=2")
    assert intact(tmp_path / "run") == [2]


def test_full_disk_in_the_background_is_noticed_at_once_and_the_rerun_is_bit_identical(run, plain, monkeypatch, capsys):
    read, poll = publish.file_sha256, BackgroundSave.poll

    def after_its_end(self, step: int):
        """Step 5 does not end before the save does, however fast the steps are."""
        wait_for([self._future], timeout=60)
        return poll(self, step)

    monkeypatch.setattr(BackgroundSave, "poll", after_its_end)
    monkeypatch.setattr(publish, "file_sha256", full_in_step_4)
    with pytest.raises(CheckpointError, match=r"step 4 could not be saved in .*No space left.*earlier checkpoints are"):
        run("checkpoint.interval=2", "checkpoint.max_failed_saves=0")
    monkeypatch.setattr(publish, "file_sha256", read)
    capsys.readouterr()
    again = run("checkpoint.interval=2")
    assert "resuming after step 2" in capsys.readouterr().out
    assert records(again, "train") == plain


def test_last_save_is_made_although_the_one_before_it_failed(run, plain, monkeypatch, capsys):
    """As if the disk were full for a while, and the run ended before the failure was noticed."""
    monkeypatch.setattr(publish, "file_sha256", full_in_step_4)
    monkeypatch.setattr(saving.Saver, "after_step", lambda *_: None)
    folder = run("checkpoint.interval=4", "checkpoint.max_failed_saves=0")
    assert "step 4 could not be saved" in (text := capsys.readouterr().err) and "; step 6 is saved now" in text
    assert intact(folder) == [6]
    assert records(folder, "train") == plain


def test_interval_auto_chooses_by_what_a_save_cost(run, capsys, monkeypatch):
    monkeypatch.setattr(saving, "FIRST_STEPS", 9)
    folder = run("training.steps=24", "checkpoint.interval=auto", "checkpoint.mean_hours_between_failures=1e-6")
    output = capsys.readouterr().err
    assert "checkpoint.interval=auto: a checkpoint every" in output
    assert "(checkpoint.mean_hours_between_failures); expected loss" in output
    steps = [r["step"] for r in records(folder, "checkpoint")]
    assert steps[:2] == [9, 18] and steps[-1] == 24
    chosen = int(output.partition("a checkpoint every ")[2].split()[0])
    assert chosen < 9 and steps[2] == min(18 + chosen, 24)


def test_run_whose_storage_is_lost_resumes_from_the_mirror_bit_for_bit(run, plain, monkeypatch, capsys):
    with s3_server("runs") as (variables, _):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        settings = ("checkpoint.interval=2", "checkpoint.mirror=s3://runs/mine")
        folder = run(*settings, "training.stop_at_step=4")
        assert "mirrored step 4 in " in capsys.readouterr().err
        kept = records(folder, "train")
        shutil.rmtree(folder)
        run(*settings)
        output = capsys.readouterr().out
        assert f"restored {folder}/checkpoints/step_00000004 from s3://runs/mine" in output
        assert "resuming after step 4" in output
        assert kept + records(folder, "train") == plain
