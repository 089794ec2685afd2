"""Ray: datatrove's RayPipelineExecutor, in a process of its own.

That process is Ray's driver. The command that watches it stays free of Ray's threads and output, and can end a run by ending it: the
tasks of a driver that is gone are killed by Ray, and so is a cluster that it started itself.

    python -m data_prep.executors.ray_cluster RUN SHARDS ADDRESS TASKS WORKERS CPUS GB
"""

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from data_prep.errors import ConfigurationError
from data_prep.executors.step import TokenizeShards
from data_prep.progress import Say
from data_prep.run_config import RayExecutor

STORE_BYTES = 100_000_000  # nothing but job descriptions goes through Ray's object store
GRACE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class RayHandle:
    """A driver that was started."""

    process: subprocess.Popen
    run: Path

    def alive(self) -> bool:
        """Returns whether the driver runs."""
        return self.process.poll() is None

    def cancel(self) -> None:
        """Ends the driver, and with it its tasks."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=GRACE_SECONDS)
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def where(self) -> str:
        """Returns the run's folder."""
        return str(self.run)


def submit(executor: RayExecutor, out: Path, run: Path, shards: int, say: Say) -> RayHandle:
    """Starts the driver; ConfigurationError where Ray is not installed."""
    if find_spec("ray") is None:
        raise ConfigurationError(
            "executor=ray needs ray; install it with `pip install -e '.[cluster]'`, or use executor=local"
        )
    tasks = min(executor.tasks, shards)
    workers = executor.workers or -1
    arguments = [run, executor.address or "local", tasks, workers, executor.cpus_per_task, executor.mem_per_cpu_gb]
    command = [sys.executable, "-m", "data_prep.executors.ray_cluster", *map(str, arguments)]
    log = open(run / "driver.log", "w")
    say(f"Ray at {executor.address or 'a cluster of its own'}: {tasks} tasks, logs in {run}")
    with log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    return RayHandle(process, run)


def drive(run: Path, address: str, tasks: int, workers: int, cpus: int, gigabytes: float) -> None:
    """Runs the tasks of a run on a Ray cluster; "local" starts one for the time being."""
    import ray
    from datatrove.executor import RayPipelineExecutor

    if address == "local":
        cores = len(os.sched_getaffinity(0))
        wanted = max(cores, cpus * min(tasks, workers if workers > 0 else cores))
        ray.init("local", num_cpus=wanted, include_dashboard=False, object_store_memory=STORE_BYTES)
    else:
        ray.init(address)
    executor = RayPipelineExecutor(
        pipeline=[TokenizeShards(run)],
        tasks=tasks,
        workers=workers,
        cpus_per_task=cpus,
        mem_per_cpu_gb=gigabytes,
        logging_dir=str(run / "datatrove"),
        skip_completed=False,  # our records say what is done
    )
    executor.run()
    ray.shutdown()


if __name__ == "__main__":
    from data_prep.executors.ray_cluster import drive as by_name  # so that tasks find the step under the same name

    run_, address_, *numbers = sys.argv[1:]
    by_name(Path(run_), address_, int(numbers[0]), int(numbers[1]), int(numbers[2]), float(numbers[3]))
