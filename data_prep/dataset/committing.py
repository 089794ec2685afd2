"""Committing a dataset: its manifest is written last and renamed into place. Before that: is the dataset in `out` the requested one?

Beside the manifest are tokenizer.json and, for tools that take megatron-core's blends, train.blend and heldout.blend:
`weight prefix` pairs as `--data-path` takes them. Their paths are relative to the dataset's folder, so that it can be
moved. `Manifest.blend` returns the same to programs, with absolute paths.
"""

import os
from dataclasses import asdict
from pathlib import Path

import numpy as np

from data_prep.config import Config, Verify
from data_prep.corpus.overwriting import overwrite_error
from data_prep.dataset.merging import Splits
from data_prep.errors import InputError
from data_prep.files import digest
from data_prep.progress import Log
from data_prep.readers import format_skipped
from data_prep.recipe import known_dataset, recipe_of, write_recipe
from data_prep.run_config import MixConfig, Packing
from data_prep.shards.budget import shares
from data_prep.shards.groups import group_shards
from data_prep.shards.shard import RATIO_BINS, FinishedShard, counts_path
from data_prep.shards.skipped import total_skipped
from data_prep.shards.work import Work
from ssa_pretrain.data.manifest import SPLITS, Manifest, TokenizerInfo, load_manifest, unigram_entropy, verify_hashes
from ssa_pretrain.data.repair import DatasetError
from ssa_pretrain.settings.files import write_atomically


def dataset_fingerprint(config: Config, work: Work) -> str:
    """Returns the sha256 of all that determines the tokens of a dataset: every shard of the corpus, and the mix."""
    shards = [job.fingerprint for job in work.jobs]
    return digest(shards if config.mix == MixConfig() else [shards, asdict(config.mix)])


def finished_dataset(config: Config, out: Path, work: Work, log: Log) -> Manifest | None:
    """Returns the dataset in `out` if it is the requested one and complete, or None if there is work to do.

    Raises:
        InputError: without overwrite=true, `out` holds another dataset, or one that lacks text.
    """
    fingerprint = dataset_fingerprint(config, work)
    skips = any(piece.on_error == "skip" for job in work.jobs for piece in job.shard.pieces)
    check_same_dataset(config, out, fingerprint)
    try:
        manifest = load_manifest(out)
        if manifest.fingerprint != fingerprint:
            return None
        if (skipped := manifest.details.get("skipped")) and not skips:
            if config.overwrite:
                return None
            raise InputError(
                f"out={config.out} was made with on_error=skip and lacks {format_skipped(skipped)}; add source.on_error=skip, or choose another out="
            )
        if manifest.details.get("merge_files") != config.merge.files:
            log(f"merging again: merge.files={config.merge.files}")
            return None
        if config.verify is Verify.full:
            verify_hashes(manifest)
    except DatasetError as error:
        if os.path.lexists(out / "manifest.json"):
            log(f"repairing: {error.what}")
        return None
    return manifest


def check_same_dataset(config: Config, out: Path, fingerprint: str) -> None:
    """Raises InputError if `out` holds another dataset than the requested one, unless overwrite=true is set."""
    known = known_dataset(out)
    if known and known.fingerprint != fingerprint and not config.overwrite:
        raise overwrite_error(config)


def save_recipe(config: Config, out: Path, work: Work) -> None:
    """Writes the recipe of a dataset whose shards are all finished."""
    write_recipe(out, recipe_of(config, out, digest(work.corpus.inputs), dataset_fingerprint(config, work)))


def write_blends(manifest: Manifest) -> None:
    """Writes train.blend and heldout.blend, unless they are up to date."""
    for split in SPLITS:
        _, weights = manifest.blend(split)
        shards = zip(weights, manifest.splits[split], strict=True)
        lines = [f"{weight:.9g} {shard.prefix}\n" for weight, shard in shards]
        path, content = manifest.root / f"{split}.blend", "".join(lines).encode()
        if not path.is_file() or path.read_bytes() != content:
            write_atomically(path, content)


def commit_dataset(config: Config, out: Path, work: Work, shards: list[FinishedShard], splits: Splits) -> Manifest:
    """Writes the manifest of the merged files and returns it."""
    vocabulary = work.vocabulary
    documents = {split: sum(file.documents for file in splits[split]) for split in SPLITS}
    skipped = total_skipped(shards)
    _check_not_empty(documents, config.split.heldout_fraction, skipped)
    write_atomically(out / "tokenizer.json", Path(vocabulary.path).read_bytes())
    counts = np.zeros((len(SPLITS), vocabulary.vocab_size), dtype=np.int64)
    for shard in shards:
        counts += np.load(counts_path(out, shard.job.shard.stem))
    totals = {
        key: sum(shard.record[key] for shard in shards) for key in ("text_bytes", "source_documents", "empty_documents")
    }
    policy = {**asdict(config.policy), "specials": config.policy.specials.value, "packing": config.packing.kind.value}
    if config.packing.kind is Packing.official_row:
        policy["row_tokens"] = config.packing.row_tokens
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
        policy=policy,
        splits=splits,
        sources=tuple(work.corpus.sources),
        unigram_entropy_nats={split: unigram_entropy(counts[row]) for row, split in enumerate(SPLITS)},
        bytes_per_token=round(totals["text_bytes"] / int(counts.sum()), 4),
        fingerprint=dataset_fingerprint(config, work),
        weights=shares(config.mix, work.jobs) if config.mix.weights else {},
        details={
            **totals,
            "skipped": skipped,
            "documents": documents,
            "split": asdict(config.split),
            "merge_files": config.merge.files,
            "shards": len(shards),
            "of_shards": len(work.jobs),
            "target_tokens": config.mix.target_tokens,
            "bytes_per_token_histograms": _ratio_histograms(shards),
            "members": {
                g.stem: [m.job.shard.stem for m in g.members] for g in group_shards(shards, config.merge.files)
            },
            "fingerprints": {shard.job.shard.stem: shard.job.fingerprint for shard in shards},
            "inputs": {shard.stem: text for shard, text in zip(work.corpus.shards, work.corpus.inputs, strict=True)},
        },
    )
    write_blends(manifest)
    write_atomically(out / "manifest.json", manifest.to_json().encode())
    return load_manifest(out)


def _ratio_histograms(shards: list[FinishedShard]) -> dict[str, list[int]]:
    """Returns the histogram of bytes per token of each part."""
    histograms = {part: [0] * RATIO_BINS for part in dict.fromkeys(shard.job.shard.part for shard in shards)}
    for shard in shards:
        sums = histograms[shard.job.shard.part]
        sums[:] = [a + b for a, b in zip(sums, shard.record["bytes_per_token_histogram"], strict=True)]
    return histograms


def _check_not_empty(documents: dict[str, int], fraction: float, skipped: dict[str, int]) -> None:
    total = sum(documents.values())
    if total == 0:
        left_out = f" ({format_skipped(skipped)} were left out by on_error=skip)" if skipped else ""
        raise InputError(
            f"the corpus is empty: no document has any text{left_out}; check source.paths and source.text_column"
        )
    if documents["train"] == 0 and fraction < 1:
        raise InputError(
            f"the train split is empty: all {total} documents were held out by split.heldout_fraction={fraction}; lower it"
        )
    if documents["heldout"] == 0 and fraction > 0:
        raise InputError(
            f"the held-out split is empty: {total} documents are too few for split.heldout_fraction={fraction}; "
            f"try {min(0.5, max(0.1, 10 / total)):.2g}, or 0 for no held-out split"
        )
