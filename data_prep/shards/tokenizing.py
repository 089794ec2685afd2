"""The stage `tokenize`: makes every missing shard, with the executor of the settings, until the token budget is met."""

import json
import resource
import time
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.config import Config, Verify
from data_prep.corpus.planning import Shard
from data_prep.errors import InputError
from data_prep.files import digest
from data_prep.processes import worker_count
from data_prep.progress import Log
from data_prep.readers import read_piece
from data_prep.shards.binaries import remove_files
from data_prep.shards.budget import choose, shares
from data_prep.shards.executors import launch, queued_tasks_may_run
from data_prep.shards.groups import group_shards, joined_record
from data_prep.shards.pool import WorkerSetup, make_shards
from data_prep.shards.shard import (
    FinishedShard,
    Job,
    counts_path,
    has_files,
    known_record,
    record_path,
    shard_prefix,
)
from data_prep.shards.skipped import log_skipped, skipped_of
from data_prep.shards.work import Work
from data_prep.tokenizer.backends import choose_backend, needs_parity_check, use_one_thread
from data_prep.tokenizer.encoding import Encoder
from data_prep.tokenizer.parity import CORPUS_SAMPLE, BackendMismatch, Parity, Sample
from ssa_pretrain.data.manifest import SPLITS
from ssa_pretrain.settings.files import remove_unfinished

SAMPLE_DOCUMENTS, SAMPLE_BYTES = 1_000, 250_000  # over all shards; a faster backend must agree on them
SAMPLE_SHARDS = 20


def tokenize(config: Config, out: Path, work: Work, log: Log) -> list[FinishedShard] | None:
    """Makes the missing shards; returns those that the dataset consists of, or None if cluster jobs were queued.

    Raises:
        InputError: the text cannot be read, or a worker died; names the shard.
        ConfigurationError: the mix does not fit the corpus, or the backend cannot be used.
    """
    shares(config.mix, work.jobs)  # rejects a mix that does not fit the corpus before any work is done
    if not queued_tasks_may_run(out):
        _remove_leftovers(out, {job.shard.stem for job in work.jobs})
    records = _records(out, work.jobs)
    missing_shards = MissingShards(config, out)
    first = True
    while True:
        chosen = _chosen(config, work, records)
        missing = missing_shards.find(chosen, records)
        if first and len(missing) < len(chosen):
            log(f"reusing {len(chosen) - len(missing)} of {len(chosen)} shards")
        if not missing:
            shards = [FinishedShard(job, records[job.shard.stem]) for job in chosen]
            log_skipped(shards, log)
            return shards
        for job in missing:
            if job.shard.stem in records:  # without its files; a cluster task would treat it as done
                record_path(out, job.shard.stem).unlink(missing_ok=True)
        new = _make(config, out, work, missing, log)
        if new is None:
            return None
        for job, record in zip(missing, new, strict=True):
            records[job.shard.stem] = record
        missing_shards.present |= {job.shard.stem for job in missing}
        first = False


def finished_shards(config: Config, out: Path, work: Work) -> list[FinishedShard] | None:
    """Returns the shards that the dataset consists of, or None if some are missing."""
    records = _records(out, work.jobs)
    chosen = _chosen(config, work, records)
    if MissingShards(config, out).find(chosen, records):
        return None
    return [FinishedShard(job, records[job.shard.stem]) for job in chosen]


class MissingShards:
    """Finds the shards whose tokens are neither in their own files nor in a joined file; a joined shard's own files are removed.

    Files are checked once.

    Attributes:
        present: stems of the shards that are known to have their own files.
    """

    def __init__(self, config: Config, out: Path) -> None:
        self.present: set[str] = set()
        self._config, self._out = config, out
        self._joined: set[str] = set()

    def find(self, chosen: list[Job], records: dict[str, dict[str, Any]]) -> list[Job]:
        """Returns the chosen shards that have to be made, in their order."""
        full, missing = self._config.verify is Verify.full, set()
        shards = [FinishedShard(job, records.get(job.shard.stem, {})) for job in chosen]
        for group in group_shards(shards, self._config.merge.files):
            if digest(group.key) in self._joined:
                continue
            joined = len(group.members) > 1 and all(member.record for member in group.members)
            if joined and joined_record(self._out, group, full):
                self._joined.add(digest(group.key))
                continue
            for member in group.members:
                stem = member.job.shard.stem
                if stem not in self.present and member.record and has_files(self._out, member.record, full):
                    self.present.add(stem)
                if stem not in self.present:
                    missing.add(stem)
        return [job for job in chosen if job.shard.stem in missing]


def _records(out: Path, jobs: list[Job]) -> dict[str, dict[str, Any]]:
    """Returns the records of shards that were made, whether or not their files still exist."""
    found = {}
    for job in jobs:
        record = known_record(out, job.shard.stem, job.fingerprint)
        # A shard that lacks text does not satisfy on_error=fail.
        if record is not None and (not skipped_of(record) or any(p.on_error == "skip" for p in job.shard.pieces)):
            found[job.shard.stem] = record
    return found


def _chosen(config: Config, work: Work, records: dict[str, dict[str, Any]]) -> list[Job]:
    """Returns the shards that the budget needs, given the shards that were made."""
    return choose(config.mix, work.jobs, {stem: _train_tokens(record) for stem, record in records.items()})


def _train_tokens(record: dict[str, Any]) -> int:
    return record["splits"]["train"]["tokens"] if record["splits"]["train"] else 0


def _make(config: Config, out: Path, work: Work, missing: list[Job], log: Log) -> list[dict[str, Any]] | None:
    """Makes shards with the fastest backend that gives the right ids; returns their records, or None if jobs were queued."""
    use_one_thread()
    path, specials_as_text = work.vocabulary.path, work.vocabulary.specials_as_text
    parity = Parity(path, specials_as_text, work.hf_backend) if needs_parity_check(config.backend) else None
    rejections: dict[str, str] = {}
    try:
        while True:
            name, reason, backend = choose_backend(config.backend, path, specials_as_text, rejections, work.hf_backend)
            try:
                encoder = Encoder(work.vocabulary, name, backend)
                return _make_with(config, out, encoder, reason, missing, parity if name != "hf" else None, log)
            except BackendMismatch as error:
                rejections[name] = str(error)
    finally:
        if parity is not None:
            parity.close()


def _make_with(
    config: Config, out: Path, encoder: Encoder, reason: str, missing: list[Job], parity: Parity | None, log: Log
) -> list[dict[str, Any]] | None:
    """Makes shards with one backend; BackendMismatch if its ids are wrong on the sample of the corpus."""
    executor, backend = config.executor.kind, encoder.name
    num_workers = min(worker_count(config.workers), len(missing))
    processes = f"{num_workers} processes" if executor == "local" else f"executor={executor}"
    if parity is not None:
        texts = _sample_documents([job.shard for job in missing])
        parity.submit(CORPUS_SAMPLE, Sample.of(texts, encoder.encode_plain(texts)), backend)
    log(f"tokenizing {len(missing)} shards with {processes}, backend {backend} ({reason})")
    started, cpu_before = time.monotonic(), _child_seconds()
    if executor == "local":
        records = make_shards(WorkerSetup(out, encoder, config.split), missing, num_workers, parity)
    else:
        if parity is not None:
            parity.wait_for(CORPUS_SAMPLE)
        records = launch(config, out, encoder.vocabulary, backend, missing, log)
        if records is None:
            return None
    rate = {
        "executor": executor,
        "backend": backend,
        "workers": getattr(config.executor, "tasks", num_workers),
        "text_bytes": sum(record["text_bytes"] for record in records),
        "tokens": sum(info["tokens"] for record in records for info in record["splits"].values() if info),
        "seconds": round(time.monotonic() - started, 3),
        "cpu_seconds": round(_child_seconds() - cpu_before, 3) if executor == "local" else None,  # of the workers
    }
    with open(out / "work" / "rates.jsonl", "a") as file:
        file.write(json.dumps(rate) + "\n")
    return records


def _child_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _sample_documents(shards: list[Shard]) -> list[str]:
    """Returns documents from the beginnings of up to SAMPLE_SHARDS shards, spread over the plan."""
    chosen = shards[:: max(1, len(shards) // SAMPLE_SHARDS)][:SAMPLE_SHARDS]
    texts: list[str] = []
    for shard in chosen:
        try:
            texts += _first_documents(shard, SAMPLE_DOCUMENTS // len(chosen), SAMPLE_BYTES // len(chosen))
        except InputError as error:
            raise type(error)(f"{error} (shard {shard.stem})") from None
    return texts


def _first_documents(shard: Shard, num_documents: int, max_bytes: int) -> list[str]:
    texts, size = [], 0
    for text, raw in islice(read_piece(shard.pieces[0], lambda _: None), num_documents):
        size += len(raw)
        if size > max_bytes:
            break
        texts.append(text)
    return texts


def _remove_leftovers(out: Path, stems: set[str]) -> None:
    """Removes what earlier runs left: unfinished files, and shards that are not in this plan."""
    shards = out / "work" / "shards"
    for folder in (out, out / "text", out / "work", shards, *(shards / s for s in SPLITS), *(out / s for s in SPLITS)):
        remove_unfinished(folder)
    for record in shards.glob("*.json"):
        if record.stem not in stems:
            for split in SPLITS:
                remove_files(out / shard_prefix(split, record.stem))
            counts_path(out, record.stem).unlink(missing_ok=True)
            record_path(out, record.stem).unlink()
    for path in [path for split in SPLITS for path in (shards / split).glob("*.*")]:
        if path.stem not in stems:
            path.unlink()  # of a run that was killed before it wrote the record
