"""Making shards on other machines: Slurm job arrays and Ray clusters, both by datatrove's executors.

The run's folder, work/runs/ID, is on a disk that all machines see. It holds job.json (what to make), the executor's own logs, and
failures/, where a task that cannot go on leaves its reason. Shards are written there as anywhere, with their record last, and the
records are all that counts: datatrove's own marks of completion are not looked at, since they do not know whether an output is
still there or its input the same. So a run may be interrupted, and continued by another executor.

`launch` submits, then watches records and failures: it shows progress, ends on the first failure by cancelling the rest, and
returns the records.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from data_prep.config import Config
from data_prep.errors import ConfigurationError, InputError, UnreadableText
from data_prep.executors.step import write_job
from data_prep.progress import Display, Say
from data_prep.shards import Job, known_record
from data_prep.tokenizer.encoding import Vocabulary

POLL_SECONDS = 0.2


class Handle(Protocol):
    """Tasks that were submitted."""

    def alive(self) -> bool:
        """Returns whether any may still run."""
        ...

    def cancel(self) -> None:
        """Ends all of them."""
        ...

    def where(self) -> str:
        """Returns where their logs are."""
        ...


def launch(
    config: Config, out: Path, vocabulary: Vocabulary, backend: str, jobs: list[Job], say: Say
) -> list[dict[str, Any]] | None:
    """Returns the records of shards made elsewhere, in the order of `jobs`; None where the settings say not to wait.

    Raises:
        InputError: a task failed, or ended without its shards.
        ConfigurationError: the executor's packages or programs are not installed.
    """
    handle = _submit(config, out, vocabulary, backend, jobs, say)
    if not getattr(config.executor, "wait", True):
        say("the jobs are queued; run the same command again to go on once they are done")
        return None
    display = Display(sum(job.shard.size for job in jobs), len(jobs))
    records: dict[str, dict[str, Any]] = {}
    try:
        while len(records) < len(jobs):
            running = handle.alive()  # asked before the records are read, so that none comes between
            _collect(out, jobs, records, display)
            _check(handle, running, out, jobs, records)
            time.sleep(POLL_SECONDS)
    except BaseException:
        handle.cancel()
        raise
    finally:
        display.close()
    return [records[job.shard.stem] for job in jobs]


def _submit(config: Config, out: Path, vocabulary: Vocabulary, backend: str, jobs: list[Job], say: Say) -> Handle:
    try:
        import datatrove as _  # noqa: F401
    except ImportError:
        raise ConfigurationError(
            f"executor={config.executor.kind} needs datatrove; install it with `pip install -e '.[cluster]'`, or use "
            "executor=local"
        ) from None
    run = out / "work" / "runs" / f"{config.executor.kind}-{time.time_ns()}"
    if config.executor.kind == "slurm":
        from data_prep.executors.slurm_array import attach, submit

        if handle := attach(out):
            say(f"waiting for Slurm job {handle.job_id}, which is making these shards")
            return handle
    else:
        from data_prep.executors.ray_cluster import submit
    write_job(run, out, asdict(vocabulary), backend, asdict(config.split), jobs, config.executor.cpus_per_task)
    return submit(config.executor, out, run, len(jobs), say)


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


def _check(handle: Handle, running: bool, out: Path, jobs: list[Job], records: dict[str, dict[str, Any]]) -> None:
    for path in sorted((Path(handle.where()) / "failures").glob("*.json")):
        failure = json.loads(path.read_bytes())
        raise (UnreadableText if failure["unreadable"] else InputError)(failure["message"])
    missing = [job.shard.stem for job in jobs if job.shard.stem not in records]
    if missing and not running:
        raise InputError(
            f"{len(missing)} of {len(jobs)} shards were not made, the first is {missing[0]}: their tasks ended without a word "
            f"(killed, or out of memory or time); look into {handle.where()}, then run the same command again"
        )
