"""Stands in for sbatch, srun, scancel and scontrol where no Slurm is installed. It follows Slurm 22.05 in what launchers/slurm.sbatch uses, and refuses the rest.

sbatch: options in #SBATCH lines, the job's variables, one batch shell on the first node, SIGUSR1 to that shell only (--signal=B:), and the same script
again after `scontrol requeue`, with SLURM_RESTART_COUNT. scancel --signal: to every task, not to the batch shell. srun: a task per node, and the highest
exit code; after a SIGTERM of its own it kills the tasks (Slurm gives them KillWait seconds). All nodes are processes of this machine. It knows neither
time, queues nor containers.
"""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

SRUN = """#!/usr/bin/env bash
set -u
while [[ $1 == --* ]]; do
    case $1 in
        --kill-on-bad-exit=0 | --no-container-mount-home) shift ;;
        --container-image | --container-mounts) echo "$1 $2" >>"$FAKE/containers"; shift 2 ;;
        *) echo "srun: unrecognized option $1" >&2; exit 1 ;;
    esac
done
tasks=()
for ((node = 0; node < SLURM_NNODES; node++)); do
    SLURM_PROCID=$node SLURM_NODEID=$node "$@" &
    tasks+=($!)
done
echo "${tasks[@]}" >"$FAKE/tasks"
trap 'kill -KILL "${tasks[@]}" 2>/dev/null' TERM
highest=0
left=("${tasks[@]}")
while ((${#left[@]})); do
    remaining=()
    for task in "${left[@]}"; do
        if kill -0 "$task" 2>/dev/null; then
            remaining+=("$task")
        else
            wait "$task"
            code=$?
            ((code > highest)) && highest=$code
        fi
    done
    left=("${remaining[@]}")
    sleep 0.05
done
exit $highest
"""
SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
    "show hostnames") echo 127.0.0.1; for ((node = 1; node < SLURM_NNODES; node++)); do echo "node$node"; done ;;
    requeue\\ *) [[ $2 == "$SLURM_JOB_ID" ]] && touch "$FAKE/requeue" ;;
    *) echo "scontrol: invalid command $*" >&2; exit 1 ;;
esac
"""
SCANCEL = """#!/usr/bin/env bash
[[ $# == 2 && $1 == --signal=TERM && $2 == "$SLURM_JOB_ID" ]] || { echo "scancel: invalid command $*" >&2; exit 1; }
read -ra tasks <"$FAKE/tasks"
kill -TERM "${tasks[@]}"
"""
OPTIONS = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "exclusive", "partition", "time", "output"}
OPTIONS |= {"open-mode", "requeue", "signal"}


def sbatch(
    script: Path, folder: Path, on_start: Callable[[int, subprocess.Popen[bytes]], object] | None = None
) -> list[int]:
    """Runs a batch script, as often as it asks for, and returns the exit code of each start.

    Args:
        script: the script.
        folder: for the programs and their notes.
        on_start: called with the number of the start and the batch shell's process.
    """
    programs = folder / "programs"
    programs.mkdir(parents=True, exist_ok=True)
    for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    lines = [line.split(" ", 1)[1] for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    options = dict(line.removeprefix("--").partition("=")[::2] for line in lines)
    assert set(options) <= OPTIONS, options
    assert options["ntasks-per-node"] == "1" and options["signal"].startswith("B:USR1@") and "requeue" in options
    variables = {
        "FAKE": str(folder),
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": options["nodes"],
        "SLURM_JOB_NODELIST": "n[0-1]",
    }
    variables |= {"PATH": f"{programs}:{os.environ['PATH']}", "HOME": os.environ.get("HOME", "/tmp")}
    codes: list[int] = []
    while not codes or (folder / "requeue").exists():
        (folder / "requeue").unlink(missing_ok=True)
        count = {"SLURM_RESTART_COUNT": str(len(codes))} if codes else {}
        with (folder / "log").open("ab") as log:
            shell = subprocess.Popen(["bash", str(script)], env=variables | count, cwd=folder, stdout=log, stderr=log)
            if on_start:
                on_start(len(codes), shell)
            codes.append(shell.wait(timeout=120))
    return codes


def signal_batch_shell(shell: subprocess.Popen[bytes]) -> None:
    """Sends what --signal=B:USR1 sends before the time limit."""
    shell.send_signal(signal.SIGUSR1)
