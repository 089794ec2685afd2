"""The only step of our datatrove pipelines: task `rank` makes every world_size-th shard that job.json lists."""

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep.config import SplitConfig
from data_prep.corpus.planning import Shard
from data_prep.errors import UnreadableText
from data_prep.files import write_json
from data_prep.progress import Display
from data_prep.readers import Piece
from data_prep.shards.pool import WorkerSetup, make_shards
from data_prep.shards.shard import Job, known_record
from data_prep.tokenizer.backends import use_one_thread
from data_prep.tokenizer.encoding import Encoder, Vocabulary
from data_prep.tokenizer.parity import Parity


def write_job(
    folder: Path,
    out: Path,
    vocabulary: dict[str, Any],
    backend: str,
    split: dict[str, Any],
    jobs: list[Job],
    num_processes: int,
) -> None:
    """Writes job.json: everything that a task needs."""
    content = {
        "out": str(out),
        "vocabulary": vocabulary,
        "backend": backend,
        "split": split,
        "processes": num_processes,
        "jobs": [asdict(job) for job in jobs],
    }
    (folder / "failures").mkdir(parents=True)
    write_json(folder / "job.json", content)


class TokenizeShards:
    """A step for datatrove's executors, which call it with (data, rank, world_size).

    It is not a PipelineStep, since no documents go in or out. datatrove accepts any callable and pickles this one by
    name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        """Makes the shards of one task. Writes a failure to a file before raising it."""
        folder = Path(self.folder)
        try:
            run_task(folder, rank, world_size)
        except (ValueError, RuntimeError) as error:
            write_json(
                folder / "failures" / f"{rank:05d}.json",
                {"task": rank, "message": str(error), "unreadable": isinstance(error, UnreadableText)},
            )
            raise


def run_task(folder: Path, rank: int, world_size: int) -> None:
    """Makes every `world_size`-th shard of a submission, starting at number `rank`; skips finished shards."""
    content = json.loads((folder / "job.json").read_bytes())
    out = Path(content["out"])
    jobs = [_job(entry) for entry in content["jobs"][rank::world_size]]
    jobs = [job for job in jobs if known_record(out, job.shard.stem, job.fingerprint) is None]
    if not jobs:
        return
    use_one_thread()
    vocabulary, backend = Vocabulary(**content["vocabulary"]), content["backend"]
    parity = Parity(vocabulary.path, vocabulary.specials_as_text) if backend != "hf" else None
    setup = WorkerSetup(out, Encoder(vocabulary, backend), SplitConfig(**content["split"]))
    silent = Display(sum(job.shard.size for job in jobs), len(jobs), io.StringIO())
    try:
        make_shards(setup, jobs, content["processes"], parity, silent)
    finally:
        if parity is not None:
            parity.close()


def _job(entry: dict[str, Any]) -> Job:
    shard = entry["shard"]
    pieces = tuple(Piece(**piece) for piece in shard["pieces"])
    return Job(Shard(shard["part"], shard["index"], pieces), entry["fingerprint"])
