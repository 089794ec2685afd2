"""From settings to a finished dataset: fetch, plan, tokenizer, tokenize, commit.

Every step finds what it made before and leaves it alone: extracted text by its settings, checksums by size and time, a trained
tokenizer by its inputs, a shard by its fingerprint, the dataset by the fingerprint of all. So the same command continues an
interrupted run and does nothing to a finished one. `manifest.json` is written last and renamed into place; without it the
folder is not a dataset.

    out/manifest.json   the dataset: shards, sizes, sha256, tokenizer, policy
    out/tokenizer.json  the tokenizer that made the ids
    out/train, heldout  .bin/.idx pairs
    out/text            extracted text, for sources that extract
    out/work            records of shards, checksums; may be deleted once the manifest is there
"""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.config import Config, LocalDocsSource, QuickstartSource, Verify
from data_prep.errors import InputError
from data_prep.files import digest, only_writer, read_json, write_atomically
from data_prep.planning import Shard, Subset, file_sums, input_digest, plan_shards
from data_prep.pool import Job, make_shards, num_workers
from data_prep.readers import read_piece
from data_prep.shards import counts_path, finished_record, shard_fingerprint
from data_prep.sources.files import find_files
from data_prep.sources.hub_corpus import fetch_hub
from data_prep.sources.hub_settings import HubSource
from data_prep.sources.local_docs import extract_local_docs
from data_prep.sources.quickstart import extract_quickstart
from data_prep.sources.store import has_other_text, stored_text
from data_prep.tokenizer.backends import choose_backend
from data_prep.tokenizer.encoding import Vocabulary
from data_prep.tokenizer.vocabulary import prepare_vocabulary
from ssa_pretrain.data.indexed_format import (
    SPLITS,
    Manifest,
    ShardInfo,
    TokenizerInfo,
    load_manifest,
    unigram_entropy,
    verify_hashes,
)

Say = Callable[[str], None]

UNFINISHED = re.compile(r"\.(bin|idx|json|npy)\.\d+\.tmp$")  # our own temporary names, with a process id

SAMPLE_BYTES = 100_000  # of each shard, on which a faster backend must agree

EXTRACTION_VERSION = 2  # raise it when a source would extract other text from the same packages


def prepare_dataset(config: Config, say: Say) -> Manifest:
    """Returns the manifest of a finished dataset in `config.out`, after making what was missing.

    Args:
        config: checked settings.
        say: takes lines for the user.

    Raises:
        InputError: the input cannot be used, or `out` holds another dataset.
    """
    out = Path(config.out).expanduser().absolute()
    with only_writer(out):
        subsets, sources = fetch(config, out, say)
        shards = plan_shards(subsets, config.shard_mb)
        if not shards:
            raise InputError("the corpus is empty: its files hold no bytes; check source.paths")
        sums = file_sums(shards, out / "work" / "inputs.json")
        inputs = [input_digest(shard, sums) for shard in shards]
        say(f"corpus: {sum(s.size for s in shards) / 1e6:.1f} MB in {len(sums)} files, {len(shards)} shards")
        vocabulary = prepare_vocabulary(config, shards, inputs, out / "work")
        say(f"tokenizer: {vocabulary.name}, {vocabulary.vocab_size:,} entries")
        jobs = [Job(s, shard_fingerprint(i, vocabulary, config.split)) for s, i in zip(shards, inputs, strict=True)]
        fingerprint = digest([job.fingerprint for job in jobs])
        if finished := _finished_dataset(config, out, fingerprint, say):
            say(f"{out} is up to date: nothing to do")
            return finished
        records = _tokenize(config, out, jobs, vocabulary, say)
        return _commit(config, out, Draft(fingerprint, vocabulary, sources, shards, records))


def fetch(config: Config, out: Path, say: Say) -> tuple[list[Subset], list[dict[str, Any]]]:
    """Returns the parts of the corpus, and their description for the manifest."""
    source = config.source
    if isinstance(source, QuickstartSource | LocalDocsSource):
        key = {"version": EXTRACTION_VERSION, **asdict(source)}
        if (out / "manifest.json").exists() and not config.overwrite and has_other_text(out / "text", key):
            raise _other_dataset(config)  # before its text is replaced
        say("text: extracting it once, kept in " + str(out / "text"))
        if isinstance(source, QuickstartSource):
            extract = partial(extract_quickstart, source)
        else:
            extract = partial(extract_local_docs, source, Path(config.cache).expanduser().absolute(), say)
        subsets, counts = stored_text(out / "text", key, extract)
        return subsets, [{"kind": source.kind, **count} for count in counts]
    if isinstance(source, HubSource):
        return fetch_hub(source, Path(config.cache).expanduser().absolute(), say)
    subset = find_files(source)
    return [subset], [{"kind": source.kind, "name": subset.name, "files": len(subset.files)}]


@dataclass(frozen=True, slots=True)
class Draft:
    """All that the manifest is made of."""

    fingerprint: str
    vocabulary: Vocabulary
    sources: list[dict[str, Any]]
    shards: list[Shard]
    records: list[dict[str, Any]]


def _finished_dataset(config: Config, out: Path, fingerprint: str, say: Say) -> Manifest | None:
    known = read_json(out / "manifest.json")
    if not isinstance(known, dict):
        return None
    if known.get("fingerprint") != fingerprint:
        if config.overwrite:
            return None
        raise _other_dataset(config)
    try:
        manifest = load_manifest(out)
        if config.verify is Verify.full:
            verify_hashes(manifest)
    except ValueError as error:
        say(f"repairing: {error}")
        return None
    return manifest


def _other_dataset(config: Config) -> InputError:
    return InputError(
        f"out={config.out} holds a dataset made from other text or settings; choose another out=, or add overwrite=true "
        "to replace it"
    )


def _tokenize(config: Config, out: Path, jobs: list[Job], vocabulary: Vocabulary, say: Say) -> list[dict[str, Any]]:
    # From here on files change, so the folder stops being a dataset until it is committed again.
    (out / "manifest.json").unlink(missing_ok=True)
    _remove_strangers(out, {job.shard.stem for job in jobs})
    verify = config.verify is Verify.full
    records = [finished_record(out, job.shard, job.fingerprint, verify) for job in jobs]
    missing = [job for job, record in zip(jobs, records, strict=True) if record is None]
    workers = num_workers(config.workers)
    if len(missing) < len(jobs):
        say(f"reusing {len(jobs) - len(missing)} of {len(jobs)} shards")
    if missing:
        sample = partial(_first_documents, [job.shard for job in jobs])
        backend, reason = choose_backend(config.backend, vocabulary.path, vocabulary.specials_as_text, sample)
        say(
            f"tokenizing {len(missing)} shards with {min(workers, len(missing))} processes, backend {backend} ({reason})"
        )
        made = iter(make_shards(out, missing, vocabulary, backend, config.split, workers))
        records = [record if record is not None else next(made) for record in records]
    return [record for record in records if record is not None]


def _first_documents(shards: list[Shard]) -> list[str]:
    """Returns up to 1,000 documents, from the beginnings of up to 20 shards spread over the plan, at most 2 MB in all."""
    texts: list[str] = []
    for shard in shards[:: max(1, len(shards) // 20)][:20]:
        size = 0
        for text, raw in islice(read_piece(shard.pieces[0], lambda _: None), 50):
            size += len(raw)
            if size > SAMPLE_BYTES:
                break
            texts.append(text)
    return texts


def _remove_strangers(out: Path, stems: set[str]) -> None:
    """Removes what earlier runs left: unfinished files, and shards that have a record but no place in this plan."""
    for folder in (out, out / "text", out / "work", out / "work" / "shards", *(out / split for split in SPLITS)):
        for path in folder.glob("*.tmp"):
            if UNFINISHED.search(path.name):
                path.unlink()
    for record in (out / "work" / "shards").glob("*.json"):
        if record.stem not in stems:
            for split in SPLITS:
                for suffix in (".bin", ".idx"):
                    (out / split / (record.stem + suffix)).unlink(missing_ok=True)
            record.with_name(record.stem + ".counts.npy").unlink(missing_ok=True)
            record.unlink()


def _commit(config: Config, out: Path, draft: Draft) -> Manifest:
    splits = {s: tuple(ShardInfo(**r["splits"][s]) for r in draft.records if r["splits"][s]) for s in SPLITS}
    documents = {split: sum(shard.documents for shard in splits[split]) for split in SPLITS}
    _check_not_empty(documents, config.split.heldout_fraction)
    vocabulary = draft.vocabulary
    write_atomically(out / "tokenizer.json", Path(vocabulary.path).read_bytes())
    text_bytes = sum(record["text_bytes"] for record in draft.records)
    counts = np.zeros((len(SPLITS), vocabulary.vocab_size), dtype=np.int64)
    for shard in draft.shards:
        counts += np.load(counts_path(out, shard))
    manifest = Manifest(
        root=out,
        tokenizer=TokenizerInfo(
            file="tokenizer.json",
            sha256=vocabulary.sha256,
            vocab_size=vocabulary.vocab_size,
            eos_id=vocabulary.eos_id,
            bos_id=vocabulary.bos_id,
            name=vocabulary.name,
        ),
        policy={**asdict(config.policy), "specials": config.policy.specials.value},
        splits=splits,
        sources=tuple(draft.sources),
        unigram_entropy_nats={split: unigram_entropy(counts[row]) for row, split in enumerate(SPLITS)},
        bytes_per_token=round(text_bytes / int(counts.sum()), 4),
        fingerprint=draft.fingerprint,
        details={
            "text_bytes": text_bytes,
            "documents": documents,
            "empty_documents": sum(record["empty_documents"] for record in draft.records),
            "split": asdict(config.split),
        },
    )
    write_atomically(out / "manifest.json", manifest.to_json().encode())
    return load_manifest(out)


def _check_not_empty(documents: dict[str, int], fraction: float) -> None:
    total = sum(documents.values())
    if total == 0:
        raise InputError("the corpus is empty: no document has any text; check source.paths and source.text_column")
    if documents["train"] == 0:
        raise InputError(
            f"the train split is empty: all {total} documents were held out by split.heldout_fraction={fraction}; lower it"
        )
    if documents["heldout"] == 0 and fraction > 0:
        raise InputError(
            f"the held-out split is empty: {total} documents are too few for split.heldout_fraction={fraction}; "
            f"try {min(0.5, max(0.1, 10 / total)):.2g}, or 0 for no held-out split"
        )
