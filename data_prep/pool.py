"""Worker processes that make shards, and the parent's loop that watches them.

Processes are spawned; each loads the tokenizer once and takes shards as it becomes free. They share two plain arrays with the
parent, without locks, since a lock dies with its holder: sums for the display, one row a shard, and one flag that says stop.

A failing shard ends the run at once: the others stop at their next batch. A worker that is killed (out of memory, kill -9)
breaks the pool, which is reported. Workers whose parent is killed end themselves, lest they write into the next run's files.
"""

import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.config import SplitConfig
from data_prep.errors import InputError
from data_prep.planning import Shard
from data_prep.progress import Display
from data_prep.shards import Progress, write_shard
from data_prep.tokenizer.backends import BackendMismatch
from data_prep.tokenizer.encoding import Encoder, Vocabulary

POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Job:
    """A shard that has to be made."""

    shard: Shard
    fingerprint: str


class Stopped(Exception):
    """Another shard failed; this one gave up."""


def num_workers(asked: int) -> int:
    """Returns the number of processes: as asked, or one for each core that this process may use."""
    return asked or len(os.sched_getaffinity(0))


def make_shards(
    out: Path, jobs: list[Job], vocabulary: Vocabulary, backend: str, split: SplitConfig, workers: int
) -> list[dict[str, Any]]:
    """Makes shards in parallel and returns their records in the order of `jobs`.

    Raises:
        InputError: a shard cannot be read, or a worker died.
    """
    context = multiprocessing.get_context("spawn")
    sums = context.RawArray(ctypes.c_int64, 4 * len(jobs))
    stop = context.RawValue(ctypes.c_bool, False)
    # The processes are the parallelism: one thread each. The variables are read when a child loads its tokenizer.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    count = max(1, min(workers, len(jobs)))
    display = Display(sum(job.shard.size for job in jobs), len(jobs))
    pool = ProcessPoolExecutor(
        count, mp_context=context, initializer=_start_worker, initargs=(out, vocabulary, backend, split, sums, stop)
    )
    try:
        futures = [pool.submit(_make_shard, number, job) for number, job in enumerate(jobs)]
        _watch(futures, np.frombuffer(memoryview(sums).cast("B"), dtype=np.int64).reshape(-1, 4), display)
        return [future.result() for future in futures]
    except BackendMismatch as error:
        raise InputError(f"{error}; run the same command again with backend=hf: finished shards are kept") from None
    except BrokenProcessPool:
        raise InputError(
            "a worker process was killed, most often because memory ran out; run the same command again with "
            f"workers={max(1, count // 2)}: finished shards are kept"
        ) from None
    finally:
        stop.value = True
        pool.shutdown(cancel_futures=True)
        display.close()


def _watch(futures: list[Future], sums: np.ndarray, display: Display) -> None:
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
            display.shard_done()
        display.update(*sums.sum(axis=0).tolist())


class _Worker:
    """What a worker process keeps between shards: a pool hands its tasks to plain functions, so it hangs on a class."""

    out: Path
    encoder: Encoder
    split: SplitConfig
    sums: Any
    stop: Any


def _start_worker(out: Path, vocabulary: Vocabulary, backend: str, split: SplitConfig, sums: Any, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _Worker.out, _Worker.encoder, _Worker.split = out, Encoder(vocabulary, backend), split
    _Worker.sums, _Worker.stop = sums, stop


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _make_shard(number: int, job: Job) -> dict[str, Any]:
    def report(progress: Progress) -> None:
        if _Worker.stop.value:
            raise Stopped
        done = (progress.documents, progress.tokens, progress.text_bytes, progress.input_bytes)
        for column, value in enumerate(done):
            _Worker.sums[4 * number + column] += value

    return write_shard(_Worker.out, job.shard, job.fingerprint, _Worker.encoder, _Worker.split, report)
