"""The stages of a run, in their order: plan, fetch, tokenize, merge, validate, stats.

Every stage finds what earlier runs finished and skips it. Extracted text is recognised by its settings, checksums by
size and time, a trained tokenizer by its inputs, a shard by its fingerprint, a joined file by its members, and the
dataset by the fingerprint of all. So the same command continues an interrupted run and does nothing to a finished one.
A stage whose input is missing names the stage to run first. `manifest.json` is written last and renamed into place. A
folder without it is not a dataset.

    out/manifest.json   the dataset: files, sizes, sha256, tokenizer, policy
    out/recipe.json     the settings that made it, so that a repair needs none
    out/tokenizer.json  the tokenizer that made the ids
    out/train, heldout  .bin/.idx pairs
    out/text            extracted text, for sources that extract
    out/work            shards, records, checksums; may be deleted once the manifest exists
    out/stats.*         statistics and a page
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.config import Config, Stage
from data_prep.corpus.corpus import Corpus, fetch_corpus, find_corpus, require_corpus, write_plan
from data_prep.corpus.overwriting import check_same_source
from data_prep.corpus.unreadable import reporting_all_unreadable
from data_prep.dataset.committing import (
    check_same_dataset,
    commit_dataset,
    dataset_fingerprint,
    finished_dataset,
    save_recipe,
    write_blends,
)
from data_prep.dataset.merging import merge
from data_prep.dataset.stats import write_stats
from data_prep.dataset.validate import validate_dataset
from data_prep.errors import InputError
from data_prep.files import dataset_lock
from data_prep.progress import Log
from data_prep.readers import format_skipped
from data_prep.recipe import known_dataset, recipe_of, write_recipe
from data_prep.shards.shard import FinishedShard
from data_prep.shards.tokenizing import finished_shards, tokenize
from data_prep.shards.work import Work, plan_work
from ssa_pretrain.data.manifest import Manifest
from ssa_pretrain.data.repair import command, repair_advice

Write = Callable[[str], object]


def run_stages(config: Config, log: Log, write: Write) -> None:
    """Runs the stage of the settings.

    Args:
        config: checked settings.
        log: prints a line for the user.
        write: takes the result, as text.

    Raises:
        InputError: the input cannot be used, an earlier stage has to run first, or the dataset is damaged.
    """
    stage = config.stage
    if stage is Stage.plan:
        if corpus := _plan(config, log):
            write(_shard_table(corpus))
    elif stage is Stage.fetch:
        write(_shard_table(_fetch(config, log)))
    elif stage is Stage.tokenize:
        shards = _tokenize(config, log)
        if shards is not None:
            merge_command = command(_folder(config), "stage=merge")
            write(f"{len(shards)} shards are finished; run `{merge_command}` to make a dataset of them\n")
    elif stage is Stage.merge:
        write(summary(_merge(config, log)) + "\n")
    elif stage is Stage.validate:
        write(_validate(config, log))
    elif stage is Stage.stats:
        write(write_stats(_folder(config), config.stats, log))
    else:
        manifest = prepare_dataset(config, log)
        if manifest is None:
            return
        write(summary(manifest) + "\n")
        if stage is Stage.all:
            write(_validate(config, log).splitlines()[-1] + "\n")
            write(write_stats(_folder(config), config.stats, log).splitlines()[-1] + "\n")


def prepare_dataset(config: Config, log: Log) -> Manifest | None:
    """Runs plan, fetch, tokenize and merge; returns the manifest, or None if cluster jobs were queued.

    Args:
        config: checked settings.
        log: prints a line for the user.

    Raises:
        InputError: the input cannot be used, or `out` holds another dataset.
    """
    with _locked_folder(config) as out:
        corpus = fetch_corpus(config, out, log)
        with reporting_all_unreadable(config, corpus.shards, log):
            work = plan_work(config, out, corpus, log)
        manifest = finished_dataset(config, out, work, log)
        write_plan(out, config, corpus)
        if manifest:
            save_recipe(config, out, work)  # an older version wrote none, and its paths may have changed
            write_blends(manifest)
            log(f"{out} is up to date: nothing to do")
            return manifest
        with reporting_all_unreadable(config, corpus.shards, log):
            shards = tokenize(config, out, work, log)
        return None if shards is None else _merge_and_commit(config, out, work, shards, log)


def summary(manifest: Manifest) -> str:
    """Returns a table of a dataset's splits and parts."""
    rows = [("split", "part", "documents", "tokens", "MB on disk")]
    for split, files in manifest.splits.items():
        for part in dict.fromkeys(file.part for file in files):
            own = [file for file in files if file.part == part]
            size = sum(file.bin_bytes + file.idx_bytes for file in own) / 1e6
            documents, tokens = sum(file.documents for file in own), sum(file.tokens for file in own)
            rows.append((split, part, f"{documents:,}", f"{tokens:,}", f"{size:.1f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows]
    entropy = manifest.unigram_entropy_nats
    lines.append(
        f"{manifest.bytes_per_token:.2f} bytes per token; unigram entropy {entropy['train']:.3f} nats (train), "
        f"{entropy['heldout']:.3f} (held out)"
    )
    if skipped := manifest.details.get("skipped"):
        lines.append(f"left out by on_error=skip: {format_skipped(skipped)}")
    lines.append(f"{manifest.root / 'manifest.json'}")
    return "\n".join(lines)


def _plan(config: Config, log: Log) -> Corpus | None:
    """Writes work/plan.json; returns the corpus, or None if its source has to fetch it first."""
    with _locked_folder(config) as out:
        corpus = find_corpus(config, out, log)
        write_plan(out, config, corpus)
        if corpus is None:
            log(
                f"plan: the text of source={config.source.kind} comes first; run stage=fetch (`{command(out, 'stage=fetch')}`), "
                "which also completes the plan"
            )
        return corpus


def _fetch(config: Config, log: Log) -> Corpus:
    """Fetches the text and completes the plan."""
    with _locked_folder(config) as out:
        corpus = fetch_corpus(config, out, log)
        write_plan(out, config, corpus)
        return corpus


def _tokenize(config: Config, log: Log) -> list[FinishedShard] | None:
    """Tokenizes the missing shards; returns all shards of the dataset, or None if cluster jobs were queued."""
    with _locked_folder(config) as out:
        corpus = require_corpus(config, out, log)
        with reporting_all_unreadable(config, corpus.shards, log):
            work = plan_work(config, out, corpus, log)
        # Tokenizing replaces the records in work/, which may be another dataset's.
        check_same_dataset(config, out, dataset_fingerprint(config, work))
        write_plan(out, config, work.corpus)
        with reporting_all_unreadable(config, work.corpus.shards, log):
            return tokenize(config, out, work, log)


def _merge(config: Config, log: Log) -> Manifest:
    """Joins the shards into the dataset's files and writes the manifest."""
    with _locked_folder(config) as out:
        corpus = require_corpus(config, out, log)
        with reporting_all_unreadable(config, corpus.shards, log):
            work = plan_work(config, out, corpus, log)
        if manifest := finished_dataset(config, out, work, log):
            save_recipe(config, out, work)
            log(f"{out} is up to date: nothing to do")
            return manifest
        shards = finished_shards(config, out, work)
        if shards is None:
            first = command(out, "stage=tokenize")
            raise InputError(f"shards are missing in out={config.out}; run stage=tokenize first: `{first}`")
        return _merge_and_commit(config, out, work, shards, log)


def _merge_and_commit(config: Config, out: Path, work: Work, shards: list[FinishedShard], log: Log) -> Manifest:
    # From here on files change, so the folder is not a dataset until it is committed again.
    (out / "manifest.json").unlink(missing_ok=True)
    save_recipe(config, out, work)
    splits = merge(out, shards, config.merge, log)
    return commit_dataset(config, out, work, shards, splits)


def _validate(config: Config, log: Log) -> str:
    result = validate_dataset(_folder(config), config.retokenize)
    for problem in result.problems:
        log(f"damaged: {problem}")
    if found := len(result.problems):
        root = result.manifest.root
        raise InputError(f"{root} has {found} problem{'s' * (found > 1)}; {repair_advice(root)}")
    valid = f"valid: every file, id and document matches the manifest; {result.recheck}"
    return f"{summary(result.manifest)}\n{valid}\n"


def _shard_table(corpus: Corpus) -> str:
    rows = []
    for part in dict.fromkeys(shard.part for shard in corpus.shards):
        own = [shard for shard in corpus.shards if shard.part == part]
        rows.append(f"{part}: {len(own)} shards, {sum(shard.size for shard in own) / 1e6:,.1f} MB\n")
    return "".join(rows)


def _folder(config: Config) -> Path:
    """Returns the dataset's folder."""
    return Path(config.out).expanduser().absolute()


@contextmanager
def _locked_folder(config: Config) -> Iterator[Path]:
    """Locks the dataset's folder, after checking that the settings are not those of another dataset."""
    out = _folder(config)
    check_same_source(config, out)
    with dataset_lock(out):
        if known_dataset(out) is None:
            write_recipe(out, recipe_of(config, out))  # so that `data_prep out=…` continues an interrupted run
        yield out
