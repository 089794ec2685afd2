"""Worker processes that make shards, and the parent's loop that watches them.

The parent loads the tokenizer once and forks: workers start in milliseconds and share its memory. Each is given one shard after the
other over a pipe, and is replaced after RECYCLE_BYTES of input, because tokenizers keep caches that grow with the text they see.
Sums for the display lie in shared memory without locks, since a lock dies with its holder: one row a shard.

While a worker makes the next shard, the parent commits the last one: as soon as the ids of its samples have been found right, where
they have to be compared (data_prep/parity.py), it flushes its files and writes its record.

A failing shard ends the run at once and by its name: the other workers are killed, which costs their unfinished shards and no more.
So does a worker that is killed from outside (out of memory, kill -9). Workers whose parent is killed end themselves, lest they write
into the next run's files.

`concurrent.futures` does neither: it cannot replace forked workers, and does not say whose process died.
"""

import ctypes
import multiprocessing.connection
import os
import signal
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.config import SplitConfig
from data_prep.errors import InputError, UnreadableText
from data_prep.parity import CORPUS, BackendMismatch, Parity, Sample
from data_prep.planning import Shard
from data_prep.processes import FORK, end_with_parent, in_own_memory
from data_prep.progress import Display
from data_prep.shards import Job, Progress, commit_shard, write_shard
from data_prep.tokenizer.encoding import Encoder

POLL_SECONDS = 0.1
RECYCLE_BYTES = 128_000_000


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a worker needs to make any shard."""

    out: Path
    encoder: Encoder
    split: SplitConfig


@dataclass(slots=True)
class _Worker:
    process: Any
    pipe: Connection
    job: int = -1  # the shard that it makes
    given: int = 0  # bytes of input given so far


@dataclass(slots=True)
class _Failure:
    """Why a shard could not be made."""

    message: str
    remedy: str = ""
    our_fault: bool = False
    unreadable: bool = False  # text of the input


def num_workers(asked: int) -> int:
    """Returns the number of processes: as asked, or one for each core that this process may use."""
    return asked or len(os.sched_getaffinity(0))


def make_shards(
    recipe: Recipe, jobs: list[Job], workers: int, parity: Parity | None = None, display: Display | None = None
) -> list[dict[str, Any]]:
    """Makes shards in parallel and returns their records in the order of `jobs`.

    Args:
        recipe: what a worker needs.
        jobs: the shards.
        workers: how many processes.
        parity: compares samples of every shard before it gets its record, and a sample of the corpus if it was asked to before.
        display: shows progress; None takes the usual one.

    Raises:
        InputError: a shard cannot be read, or a worker died; names the shard.
        BackendMismatch: the backend gives other ids than hf.
    """
    display = display or Display(sum(job.shard.size for job in jobs), len(jobs))
    sums = FORK.RawArray(ctypes.c_int64, 4 * len(jobs))
    table = np.frombuffer(memoryview(sums).cast("B"), dtype=np.int64).reshape(-1, 4)
    # Long shards first, so that none is left over at the end; the files do not depend on the order.
    waiting = deque(sorted(range(len(jobs)), key=lambda n: -jobs[n].shard.size))
    team: list[_Worker] = []
    written: dict[int, dict[str, Any]] = {}  # shards that wait for their samples
    records: dict[int, dict[str, Any]] = {}
    try:
        while len(records) < len(jobs):
            while waiting and len(team) < workers:
                team.append(_hire(recipe, jobs, sums))
            for worker in team:
                _assign(worker, waiting, jobs)
            for worker in _heard(team, parity):
                number, result = worker.job, _answer(worker)
                if isinstance(result, _Failure):
                    _blame(result, parity)
                    raise _as_error(result, jobs[number].shard)
                written[number], sample = result
                if parity is not None:
                    parity.ask(number, sample, recipe.encoder.name)
                worker.job = -1
                if worker.given >= RECYCLE_BYTES or not waiting:
                    team.remove(worker)
                    _dismiss(worker)
                else:
                    _assign(worker, waiting, jobs)
            for number in _found_right(written, parity, jobs):
                records[number] = written.pop(number)
                commit_shard(recipe.out, jobs[number].shard.stem, records[number])
                display.shard_done()
            display.update(*table.sum(axis=0).tolist())
        return [records[number] for number in range(len(jobs))]
    finally:
        for worker in team:
            worker.process.kill()
        for worker in team:
            worker.process.join()
        display.close()


def _assign(worker: _Worker, waiting: deque[int], jobs: list[Job]) -> None:
    """Gives an idle worker the next shard."""
    if worker.job < 0 and waiting:
        worker.job = waiting.popleft()
        worker.given += jobs[worker.job].shard.size
        worker.pipe.send(worker.job)


def _found_right(written: dict[int, dict[str, Any]], parity: Parity | None, jobs: list[Job]) -> list[int]:
    """Returns the written shards that may be committed."""
    if parity is None:
        return list(written)
    try:
        parity.listen()
    except BackendMismatch as error:
        if error.corpus:
            raise
        raise InputError(f"{error}; run the same command again with backend=hf: finished shards are kept") from None
    return [number for number in written if parity.found_right(number)]


def _blame(failure: _Failure, parity: Parity | None) -> None:
    """Waits for what the sample of the corpus says, where a failure may be the backend's."""
    if failure.our_fault and parity is not None:
        parity.wait_for(CORPUS)


def _hire(recipe: Recipe, jobs: list[Job], sums: Any) -> _Worker:
    here, there = FORK.Pipe()
    process = FORK.Process(target=_work, args=(recipe, jobs, sums, there, here), daemon=True)
    process.start()
    there.close()
    return _Worker(process, here)


def _dismiss(worker: _Worker) -> None:
    worker.pipe.send(None)  # closing would not do: workers that were forked later hold a copy of this end
    worker.process.join()


def _heard(team: list[_Worker], parity: Parity | None) -> list[_Worker]:
    """Returns the workers that answered or died, after waiting a moment for one, or for `parity`."""
    pipes = [worker.pipe for worker in team] + ([parity.pipe] if parity is not None else [])
    ready = multiprocessing.connection.wait(pipes, timeout=POLL_SECONDS)
    return [worker for worker in team if worker.pipe in ready]


def _answer(worker: _Worker) -> Any:
    try:
        return worker.pipe.recv()
    except (EOFError, ConnectionError):
        worker.process.join()
    code = worker.process.exitcode
    if code > 0:
        return _Failure(
            f"its worker ended with code {code}; the traceback above is this program's fault", our_fault=True
        )
    return _Failure(
        f"a worker process was killed (signal {-code}), most often because memory ran out",
        "run the same command again with fewer workers: finished shards are kept",
    )


def _as_error(failure: _Failure, shard: Shard) -> Exception:
    message = f"{failure.message} (shard {shard.stem})" + (f"; {failure.remedy}" if failure.remedy else "")
    if failure.our_fault:
        return RuntimeError(message)
    return UnreadableText(message) if failure.unreadable else InputError(message)


def _work(recipe: Recipe, jobs: list[Job], sums: Any, pipe: Connection, parents_end: Connection) -> None:
    """A worker's life."""
    parents_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    end_with_parent()
    in_own_memory(_make_as_told, recipe, jobs, sums, pipe)


def _make_as_told(recipe: Recipe, jobs: list[Job], sums: Any, pipe: Connection) -> None:
    while True:
        number = pipe.recv()
        if number is None:
            return
        pipe.send(_result(recipe, jobs[number], sums, number))


def _result(recipe: Recipe, job: Job, sums: Any, number: int) -> tuple[dict[str, Any], Sample] | _Failure:
    def report(progress: Progress) -> None:
        done = (progress.documents, progress.tokens, progress.text_bytes, progress.input_bytes)
        for column, value in enumerate(done):
            sums[4 * number + column] += value

    try:
        return write_shard(recipe.out, job.shard, job.fingerprint, recipe.encoder, recipe.split, report)
    except InputError as error:
        return _Failure(str(error), unreadable=isinstance(error, UnreadableText))
    except OSError as error:
        if error.errno is None:
            raise
        where = f" ({error.filename})" if error.filename else ""
        return _Failure(f"{error.strerror}{where}", "make room or mend the disk: finished shards are kept")
