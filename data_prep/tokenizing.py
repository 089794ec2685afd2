"""The stage `tokenize`: every shard that is missing, by the executor of the settings, until the token budget is met."""

import json
import resource
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.budget import choose, shares
from data_prep.config import Config, Verify
from data_prep.corpus import Work
from data_prep.errors import InputError
from data_prep.executors import launch
from data_prep.files import digest, remove_unfinished
from data_prep.merging import groups_of, joined_record
from data_prep.parity import CORPUS, BackendMismatch, Parity, Sample
from data_prep.planning import Shard
from data_prep.pool import Recipe, make_shards, num_workers
from data_prep.progress import Say
from data_prep.readers import read_piece
from data_prep.shards import Job, Made, counts_path, has_files, known_record, record_path, shard_prefix, skipped_of
from data_prep.tokenizer.backends import choose_backend, is_compared, stay_on_one_thread
from data_prep.tokenizer.encoding import Encoder
from data_prep.unreadable import tell_skipped
from ssa_pretrain.data.indexed_format import SPLITS

SAMPLE_DOCUMENTS, SAMPLE_BYTES = 1_000, 250_000  # on which a faster backend must agree, over all shards


def tokenize(config: Config, out: Path, work: Work, say: Say) -> list[Made] | None:
    """Makes the shards that are missing and returns those that the dataset consists of; None where jobs were queued.

    Raises:
        InputError: the text cannot be read, or a worker died; names the shard.
        ConfigurationError: the mix does not fit the corpus, or the backend cannot be used.
    """
    shares(config.mix, work.jobs)  # refuses a mix that does not fit before anything is made
    _remove_strangers(out, {job.shard.stem for job in work.jobs})
    records = _records(out, work.jobs)
    lacking = Lacking(config, out)
    first = True
    while True:
        chosen = choose(config.mix, work.jobs, {stem: _train_tokens(record) for stem, record in records.items()})
        missing = lacking(chosen, records)
        if first and len(missing) < len(chosen):
            say(f"reusing {len(chosen) - len(missing)} of {len(chosen)} shards")
        if not missing:
            made = [Made(job, records[job.shard.stem]) for job in chosen]
            tell_skipped(made, say)
            return made
        for job in missing:
            record_path(out, job.shard.stem).unlink(missing_ok=True)  # lest a task of a cluster take it for made
        new = _make(config, out, work, missing, say)
        if new is None:
            return None
        for job, record in zip(missing, new, strict=True):
            records[job.shard.stem] = record
        lacking.made |= {job.shard.stem for job in missing}
        first = False


def made_shards(config: Config, out: Path, work: Work) -> list[Made] | None:
    """Returns the shards that the dataset consists of, None if some are missing."""
    records = _records(out, work.jobs)
    chosen = choose(config.mix, work.jobs, {stem: _train_tokens(record) for stem, record in records.items()})
    if Lacking(config, out)(chosen, records):
        return None
    return [Made(job, records[job.shard.stem]) for job in chosen]


def _records(out: Path, jobs: list[Job]) -> dict[str, dict[str, Any]]:
    """Returns the records of shards that were made, whether or not their files are still there."""
    found = {}
    for job in jobs:
        record = known_record(out, job.shard.stem, job.fingerprint)
        # A shard that lacks text is not what on_error=fail asks for.
        if record is not None and (not skipped_of(record) or any(p.on_error == "skip" for p in job.shard.pieces)):
            found[job.shard.stem] = record
    return found


class Lacking:
    """Which shards have to be made, or made again, before the dataset's files can be: a shard's own files go once it lies in a joined one.

    `made` holds the shards that are known to have theirs; files are looked at once.
    """

    def __init__(self, config: Config, out: Path) -> None:
        self.made: set[str] = set()
        self._config, self._out = config, out
        self._joined: set[str] = set()

    def __call__(self, chosen: list[Job], records: dict[str, dict[str, Any]]) -> list[Job]:
        """Returns those of the chosen shards, in their order, that neither have their files nor lie in the joined file that the settings ask for."""
        full, lacking = self._config.verify is Verify.full, set()
        for group in groups_of(
            [Made(job, records.get(job.shard.stem, {})) for job in chosen], self._config.merge.files
        ):
            if digest(group.key) in self._joined:
                continue
            joined = len(group.members) > 1 and all(one.record for one in group.members)
            if joined and joined_record(self._out, group, full):
                self._joined.add(digest(group.key))
                continue
            for one in group.members:
                stem = one.job.shard.stem
                if stem not in self.made and one.record and has_files(self._out, one.record, full):
                    self.made.add(stem)
                if stem not in self.made:
                    lacking.add(stem)
        return [job for job in chosen if job.shard.stem in lacking]


def _train_tokens(record: dict[str, Any]) -> int:
    return record["splits"]["train"]["tokens"] if record["splits"]["train"] else 0


def _make(config: Config, out: Path, work: Work, missing: list[Job], say: Say) -> list[dict[str, Any]] | None:
    stay_on_one_thread()
    path, specials_as_text = work.vocabulary.path, work.vocabulary.specials_as_text
    parity = Parity(path, specials_as_text, work.exact) if is_compared(config.backend) else None
    objections: dict[str, str] = {}
    try:
        while True:
            name, reason, backend = choose_backend(config.backend, path, specials_as_text, objections, work.exact)
            try:
                encoder = Encoder(work.vocabulary, name, backend)
                return _make_with(config, out, encoder, reason, missing, parity if name != "hf" else None, say)
            except BackendMismatch as error:
                objections[name] = str(error)
    finally:
        if parity is not None:
            parity.close()


def _make_with(
    config: Config, out: Path, encoder: Encoder, reason: str, missing: list[Job], parity: Parity | None, say: Say
) -> list[dict[str, Any]] | None:
    """Makes shards with one backend; BackendMismatch where the sample of the corpus speaks against it."""
    how, name = config.executor.kind, encoder.name
    workers = min(num_workers(config.workers), len(missing))
    with_what = f"{workers} processes" if how == "local" else f"executor={how}"
    if parity is not None:
        texts = _first_documents([job.shard for job in missing])
        parity.ask(CORPUS, Sample.of(texts, encoder.encode_plain(texts)), name)
    say(f"tokenizing {len(missing)} shards with {with_what}, backend {name} ({reason})")
    started, before = time.monotonic(), _child_seconds()
    if how == "local":
        records = make_shards(Recipe(out, encoder, config.split), missing, workers, parity)
    else:
        if parity is not None:
            parity.wait_for(CORPUS)
        records = launch(config, out, encoder.vocabulary, name, missing, say)
        if records is None:
            return None
    rate = {
        "executor": how,
        "backend": name,
        "workers": workers if how == "local" else config.executor.tasks,
        "text_bytes": sum(record["text_bytes"] for record in records),
        "tokens": sum(info["tokens"] for record in records for info in record["splits"].values() if info),
        "seconds": round(time.monotonic() - started, 3),
        "cpu_seconds": round(_child_seconds() - before, 3) if how == "local" else None,  # of the workers
    }
    with open(out / "work" / "rates.jsonl", "a") as file:
        file.write(json.dumps(rate) + "\n")
    return records


def _child_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _first_documents(shards: list[Shard]) -> list[str]:
    """Returns documents from the beginnings of up to 20 shards spread over the plan."""
    chosen = shards[:: max(1, len(shards) // 20)][:20]
    texts: list[str] = []
    for shard in chosen:
        try:
            texts += _beginning(shard, SAMPLE_DOCUMENTS // len(chosen), SAMPLE_BYTES // len(chosen))
        except InputError as error:
            raise type(error)(f"{error} (shard {shard.stem})") from None
    return texts


def _beginning(shard: Shard, documents: int, most_bytes: int) -> list[str]:
    texts, size = [], 0
    for text, raw in islice(read_piece(shard.pieces[0], lambda _: None), documents):
        size += len(raw)
        if size > most_bytes:
            break
        texts.append(text)
    return texts


def _remove_strangers(out: Path, stems: set[str]) -> None:
    """Removes what earlier runs left: unfinished files, and shards that have no place in this plan."""
    shards = out / "work" / "shards"
    remove_unfinished(
        [out, out / "text", out / "work", shards, *(shards / s for s in SPLITS), *(out / s for s in SPLITS)]
    )
    for record in shards.glob("*.json"):
        if record.stem not in stems:
            remove_shard(out, record.stem)
            counts_path(out, record.stem).unlink(missing_ok=True)
            record_path(out, record.stem).unlink()
    for path in [path for split in SPLITS for path in (shards / split).glob("*.*")]:
        if path.stem not in stems:
            path.unlink()  # a run that was killed before it could write the record


def remove_shard(out: Path, stem: str, splits: Iterable[str] = SPLITS) -> None:
    """Removes a shard's files; its record stays."""
    for split in splits:
        for suffix in (".idx", ".bin", ".sums"):
            Path(f"{out / shard_prefix(split, stem)}{suffix}").unlink(missing_ok=True)
