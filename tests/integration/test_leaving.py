"""How a run ends early: each way has its exit code and one line, no rank hangs, and every checkpoint stays intact."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from ssa_pretrain.checkpoint.integrity import find_damage
from support.processes import free_port
from support.training import (
    command,
    descendants,
    environment,
    is_alive,
    launched,
    rank_of,
    records,
    run,
    signals_act_as_usual,
    train,
    wait_for_step,
)

pytestmark = pytest.mark.timeout(600)
SETTINGS = (
    "experiment=quickstart",
    "model.num_layers=2",
    "training.steps=400",
    "training.global_batch_tokens=512",
    "training.micro_batch_size=1",
    "data.sequence_length=128",
    "evaluation.rows=2",
    "evaluation.at_start=false",
    "logging.wandb.mode=off",
)


def checkpoints(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").glob("step_*"))


def test_signal_to_one_rank_stops_all_after_the_same_step_with_a_checkpoint(corpus, tmp_path):
    """Our launcher prints the last line and leaves no process behind. torchrun without it resumes from the checkpoint."""
    settings = (*SETTINGS, f"data.path={corpus}", f"output_dir={tmp_path}", "parallel=tp2")
    log = tmp_path / "log.txt"
    with (
        log.open("w") as file,
        subprocess.Popen(
            launched("torchrun.sh", *settings),
            env=environment(),
            stdout=file,
            stderr=file,
            preexec_fn=signals_act_as_usual,
        ) as launcher,
    ):
        wait_for_step(launcher, tmp_path, 3, seconds=200, output=lambda: log.read_text()[-3000:])
        family = descendants(launcher.pid)
        (second,) = [pid for pid in family if rank_of(pid) == "1"]
        os.kill(second, signal.SIGHUP)
        launcher.wait(timeout=120)
    assert launcher.returncode == 7
    assert not [pid for pid in family if is_alive(pid)]
    last = records(tmp_path, "train")[-1]["step"]
    assert last < 400
    sentence = f"SIGHUP: stopped after step {last}; its checkpoint is published, and the same command resumes from it"
    lines = log.read_text().splitlines()
    assert lines[-1] == f"torchrun.sh: {sentence}"
    assert lines[-2].startswith(f"saved step {last}: ")
    assert checkpoints(tmp_path) == [f"step_{last:08d}"]
    done = run("ssa_pretrain.train", *settings, f"training.stop_at_step={last + 1}", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"resuming after step {last}" in done.stdout


def test_ranks_with_different_settings_are_refused(corpus, tmp_path):
    settings = (*SETTINGS, f"data.path={corpus}", f"output_dir={tmp_path}")
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            command("ssa_pretrain.train", *settings, f"optim.lr={rate}"),
            env=environment()
            | {"RANK": str(n), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            stderr=subprocess.PIPE,
            text=True,
        )
        for n, rate in enumerate(("1e-3", "0.5"))
    ]
    errors = [process.communicate(timeout=200)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [3, 3], errors
    for text in errors:
        assert "optim.lr=0.5 on rank 1 (" in text and "and 0.001 on rank 0 (" in text
        assert "Traceback" not in text
    assert checkpoints(tmp_path) == []


def test_ctrl_c_stops_a_single_process_with_a_checkpoint_and_one_line(corpus, tmp_path):
    """The signal comes while a save is under way, as one is after every step; it is finished first."""
    settings = (*SETTINGS, f"data.path={corpus}", f"output_dir={tmp_path}", "checkpoint.interval=1")
    with subprocess.Popen(
        command("ssa_pretrain.train", *settings),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=signals_act_as_usual,
    ) as process:
        wait_for_step(process, tmp_path, 2, seconds=200)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=120)
    last = records(tmp_path, "train")[-1]["step"]
    assert process.returncode == 7
    assert checkpoints(tmp_path) == [f"step_{last - 1:08d}", f"step_{last:08d}"]
    assert [find_damage(path) for path in (tmp_path / "checkpoints").iterdir()] == [None, None]
    sentence = "its checkpoint is published, and the same command resumes from it"
    assert error.splitlines()[-1] == f"SIGINT: stopped after step {last}; {sentence}"
    assert error.splitlines()[-2].startswith(f"saved step {last}: ")


@pytest.mark.parametrize(
    ("module", "name", "code", "sentence"),
    [
        ("train", "SIGTERM", 7, "SIGTERM: stopped before training began; the same command starts it again"),
        ("train", "SIGINT", 7, "SIGINT: stopped before training began; the same command starts it again"),
        ("evaluate", "SIGINT", 130, "SIGINT: interrupted; the same command evaluates again"),
        ("plan", "SIGINT", 130, "ssa_pretrain.plan: interrupted"),
        ("report", "SIGINT", 130, "report: interrupted"),
        ("bench", "SIGINT", 130, "ssa_pretrain.bench: interrupted"),
        ("data_prep", "SIGINT", 130, "interrupted; run the same command again to continue"),
    ],
)
def test_signal_during_start_up_exits_at_once_with_one_line(tmp_path, module, name, code, sentence):
    """Modules `hydra` and `yaml` that sleep replace slow storage, so the command waits in its first import.

    They sleep in short naps: Python handles a signal that comes right before a sleep only after it.
    """
    for library in ("hydra", "yaml"):
        (tmp_path / library).mkdir()
        source = "import sys, time\nprint('importing', flush=True)\n[time.sleep(0.1) for _ in range(6000)]\n"
        (tmp_path / library / "__init__.py").write_text(source)
    path = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    with subprocess.Popen(
        command(module if module == "data_prep" else f"ssa_pretrain.{module}", "experiment=quickstart"),
        env=environment() | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=signals_act_as_usual,
    ) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.Signals[name])
        printed = process.communicate(timeout=120)
    assert (process.returncode, *printed) == (code, "", sentence + "\n")


def test_nan_loss_ends_the_run_and_enters_no_checkpoint(corpus, tmp_path):
    settings = (*SETTINGS, f"data.path={corpus}", f"output_dir={tmp_path}", "checkpoint.interval=1")
    done = run("ssa_pretrain.train", *settings, "model.init_std=1e20")
    assert done.returncode == 6, done.stdout[-2000:] + done.stderr[-2000:]
    assert "training has diverged" in done.stderr
    assert "Traceback" not in done.stderr
    assert checkpoints(tmp_path) == []


def test_damaged_tokens_read_by_one_rank_are_named_and_end_all_ranks(corpus, tmp_path):
    damaged = tmp_path / "data"
    shutil.copytree(corpus, damaged)
    for path in damaged.glob("train/*.bin"):
        path.write_bytes(b"\xff" * path.stat().st_size)
    arguments = (*SETTINGS, f"data.path={damaged}", f"output_dir={tmp_path / 'run'}")
    done = subprocess.run(
        launched("torchrun.sh", *arguments), env=environment(), capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 4
    last = done.stderr.splitlines()[-1]
    assert "holds the id 65535 at byte" in last and "repair it with" in last
    assert "Traceback" not in done.stderr


def test_evaluation_needs_no_training_split(corpus, tmp_path):
    """The dataset of `source=heldout` has no training split. Training on it is refused before anything is built."""
    settings = (*SETTINGS, f"output_dir={tmp_path / 'run'}")
    train(*settings, f"data.path={corpus}", "training.stop_at_step=1")
    measured = tmp_path / "data"
    shutil.copytree(corpus, measured)
    manifest = json.loads((measured / "manifest.json").read_text())
    manifest["splits"]["train"] = []
    del manifest["checksum"]  # as an older version wrote it
    (measured / "manifest.json").write_text(json.dumps(manifest))
    done = run("ssa_pretrain.evaluate", *settings, f"data.path={measured}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "held-out, sparse" in done.stdout
    done = run("ssa_pretrain.train", *settings, f"data.path={measured}")
    assert done.returncode == 4
    assert "has no train documents" in done.stderr
    assert "Traceback" not in done.stderr
