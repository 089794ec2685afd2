"""A rank that hangs: the log names it, the launcher starts the run again, and its metrics are those of a run that was never interrupted."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ssa_pretrain.monitor.timeline import read_timeline
from ssa_pretrain.report.goodput import goodput
from support.processes import SUPPORT
from support.training import descendants, environment, is_alive, launched, records, train

pytestmark = pytest.mark.timeout(1200)
STEPS = 16
SETTINGS = (
    "experiment=quickstart",
    "model.num_layers=2",
    f"training.steps={STEPS}",
    "training.global_batch_tokens=512",
    "training.micro_batch_size=1",
    "data.sequence_length=128",
    "evaluation.rows=2",
    "evaluation.at_start=false",
    "evaluation.interval=12",
    "checkpoint.interval=4",
    "parallel.hang_minutes=0.15",
)


def test_stopped_rank_is_named_and_the_restarted_run_is_bit_identical(corpus, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    train(*SETTINGS, f"data.path={corpus}", f"output_dir={whole}", processes=2)
    data = (f"data.path={corpus}", f"output_dir={folder}")
    stopped, python = tmp_path / "stopped", tmp_path / "python"
    fault = json.dumps({"stop": {"step": 11, "rank": 1, "file": str(stopped)}, "finish": 60.0})
    python.write_text(  # instead of `python -u -m ssa_pretrain.train`
        f"#!/bin/sh\nshift 3\nexec {sys.executable} {SUPPORT / 'faulty_training.py'} '{fault}' \"$@\"\n"
    )
    python.chmod(0o755)
    variables = environment() | {"PYTHON_EXEC": str(python)}
    command = launched("torchrun.sh", *SETTINGS, *data, "logging=tensorboard", restarts=1)
    log = tmp_path / "log.txt"
    with log.open("w") as file, subprocess.Popen(command, env=variables, stdout=file, stderr=file) as launcher:
        while not (stopped.exists() and stopped.read_text()):
            assert launcher.poll() is None, log.read_text()[-3000:]
            time.sleep(0.05)
        family = descendants(launcher.pid)
        launcher.wait(timeout=600)
    text, second = log.read_text(), int(stopped.read_text())
    assert launcher.returncode == 0, text[-3000:]
    assert second in family and not [pid for pid in family if is_alive(pid)]
    hang = f"hang: rank 1 ({socket.gethostname()}, pid {second}) gives no sign of life in training step "
    ours = [line for line in text.splitlines() if hang in line]
    assert len(ours) == 2, text  # the log and the launcher
    assert ours[0].endswith("; 1 other waits for it")
    assert ours[1] == f"torchrun.sh: {ours[0]}; restart 1 of 1 in 1 s, from the newest checkpoint"
    assert "its process is stopped (SIGSTOP)" in text and "resuming after step 8" in text
    assert (folder / "hang.txt").read_text().count(hang) == 1
    for kind in ("train", "evaluation"):
        assert records(folder, kind) == records(whole, kind)
    require_alerts_and_times(folder)


def require_alerts_and_times(folder: Path) -> None:
    """The hang was an alert before the ranks ended, the restart another; the report knows the time that it cost."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    alerts = {
        tag: [event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
        if tag.startswith("alerts/")
    }
    assert sorted(alerts) == ["alerts/finished", "alerts/hung", "alerts/restarted"]
    assert alerts["alerts/hung"][0].startswith("error: hang: rank 1 (")
    assert "the start before hung at about step" in alerts["alerts/restarted"][0]
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, STEPS + 1))
    segments = read_timeline(folder)
    assert [(segment.step, segment.how) for segment in segments] == [(0, "hung"), (8, "finished")]
    found = goodput(segments)
    assert found is not None and found.starts == 2 and found.seconds["repeated"] > 0
    assert found.total == pytest.approx(segments[1].last - segments[0].began, abs=1.0), (
        "no second is lost or counted twice"
    )
