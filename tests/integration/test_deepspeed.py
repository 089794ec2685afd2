"""engine=deepspeed as its users start it: DeepSpeed's launcher, kill -9, the same command again; and what lies in its checkpoints."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import free_port
from training import ROOT, descendants, environment, records, run, wait_for_step

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


def launched(*arguments: str) -> list[str]:
    """Return the launcher's command for two processes."""
    script = ROOT / "launchers" / "deepspeed.sh"
    return [str(script), "--python", sys.executable, "--num-gpus", "2", "--master-port", str(free_port()), *arguments]


def launch(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        launched(*arguments), env=environment() | variables, cwd=ROOT, capture_output=True, text=True, timeout=600
    )


def alive(pid: int) -> bool:
    """Return whether a process runs: neither gone nor a zombie."""
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory) -> Path:
    """A run under DeepSpeed's launcher that nothing stops."""
    folder = tmp_path_factory.mktemp("deepspeed_whole")
    done = launch(*SETTINGS, f"data.path={corpus}", f"output_dir={folder}")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "fwd flops per GPU" in (folder / "flops_profile.txt").read_text()
    return folder


def test_a_killed_node_launcher_is_a_failure_without_orphans_and_the_same_command_goes_on(
    uninterrupted, corpus, tmp_path
):
    """What the launcher by itself calls success, leaving its workers to train on."""
    settings = (*SETTINGS, f"data.path={corpus}", f"output_dir={tmp_path}")
    with subprocess.Popen(
        launched(*settings), env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for_step(
            process, tmp_path, 3, seconds=400, said=lambda: process.stderr.read() if process.poll() is not None else ""
        )
        family = descendants(process.pid)
        commands = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in family}
        (node,) = [pid for pid, text in commands.items() if "deepspeed.launcher.launch" in text]
        os.kill(node, signal.SIGKILL)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "a process was killed; say the same again to resume" in said
    time.sleep(3)
    assert not [pid for pid in family if alive(pid)]
    done = launch(*settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming after step 2" in done.stdout
    assert records(tmp_path, "train") == records(uninterrupted, "train")
    assert records(tmp_path, "evaluation") == records(uninterrupted, "evaluation")


def test_its_own_recovery_script_gives_the_weights(uninterrupted, tmp_path):
    from ssa_pretrain.weights import WeightsReader

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


def test_the_megatron_engine_starts_from_it_on_one_process(uninterrupted, corpus, tmp_path):
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
