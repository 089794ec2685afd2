"""The rendered batch script under a stand-in for Slurm (tests/support/fake_slurm.py): what goes back into the queue, and what ends."""

import shlex
import subprocess
import time
from pathlib import Path

import pytest

from ssa_pretrain.launch.render.command import answer
from support.fake_slurm import sbatch, signal_batch_shell
from support.processes import ROOT

# Ends with the code on its start's line of `plan`; with 7 only when it is told to stop, unless the line has "at once".
LAUNCHER = """#!/usr/bin/env bash
echo "$*" >>"$FAKE/words"
line=$(sed -n "$((${SLURM_RESTART_COUNT:-0} + 1))p" "$FAKE/plan")
[[ $line != "7" ]] || { trap 'sleep 0.2; exit 7' TERM; touch "$FAKE/running.$SLURM_PROCID"; while :; do sleep 0.05; done; }
exit "${line%% *}"
"""


def run(folder: Path, plan: list[str], *changes: str, stops: bool = False) -> list[int]:
    """Returns the exit codes of a job whose runs end as planned."""
    (folder / "launchers").mkdir()
    launcher = folder / "launchers" / "torchrun.sh"
    launcher.write_text(LAUNCHER)
    launcher.chmod(0o755)
    (folder / "plan").write_text("\n".join(plan) + "\n")
    spec = [f"spec={ROOT}/launchers/spec.yaml", "nodes=2", "hosts=[]", "module=who", f"directory={folder}"]
    script = folder / "job.sbatch"
    script.write_text(answer(["target=slurm", *spec, *changes]))

    def stop(start: int, shell: subprocess.Popen[bytes]) -> None:
        while start == 0 and not all((folder / f"running.{node}").exists() for node in range(2)):
            time.sleep(0.05)
        if start == 0:
            signal_batch_shell(shell)

    return sbatch(script, folder, stop if stops else None)


@pytest.mark.parametrize(
    ("plan", "changes", "codes"),
    [
        (["0"], [], [0]),
        (["3"], ["restart_after_minutes=0"], [3]),
        (["7 at once"], ["restart_after_minutes=0"], [7]),  # somebody else stopped the run
        (["1", "8", "137", "0"], ["restart_after_minutes=0"], [0, 0, 0, 0]),
        (["1", "0"], [], [1]),  # too soon
        (["1", "1", "1", "0"], ["restart_after_minutes=0", "max_restarts=2"], [0, 0, 1]),
    ],
)
def test_exit_code_decides_whether_the_job_goes_back_into_the_queue(
    tmp_path: Path, plan: list[str], changes: list[str], codes: list[int]
) -> None:
    assert run(tmp_path, plan, *changes) == codes


def test_run_that_is_stopped_before_the_time_limit_saves_and_goes_back_into_the_queue(tmp_path: Path) -> None:
    assert run(tmp_path, ["7", "0"], stops=True) == [0, 0]
    words = [shlex.split(line) for line in (tmp_path / "words").read_text().splitlines()]
    ids = [line[line.index("--rdzv-id") + 1] for line in words]
    assert sorted(ids) == ["7-0", "7-0", "7-1", "7-1"]  # a new start does not meet remains of the last one
    assert all(line[line.index("--rdzv-endpoint") + 1] == "127.0.0.1:29400" for line in words)
    assert "exit code 7; back into the queue, restart 1 of 20" in (tmp_path / "log").read_text()
    mounts = "--container-mounts /shared/data:/shared/data:ro,/shared/runs:/shared/runs"
    assert mounts in (tmp_path / "containers").read_text()
