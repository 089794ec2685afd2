"""Worker processes that make shards, and the parent's loop that watches them.

The parent loads the tokenizer once and forks, so workers start in milliseconds and share its memory. Each gets its
shards over a pipe, one at a time. A worker is replaced after RECYCLE_BYTES of input, because tokenizers keep caches
that grow with the text they see. The sums for the progress display are in shared memory, one entry per shard. They have
no lock, because a lock stays locked if its holder dies.

While a worker makes the next shard, the parent commits the last one: it flushes the files and writes the record. If ids
have to be compared (data_prep/tokenizer/parity.py), it waits until the samples of that shard are confirmed.

A failing shard ends the run at once, with its name. The other workers are killed, which costs only their unfinished
shards. A worker that is killed from outside (out of memory, kill -9) also ends the run. Workers exit if their parent is
killed, so that they cannot write into the files of the next run.

`concurrent.futures` cannot replace forked workers and does not report which process died.
"""

import ctypes
import multiprocessing.connection
import signal
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.config import SplitConfig
from data_prep.corpus.planning import Shard
from data_prep.errors import InputError, UnreadableText
from data_prep.processes import FORK, exit_with_parent, run_in_own_heap
from data_prep.progress import Display
from data_prep.shards.shard import Job, Progress, commit_shard, write_shard
from data_prep.tokenizer.encoding import Encoder
from data_prep.tokenizer.parity import CORPUS_SAMPLE, BackendMismatch, Parity, Sample

POLL_SECONDS = 0.1
RECYCLE_BYTES = 128_000_000


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What a worker needs to make any shard."""

    out: Path
    encoder: Encoder
    split: SplitConfig


@dataclass(slots=True)
class _Worker:
    process: Any
    pipe: Connection
    job: int = -1  # the shard that it is making; -1: idle
    assigned_bytes: int = 0  # bytes of input so far


@dataclass(slots=True)
class _Failure:
    """Why a shard could not be made."""

    message: str
    remedy: str = ""
    internal: bool = False  # a bug in this program
    unreadable: bool = False  # text of the input cannot be read


def make_shards(
    setup: WorkerSetup, jobs: list[Job], num_workers: int, parity: Parity | None = None, display: Display | None = None
) -> list[dict[str, Any]]:
    """Makes shards in parallel and returns their records in the order of `jobs`.

    Args:
        setup: what a worker needs.
        jobs: the shards.
        num_workers: number of processes.
        parity: compares samples of every shard before its record is written, and the sample of the corpus if one was submitted.
        display: shows progress; None for the default one.

    Raises:
        InputError: a shard cannot be read, or a worker died; names the shard.
        BackendMismatch: the backend's ids differ from those of hf.
    """
    display = display or Display(sum(job.shard.size for job in jobs), len(jobs))
    sums = FORK.RawArray(ctypes.c_int64, 4 * len(jobs))
    table = np.frombuffer(memoryview(sums).cast("B"), dtype=np.int64).reshape(-1, 4)
    # Large shards first, so that none is left over at the end. The files do not depend on the order.
    waiting = deque(sorted(range(len(jobs)), key=lambda n: -jobs[n].shard.size))
    workers: list[_Worker] = []
    written: dict[int, dict[str, Any]] = {}  # records of shards whose samples are not confirmed yet
    records: dict[int, dict[str, Any]] = {}
    try:
        while len(records) < len(jobs):
            while waiting and len(workers) < num_workers:
                workers.append(_start_worker(setup, jobs, sums))
            for worker in workers:
                _assign(worker, waiting, jobs)
            for worker in _ready_workers(workers, parity):
                number, result = worker.job, _receive(worker)
                if isinstance(result, _Failure):
                    _await_corpus_sample(result, parity)
                    raise _as_error(result, jobs[number].shard)
                written[number], sample = result
                if parity is not None:
                    parity.submit(number, sample, setup.encoder.name)
                worker.job = -1
                if worker.assigned_bytes >= RECYCLE_BYTES or not waiting:
                    workers.remove(worker)
                    _stop_worker(worker)
                else:
                    _assign(worker, waiting, jobs)
            for number in _confirmed(written, parity):
                records[number] = written.pop(number)
                commit_shard(setup.out, jobs[number].shard.stem, records[number])
                display.shard_done()
            display.update(*table.sum(axis=0).tolist())
        return [records[number] for number in range(len(jobs))]
    finally:
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.join()
        display.close()


def _assign(worker: _Worker, waiting: deque[int], jobs: list[Job]) -> None:
    """Gives an idle worker the next shard."""
    if worker.job < 0 and waiting:
        worker.job = waiting.popleft()
        worker.assigned_bytes += jobs[worker.job].shard.size
        worker.pipe.send(worker.job)


def _confirmed(written: dict[int, dict[str, Any]], parity: Parity | None) -> list[int]:
    """Returns the written shards that may be committed."""
    if parity is None:
        return list(written)
    try:
        parity.receive()
    except BackendMismatch as error:
        if error.corpus:
            raise
        raise InputError(f"{error}; run the same command again with backend=hf: finished shards are kept") from None
    return [number for number in written if parity.is_confirmed(number)]


def _await_corpus_sample(failure: _Failure, parity: Parity | None) -> None:
    """Waits for the sample of the corpus if a failure may be the backend's: a mismatch is then raised instead."""
    if failure.internal and parity is not None:
        parity.wait_for(CORPUS_SAMPLE)


def _start_worker(setup: WorkerSetup, jobs: list[Job], sums: Any) -> _Worker:
    here, there = FORK.Pipe()
    process = FORK.Process(target=_worker_main, args=(setup, jobs, sums, there, here), daemon=True)
    process.start()
    there.close()
    return _Worker(process, here)


def _stop_worker(worker: _Worker) -> None:
    worker.pipe.send(None)  # closing the pipe does not reach it: workers forked later hold a copy of this end
    worker.process.join()


def _ready_workers(workers: list[_Worker], parity: Parity | None) -> list[_Worker]:
    """Returns the workers that answered or died, after waiting briefly for one of them or for `parity`."""
    pipes = [worker.pipe for worker in workers] + ([parity.pipe] if parity is not None else [])
    ready = multiprocessing.connection.wait(pipes, timeout=POLL_SECONDS)
    return [worker for worker in workers if worker.pipe in ready]


def _receive(worker: _Worker) -> Any:
    try:
        return worker.pipe.recv()
    except (EOFError, ConnectionError):
        worker.process.join()
    code = worker.process.exitcode
    if code > 0:
        return _Failure(
            f"its worker ended with code {code}; the traceback above shows a bug in this program", internal=True
        )
    return _Failure(
        f"a worker process was killed (signal {-code}), most often because memory ran out",
        "run the same command again with fewer workers: finished shards are kept",
    )


def _as_error(failure: _Failure, shard: Shard) -> Exception:
    message = f"{failure.message} (shard {shard.stem})" + (f"; {failure.remedy}" if failure.remedy else "")
    if failure.internal:
        return RuntimeError(message)
    return UnreadableText(message) if failure.unreadable else InputError(message)


def _worker_main(setup: WorkerSetup, jobs: list[Job], sums: Any, pipe: Connection, parents_end: Connection) -> None:
    parents_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    exit_with_parent()
    run_in_own_heap(_serve, setup, jobs, sums, pipe)


def _serve(setup: WorkerSetup, jobs: list[Job], sums: Any, pipe: Connection) -> None:
    """Makes the shards that the parent names, until it sends None."""
    while True:
        number = pipe.recv()
        if number is None:
            return
        pipe.send(_result(setup, jobs[number], sums, number))


def _result(setup: WorkerSetup, job: Job, sums: Any, number: int) -> tuple[dict[str, Any], Sample] | _Failure:
    def report(progress: Progress) -> None:
        done = (progress.documents, progress.tokens, progress.text_bytes, progress.input_bytes)
        for column, value in enumerate(done):
            sums[4 * number + column] += value

    try:
        return write_shard(setup.out, job.shard, job.fingerprint, setup.encoder, setup.split, report)
    except InputError as error:
        return _Failure(str(error), unreadable=isinstance(error, UnreadableText))
    except OSError as error:
        if error.errno is None:
            raise
        where = f" ({error.filename})" if error.filename else ""
        return _Failure(f"{error.strerror}{where}", "free some space or repair the disk: finished shards are kept")
