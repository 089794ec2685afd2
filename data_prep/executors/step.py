"""The one step of our datatrove pipelines: task number `rank` makes its part of the shards that job.json lists."""

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep.config import SplitConfig
from data_prep.errors import UnreadableText
from data_prep.files import write_json
from data_prep.parity import Parity
from data_prep.planning import Shard
from data_prep.pool import Recipe, make_shards
from data_prep.progress import Display
from data_prep.readers import Piece
from data_prep.shards import Job, known_record
from data_prep.tokenizer.backends import stay_on_one_thread
from data_prep.tokenizer.encoding import Encoder, Vocabulary


def write_job(
    run: Path,
    out: Path,
    vocabulary: dict[str, Any],
    backend: str,
    split: dict[str, Any],
    jobs: list[Job],
    processes: int,
) -> None:
    """Writes job.json: everything that a task needs to know."""
    content = {
        "out": str(out),
        "vocabulary": vocabulary,
        "backend": backend,
        "split": split,
        "processes": processes,
        "jobs": [asdict(job) for job in jobs],
    }
    (run / "failures").mkdir(parents=True)
    write_json(run / "job.json", content)


class TokenizeShards:
    """A step for datatrove's executors, which call it with (data, rank, world_size).

    It is no PipelineStep, since it neither takes nor gives documents; datatrove takes any callable, and pickles this one by name.
    """

    def __init__(self, run: Path) -> None:
        self.run = str(run)

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        """Makes the shards of one task; a failure is written down before it is raised."""
        run = Path(self.run)
        try:
            run_task(run, rank, world_size)
        except (ValueError, RuntimeError) as error:
            write_json(
                run / "failures" / f"{rank:05d}.json",
                {"task": rank, "message": str(error), "unreadable": isinstance(error, UnreadableText)},
            )
            raise


def run_task(run: Path, rank: int, world_size: int) -> None:
    """Makes every `world_size`-th shard of a run, from number `rank` on; those that are there already are left alone."""
    content = json.loads((run / "job.json").read_bytes())
    out = Path(content["out"])
    jobs = [_job(entry) for entry in content["jobs"][rank::world_size]]
    jobs = [job for job in jobs if known_record(out, job.shard.stem, job.fingerprint) is None]
    if not jobs:
        return
    stay_on_one_thread()
    vocabulary, backend = Vocabulary(**content["vocabulary"]), content["backend"]
    parity = Parity(vocabulary.path, vocabulary.specials_as_text) if backend != "hf" else None
    recipe = Recipe(out, Encoder(vocabulary, backend), SplitConfig(**content["split"]))
    silent = Display(sum(job.shard.size for job in jobs), len(jobs), io.StringIO())
    try:
        make_shards(recipe, jobs, content["processes"], parity, silent)
    finally:
        if parity is not None:
            parity.close()


def _job(entry: dict[str, Any]) -> Job:
    shard = entry["shard"]
    pieces = tuple(Piece(**piece) for piece in shard["pieces"])
    return Job(Shard(shard["name"], shard["index"], pieces), entry["fingerprint"])
