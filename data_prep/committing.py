"""The manifest: what a finished dataset is, written last and renamed into place, and what would replace it.

Beside it go tokenizer.json and, for tools that take megatron-core's blends, train.blend and heldout.blend: `weight prefix` pairs,
as `--data-path` takes them. Their paths are relative to the dataset's folder, so that it can be moved. `Manifest.blend` gives the same
to programs, with absolute paths.
"""

import os
from dataclasses import asdict
from pathlib import Path

import numpy as np

from data_prep.budget import shares
from data_prep.config import Config, Verify
from data_prep.corpus import Work, other_dataset
from data_prep.errors import InputError
from data_prep.files import digest, write_atomically
from data_prep.merging import Splits, groups_of
from data_prep.progress import Say
from data_prep.readers import described
from data_prep.recipe import known_dataset, recipe_of, write_recipe
from data_prep.run_config import MixConfig, Packing
from data_prep.shards import RATIO_BINS, Made, counts_path
from data_prep.unreadable import total_skipped
from ssa_pretrain.data.indexed_format import (
    SPLITS,
    Manifest,
    TokenizerInfo,
    load_manifest,
    unigram_entropy,
    verify_hashes,
)
from ssa_pretrain.data.repair import DatasetError


def dataset_fingerprint(config: Config, work: Work) -> str:
    """Returns the sha256 of all that determines the tokens of a dataset: every shard that there could be, and the mix."""
    shards = [job.fingerprint for job in work.jobs]
    return digest(shards if config.mix == MixConfig() else [shards, asdict(config.mix)])


def finished_dataset(config: Config, out: Path, work: Work, say: Say) -> Manifest | None:
    """Returns the dataset in `out` if it is the one asked for and whole, None if there is work to do.

    Raises:
        InputError: `out` holds another dataset, or one that lacks text, and overwrite=true was not given.
    """
    fingerprint = dataset_fingerprint(config, work)
    skips = any(piece.on_error == "skip" for job in work.jobs for piece in job.shard.pieces)
    refuse_other(config, out, fingerprint)
    try:
        manifest = load_manifest(out)
        if manifest.fingerprint != fingerprint:
            return None
        if (skipped := manifest.details.get("skipped")) and not skips:
            if config.overwrite:
                return None
            raise InputError(
                f"out={config.out} was made with on_error=skip and lacks {described(skipped)}; add source.on_error=skip, or choose another out="
            )
        if manifest.details.get("merge_files") != config.merge.files:
            say(f"merging again: merge.files={config.merge.files}")
            return None
        if config.verify is Verify.full:
            verify_hashes(manifest)
    except DatasetError as error:
        if os.path.lexists(out / "manifest.json"):
            say(f"repairing: {error.what}")
        return None
    return manifest


def refuse_other(config: Config, out: Path, fingerprint: str) -> None:
    """Raises InputError where `out` holds another dataset than the one asked for, and overwrite=true was not said."""
    known = known_dataset(out)
    if known and known.fingerprint != fingerprint and not config.overwrite:
        raise other_dataset(config)


def keep_recipe(config: Config, out: Path, work: Work) -> None:
    """Writes the recipe of a dataset of which all shards are made."""
    write_recipe(out, recipe_of(config, out, digest(work.corpus.inputs), dataset_fingerprint(config, work)))


def write_blends(manifest: Manifest) -> None:
    """Writes train.blend and heldout.blend, unless they are as they should be."""
    for split in SPLITS:
        _, weights = manifest.blend(split)
        shards = zip(weights, manifest.splits[split], strict=True)
        lines = [f"{weight:.9g} {shard.prefix}\n" for weight, shard in shards]
        path, content = manifest.root / f"{split}.blend", "".join(lines).encode()
        if not path.is_file() or path.read_bytes() != content:
            write_atomically(path, content)


def commit(config: Config, out: Path, work: Work, made: list[Made], splits: Splits) -> Manifest:
    """Writes the manifest of the files that were made, and returns it."""
    vocabulary = work.vocabulary
    documents = {split: sum(shard.documents for shard in splits[split]) for split in SPLITS}
    skipped = total_skipped(made)
    _check_not_empty(documents, config.split.heldout_fraction, skipped)
    write_atomically(out / "tokenizer.json", Path(vocabulary.path).read_bytes())
    counts = np.zeros((len(SPLITS), vocabulary.vocab_size), dtype=np.int64)
    for one in made:
        counts += np.load(counts_path(out, one.job.shard.stem))
    ratios = {name: [0] * RATIO_BINS for name in dict.fromkeys(one.job.shard.name for one in made)}
    for one in made:
        have = ratios[one.job.shard.name]
        have[:] = [a + b for a, b in zip(have, one.record["bytes_per_token_histogram"], strict=True)]
    totals = {
        key: sum(one.record[key] for one in made) for key in ("text_bytes", "source_documents", "empty_documents")
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
            "shards": len(made),
            "of_shards": len(work.jobs),
            "target_tokens": config.mix.target_tokens,
            "bytes_per_token_histograms": ratios,
            "members": {g.stem: [m.job.shard.stem for m in g.members] for g in groups_of(made, config.merge.files)},
            "fingerprints": {one.job.shard.stem: one.job.fingerprint for one in made},
            "inputs": {shard.stem: text for shard, text in zip(work.corpus.shards, work.corpus.inputs, strict=True)},
        },
    )
    write_blends(manifest)
    write_atomically(out / "manifest.json", manifest.to_json().encode())
    return load_manifest(out)


def _check_not_empty(documents: dict[str, int], fraction: float, skipped: dict[str, int]) -> None:
    total = sum(documents.values())
    if total == 0:
        left_out = f" ({described(skipped)} were left out by on_error=skip)" if skipped else ""
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
