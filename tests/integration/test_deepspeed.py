"""engine=deepspeed as users start it: DeepSpeed's launcher, kill -9, a rerun, and the content of its checkpoints."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssa_pretrain.checkpoint.integrity import record_text
from ssa_pretrain.settings.files import file_sha256
from support.training import (
    ROOT,
    descendants,
    environment,
    is_alive,
    launched,
    records,
    run,
    train,
    wait_for_checkpoint,
    wait_for_step,
)

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.timeout(1500)
SETTINGS = (
    "experiment=quickstart",
    "training.steps=6",
    "training.global_batch_tokens=1024",
    "training.micro_batch_size=1",
    "data.sequence_length=256",
    "evaluation.rows=2",
    "evaluation.interval=3",
    "evaluation.at_start=false",
    "checkpoint.interval=2",
    "deepspeed.zero_stage=2",
    "deepspeed.flops_profiler_step=1",
)


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory) -> Path:
    """Returns an uninterrupted run, without a launcher."""
    folder = tmp_path_factory.mktemp("deepspeed_whole")
    train(*SETTINGS, "engine=deepspeed", f"data.path={corpus}", f"output_dir={folder}", processes=2)
    assert "fwd flops per GPU" in (folder / "flops_profile.txt").read_text()
    return folder


def interrupted(
    folder: Path, settings: tuple[str, ...], step: int, choose, number: signal.Signals
) -> tuple[int, list[str]]:
    """Signals one chosen process of a run after a step, checks that no process survives, and returns the exit code and the launcher's lines.

    After kill -9 the launcher starts the run again.
    """
    with subprocess.Popen(
        launched("deepspeed.sh", *settings, restarts=int(number is signal.SIGKILL)),
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_for_step(
            process,
            folder,
            step,
            seconds=400,
            output=lambda: process.stderr.read() if process.poll() is not None else "",
        )
        wait_for_checkpoint(process, folder, 2, seconds=60)
        family = descendants(process.pid)
        os.kill(choose(process.pid, family), number)
        output = process.communicate(timeout=400)[1]
    assert not [pid for pid in family if is_alive(pid)]
    return process.returncode, [line for line in output.splitlines() if line.startswith("deepspeed.sh: ")]


def test_sigterm_saves_and_killed_launcher_is_started_again(uninterrupted, corpus, tmp_path):
    """DeepSpeed's own launcher leaves its ranks running after both signals, and returns 0 after the second."""
    settings = (*SETTINGS, f"data.path={corpus}", f"output_dir={tmp_path}")
    longer = tuple("training.steps=400" if line.startswith("training.steps") else line for line in settings)
    code, output = interrupted(tmp_path, longer, 3, lambda shell, _: shell, signal.SIGTERM)
    last = records(tmp_path, "train")[-1]["step"]
    goes_on = "its checkpoint is published, and the same command resumes from it"
    assert (code, output) == (7, [f"deepspeed.sh: SIGTERM: stopped after step {last}; {goes_on}"])
    assert (tmp_path / "checkpoints" / f"step_{last:08d}").is_dir()
    shutil.rmtree(tmp_path)

    def node_launcher(_: int, family: list[int]) -> int:
        (found,) = [pid for pid in family if "deepspeed.launcher.launch" in Path(f"/proc/{pid}/cmdline").read_text()]
        return found

    code, output = interrupted(tmp_path, settings, 3, node_launcher, signal.SIGKILL)
    how = "the launcher's own process was killed by SIGKILL; restart 1 of 1 in 1 s, from the newest checkpoint"
    assert (code, output) == (0, [f"deepspeed.sh: {how}"])
    assert records(tmp_path, "train") == records(uninterrupted, "train")
    assert records(tmp_path, "evaluation") == records(uninterrupted, "evaluation")


class Attack:
    """Creates a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_optimizer_states_of_an_attacker_run_no_code(uninterrupted, corpus, tmp_path):
    """Only rank 1 reads the file; its sha256 in the list is right."""
    run_folder, marker = tmp_path / "run", tmp_path / "attacked"
    shutil.copytree(uninterrupted, run_folder)
    checkpoint = run_folder / "checkpoints" / "step_00000006"
    (states,) = (checkpoint / "deepspeed").glob("*pp_rank_1_*optim_states.pt")
    torch.save({"optimizer_state_dict": Attack(marker)}, states)
    record = json.loads((checkpoint / "checkpoint.json").read_text())
    entry = {"bytes": states.stat().st_size, "sha256": file_sha256(states)}
    record["files"][str(states.relative_to(checkpoint))] = entry
    (checkpoint / "checkpoint.json").write_text(record_text(record))
    longer = tuple("training.steps=8" if line.startswith("training.steps") else line for line in SETTINGS)
    command = launched("deepspeed.sh", *longer, f"data.path={corpus}", f"output_dir={run_folder}")
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 5, done.stderr[-3000:]
    last = done.stderr.splitlines()[-1]
    assert (
        last.startswith("deepspeed.sh: rank 1 (") and f"{states} names posix.mkdir, which is in no checkpoint" in last
    )
    assert not marker.exists()


def test_deepspeed_recovery_script_extracts_the_weights(uninterrupted, tmp_path):
    from ssa_pretrain.checkpoint.weights import WeightsReader

    folder = uninterrupted / "checkpoints" / "step_00000006"
    done = subprocess.run(
        [sys.executable, str(folder / "zero_to_fp32.py"), str(folder), str(tmp_path), "--max_shard_size", "1TB"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(next(tmp_path.glob("pytorch_model*.bin")), weights_only=True)
    reader = WeightsReader(folder / "weights")
    assert found.keys() >= reader.tensors.keys()
    for name in reader.tensors:
        torch.testing.assert_close(found[name], reader.read(name).float(), rtol=0, atol=0)


def test_megatron_engine_starts_from_deepspeed_weights_on_one_process(uninterrupted, corpus, tmp_path):
    last = [r["cross_entropy"] for r in records(uninterrupted, "evaluation")][-2:]
    fresh = [line for line in SETTINGS if not line.startswith(("deepspeed.", "evaluation.at_start"))]
    begun = run(
        "ssa_pretrain.train",
        *fresh,
        f"data.path={corpus}",
        f"output_dir={tmp_path}",
        f"checkpoint.init_from={uninterrupted}",
        "training.stop_at_step=1",
    )
    assert begun.returncode == 0, begun.stderr[-3000:]
    first = [r["cross_entropy"] for r in records(tmp_path, "evaluation")][:2]
    assert first == pytest.approx(last, rel=1e-5)
