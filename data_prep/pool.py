"""Worker processes that make shards, and the parent's loop that watches them.

Processes are spawned, each loads the tokenizer once and takes shards as it becomes free. Sums for the progress display travel
through one small shared array. A failing shard ends the run at once: the others stop at their next batch. A worker that is
killed (out of memory, kill -9) breaks the pool, which is reported too: nothing hangs.
"""

import multiprocessing
import os
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.config import SplitConfig
from data_prep.errors import InputError
from data_prep.planning import Shard
from data_prep.progress import Display
from data_prep.shards import Progress, write_shard
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


def make_shards(out: Path, jobs: list[Job], vocabulary: Vocabulary, split: SplitConfig, workers: int) -> list[dict[str, Any]]:
    """Makes shards in parallel and returns their records in the order of `jobs`.

    Raises:
        InputError: a shard cannot be read, or a worker died.
    """
    context = multiprocessing.get_context("spawn")
    sums = context.Array("q", 4)
    stop = context.Event()
    # One thread a process: the processes are the parallelism. Read when the child loads its tokenizer.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    display = Display(sum(job.shard.size for job in jobs), len(jobs))
    count = max(1, min(workers, len(jobs)))
    arguments = (out, vocabulary, split, sums, stop)
    with ProcessPoolExecutor(count, mp_context=context, initializer=_start_worker, initargs=arguments) as pool:
        futures = [pool.submit(_make_shard, job) for job in jobs]
        try:
            _watch(futures, sums, display)
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise InputError(
                "a worker process was killed, most often because memory ran out; run the same command again with "
                f"workers={max(1, count // 2)}: finished shards are kept"
            ) from None
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
            display.close()


def _watch(futures: list[Future], sums: Any, display: Display) -> None:
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
        display.update(*sums[:])
        for future in done:
            future.result()
            display.shard_done()


class _Worker:
    """What a worker process keeps between shards."""

    out: Path
    encoder: Encoder
    split: SplitConfig
    sums: Any
    stop: Any


def _start_worker(out: Path, vocabulary: Vocabulary, split: SplitConfig, sums: Any, stop: Any) -> None:
    _Worker.out, _Worker.encoder, _Worker.split = out, Encoder(vocabulary), split
    _Worker.sums, _Worker.stop = sums, stop


def _make_shard(job: Job) -> dict[str, Any]:
    return write_shard(_Worker.out, job.shard, job.fingerprint, _Worker.encoder, _Worker.split, _report)


def _report(progress: Progress) -> None:
    if _Worker.stop.is_set():
        raise Stopped
    with _Worker.sums.get_lock():
        for index, value in enumerate((progress.documents, progress.tokens, progress.text_bytes, progress.input_bytes)):
            _Worker.sums[index] += value
