"""Making shards on other machines: Slurm job arrays and Ray clusters, both through datatrove's executors.

The folder of a submission, work/runs/ID, is on a disk that all machines share. It holds job.json (what to make), the
executor's own logs, and failures/, where a task that cannot continue writes its reason. Shards are written as on one
machine, with their record last, and only records count. datatrove's own completion markers are ignored: they do not
show whether an output still exists or its input is unchanged. So a submission may be interrupted, and another executor
can continue it.

`launch` submits the tasks, then watches records and failures. It shows progress, cancels the rest on the first failure,
and returns the records.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from data_prep.config import Config
from data_prep.errors import ConfigurationError, InputError, UnreadableText
from data_prep.progress import Display, Log
from data_prep.shards.executors.step import write_job
from data_prep.shards.shard import Job, known_record
from data_prep.tokenizer.encoding import Vocabulary

POLL_SECONDS = 0.2


class Handle(Protocol):
    """Submitted tasks."""

    def alive(self) -> bool:
        """Returns whether any task may still run."""
        ...

    def cancel(self) -> None:
        """Cancels all tasks."""
        ...

    def folder(self) -> Path:
        """Returns the folder of the submission, which holds its logs."""
        ...


def queued_tasks_may_run(out: Path) -> bool:
    """Returns whether tasks that an earlier command queued for this dataset still wait or run. Their files must be left alone."""
    from data_prep.shards.executors.slurm_array import attach

    return attach(out) is not None


def launch(
    config: Config, out: Path, vocabulary: Vocabulary, backend: str, jobs: list[Job], log: Log
) -> list[dict[str, Any]] | None:
    """Returns the records of shards made on other machines, in the order of `jobs`, or None with executor.wait=false.

    Raises:
        InputError: a task failed, or ended without making its shards.
        ConfigurationError: the executor's packages or programs are not installed.
    """
    handle = _submit(config, out, vocabulary, backend, jobs, log)
    if not getattr(config.executor, "wait", True):
        log("the jobs are queued; run the same command again once they are done to continue")
        return None
    display = Display(sum(job.shard.size for job in jobs), len(jobs))
    records: dict[str, dict[str, Any]] = {}
    try:
        while len(records) < len(jobs):
            running = handle.alive()  # checked before the records are read, so that no last record is missed
            _collect(out, jobs, records, display)
            _check(handle, running, jobs, records)
            time.sleep(POLL_SECONDS)
    except BaseException:
        handle.cancel()
        raise
    finally:
        display.close()
    return [records[job.shard.stem] for job in jobs]


def _submit(config: Config, out: Path, vocabulary: Vocabulary, backend: str, jobs: list[Job], log: Log) -> Handle:
    executor: Any = config.executor  # Slurm's or Ray's, each for its own `submit`
    try:
        import datatrove as _  # noqa: F401
    except ImportError:
        raise ConfigurationError(
            f"executor={executor.kind} needs datatrove; install it with `pip install -e '.[cluster]'`, or use "
            "executor=local"
        ) from None
    folder = out / "work" / "runs" / f"{executor.kind}-{time.time_ns()}"
    if executor.kind == "slurm":
        from data_prep.shards.executors.slurm_array import attach, submit

        if handle := attach(out):
            log(f"waiting for Slurm job {handle.job_id}, which is making these shards")
            return handle
    else:
        from data_prep.shards.executors.ray_cluster import submit
    write_job(folder, out, asdict(vocabulary), backend, asdict(config.split), jobs, executor.cpus_per_task)
    return submit(executor, out, folder, len(jobs), log)


def _collect(out: Path, jobs: list[Job], records: dict[str, dict[str, Any]], display: Display) -> None:
    for job in jobs:
        if job.shard.stem not in records and (record := known_record(out, job.shard.stem, job.fingerprint)):
            records[job.shard.stem] = record
            display.shard_done()
    display.update(
        sum(record["source_documents"] for record in records.values()),
        sum(info["tokens"] for record in records.values() for info in record["splits"].values() if info),
        sum(record["text_bytes"] for record in records.values()),
        sum(job.shard.size for job in jobs if job.shard.stem in records),
    )


def _check(handle: Handle, running: bool, jobs: list[Job], records: dict[str, dict[str, Any]]) -> None:
    for path in sorted((handle.folder() / "failures").glob("*.json")):
        failure = json.loads(path.read_bytes())
        raise (UnreadableText if failure["unreadable"] else InputError)(failure["message"])
    missing = [job.shard.stem for job in jobs if job.shard.stem not in records]
    if missing and not running:
        raise InputError(
            f"{len(missing)} of {len(jobs)} shards were not made, the first is {missing[0]}: their tasks ended without an error "
            f"message (killed, or out of memory or time); check the logs in {handle.folder()}, then run the same command again"
        )
