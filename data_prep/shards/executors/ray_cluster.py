"""Ray: datatrove's RayPipelineExecutor, in a process of its own.

That process is Ray's driver. So the command that watches it stays free of Ray's threads and output, and can cancel
everything by ending the driver: Ray then kills the driver's tasks, and a cluster that the driver started.

    python -m data_prep.shards.executors.ray_cluster FOLDER ADDRESS TASKS WORKERS CPUS GB
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
from data_prep.progress import Log
from data_prep.run_config import RayExecutor
from data_prep.shards.executors.step import TokenizeShards

STORE_BYTES = 100_000_000  # only job descriptions go through Ray's object store
GRACE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class RayHandle:
    """A running driver."""

    process: subprocess.Popen
    submission: Path

    def alive(self) -> bool:
        """Returns whether the driver is running."""
        return self.process.poll() is None

    def cancel(self) -> None:
        """Ends the driver, and with it the tasks."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=GRACE_SECONDS)
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def folder(self) -> Path:
        """Returns the folder of the submission."""
        return self.submission


def submit(executor: RayExecutor, out: Path, folder: Path, num_shards: int, log: Log) -> RayHandle:
    """Starts the driver; ConfigurationError if Ray is not installed."""
    if find_spec("ray") is None:
        raise ConfigurationError(
            "executor=ray needs ray; install it with `pip install -e '.[cluster]'`, or use executor=local"
        )
    tasks = min(executor.tasks, num_shards)
    workers = executor.workers or -1
    arguments = [folder, executor.address or "local", tasks, workers, executor.cpus_per_task, executor.mem_per_cpu_gb]
    command = [sys.executable, "-m", "data_prep.shards.executors.ray_cluster", *map(str, arguments)]
    log(f"Ray at {executor.address or 'a cluster of its own'}: {tasks} tasks, logs in {folder}")
    with open(folder / "driver.log", "w") as log_file:
        process = subprocess.Popen(command, stdout=log_file, stderr=subprocess.STDOUT, start_new_session=True)
    return RayHandle(process, folder)


def drive(folder: Path, address: str, tasks: int, workers: int, cpus: int, gigabytes: float) -> None:
    """Runs the tasks of a submission on a Ray cluster; the address "local" starts a temporary one."""
    import ray
    from datatrove.executor import RayPipelineExecutor

    if address == "local":
        cores = len(os.sched_getaffinity(0))
        wanted = max(cores, cpus * min(tasks, workers if workers > 0 else cores))
        ray.init("local", num_cpus=wanted, include_dashboard=False, object_store_memory=STORE_BYTES)
    else:
        ray.init(address)
    executor = RayPipelineExecutor(
        pipeline=[TokenizeShards(folder)],
        tasks=tasks,
        workers=workers,
        cpus_per_task=cpus,
        mem_per_cpu_gb=gigabytes,
        logging_dir=str(folder / "datatrove"),
        skip_completed=False,  # our records show what is done
    )
    executor.run()
    ray.shutdown()


if __name__ == "__main__":
    from data_prep.shards.executors.ray_cluster import (
        drive as imported_drive,  # so that tasks find the step under the same name
    )

    folder_, address_, *numbers = sys.argv[1:]
    imported_drive(Path(folder_), address_, int(numbers[0]), int(numbers[1]), int(numbers[2]), float(numbers[3]))
