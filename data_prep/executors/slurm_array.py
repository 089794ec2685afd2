"""Slurm: one job array by datatrove's SlurmPipelineExecutor, watched with squeue, ended with scancel."""

import contextlib
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.errors import ConfigurationError, InputError
from data_prep.executors.step import TokenizeShards
from data_prep.files import read_json, write_json
from data_prep.progress import Say
from data_prep.run_config import SlurmExecutor

ASK_SECONDS = 1.0  # between two questions to the scheduler


@dataclass(slots=True)
class SlurmHandle:
    """A job array that was submitted."""

    job_id: str
    run: Path
    _asked: float = 0.0
    _alive: bool = field(default=True)

    def alive(self) -> bool:
        """Returns whether any task is queued or running."""
        if time.monotonic() - self._asked >= ASK_SECONDS:
            command = ["squeue", "--noheader", "--jobs", self.job_id, "--format", "%T"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            # A job that ended is forgotten after some minutes; squeue then fails on its number.
            self._alive = done.returncode == 0 and bool(done.stdout.strip())
            self._asked = time.monotonic()
        return self._alive

    def cancel(self) -> None:
        """Ends the array."""
        subprocess.run(["scancel", self.job_id], capture_output=True, check=False)

    def where(self) -> str:
        """Returns the run's folder."""
        return str(self.run)


def attach(out: Path) -> SlurmHandle | None:
    """Returns the array that an earlier command submitted for this dataset, if it is still queued or running."""
    known = read_json(out / "work" / "slurm.json")
    if not isinstance(known, dict) or shutil.which("squeue") is None:
        return None
    handle = SlurmHandle(known["job_id"], Path(known["run"]))
    return handle if handle.alive() else None


def submit(executor: SlurmExecutor, out: Path, run: Path, shards: int, say: Say) -> SlurmHandle:
    """Submits the array.

    Raises:
        ConfigurationError: this is no machine of a Slurm cluster.
        InputError: Slurm refuses the job.
    """
    if missing := [program for program in ("sbatch", "squeue", "scancel") if shutil.which(program) is None]:
        raise ConfigurationError(
            f"executor=slurm needs {missing[0]}, which is not on PATH; run it on a login node, or use executor=local"
        )
    from datatrove.executor import SlurmPipelineExecutor

    array = SlurmPipelineExecutor(
        pipeline=[TokenizeShards(run)],
        tasks=min(executor.tasks, shards),
        time=executor.time,
        partition=executor.partition,
        cpus_per_task=executor.cpus_per_task,
        mem_per_cpu_gb=executor.mem_per_cpu_gb,
        job_name="data_prep",
        qos=executor.qos,
        env_command=f"export PATH={Path(sys.executable).parent}:$PATH",
        sbatch_args=dict(executor.sbatch),
        logging_dir=str(run / "datatrove"),
        skip_completed=False,  # our records say what is done
        requeue=False,
    )
    array.launch_merge_stats = lambda: None  # its figures are datatrove's own; ours are in the records
    try:
        with contextlib.redirect_stderr(open(run / "submit.log", "w")):
            array.run()
    except subprocess.CalledProcessError as error:
        raise InputError(f"sbatch refused the job (code {error.returncode}); look at {run}/submit.log") from None
    say(f"Slurm job {array.job_id}: {array.tasks} tasks, logs in {run}")
    write_json(out / "work" / "slurm.json", {"job_id": array.job_id, "run": str(run)})
    return SlurmHandle(str(array.job_id), run)
