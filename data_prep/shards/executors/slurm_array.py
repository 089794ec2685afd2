"""Slurm: one job array through datatrove's SlurmPipelineExecutor, watched with squeue, cancelled with scancel."""

import contextlib
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.errors import ConfigurationError, InputError
from data_prep.files import read_json, write_json
from data_prep.progress import Log
from data_prep.run_config import SlurmExecutor
from data_prep.shards.executors.step import TokenizeShards

QUERY_SECONDS = 1.0  # between two queries of the scheduler


@dataclass(slots=True)
class SlurmHandle:
    """A submitted job array."""

    job_id: str
    submission: Path
    _queried: float = 0.0
    _alive: bool = field(default=True)

    def alive(self) -> bool:
        """Returns whether any task is queued or running."""
        if time.monotonic() - self._queried >= QUERY_SECONDS:
            command = ["squeue", "--noheader", "--jobs", self.job_id, "--format", "%T"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            # Slurm forgets an ended job after some minutes. squeue then fails on its number.
            self._alive = done.returncode == 0 and bool(done.stdout.strip())
            self._queried = time.monotonic()
        return self._alive

    def cancel(self) -> None:
        """Cancels the array."""
        subprocess.run(["scancel", self.job_id], capture_output=True, check=False)

    def folder(self) -> Path:
        """Returns the folder of the submission."""
        return self.submission


def attach(out: Path) -> SlurmHandle | None:
    """Returns the array that an earlier command submitted for this dataset, if it is still queued or running."""
    known = read_json(out / "work" / "slurm.json")
    if not isinstance(known, dict) or shutil.which("squeue") is None:
        return None
    handle = SlurmHandle(known["job_id"], Path(known["run"]))
    return handle if handle.alive() else None


def submit(executor: SlurmExecutor, out: Path, folder: Path, num_shards: int, log: Log) -> SlurmHandle:
    """Submits the array.

    Raises:
        ConfigurationError: this machine has no Slurm commands.
        InputError: Slurm rejects the job.
    """
    if missing := [program for program in ("sbatch", "squeue", "scancel") if shutil.which(program) is None]:
        raise ConfigurationError(
            f"executor=slurm needs {missing[0]}, which is not on PATH; run it on a login node, or use executor=local"
        )
    from datatrove.executor import SlurmPipelineExecutor

    array = SlurmPipelineExecutor(
        pipeline=[TokenizeShards(folder)],
        tasks=min(executor.tasks, num_shards),
        time=executor.time,
        partition=executor.partition,
        cpus_per_task=executor.cpus_per_task,
        mem_per_cpu_gb=executor.mem_per_cpu_gb,
        job_name="data_prep",
        qos=executor.qos,
        env_command=f"export PATH={Path(sys.executable).parent}:$PATH",
        sbatch_args=dict(executor.sbatch),
        logging_dir=str(folder / "datatrove"),
        skip_completed=False,  # our records show what is done
        requeue=False,
    )
    array.launch_merge_stats = lambda: None  # it would merge datatrove's own statistics; ours are in the records
    try:
        with contextlib.redirect_stderr(open(folder / "submit.log", "w")):
            array.run()
    except subprocess.CalledProcessError as error:
        raise InputError(f"sbatch rejected the job (code {error.returncode}); see {folder}/submit.log") from None
    log(f"Slurm job {array.job_id}: {array.tasks} tasks, logs in {folder}")
    write_json(out / "work" / "slurm.json", {"job_id": array.job_id, "run": str(folder)})
    return SlurmHandle(str(array.job_id), folder)
