"""The stages in their order: plan, fetch, tokenize, merge, validate, stats, index.

Every stage finds what was made before and leaves it alone: extracted text by its settings, checksums by size and time, a trained
tokenizer by its inputs, a shard by its fingerprint, a joined file by its members, the dataset by the fingerprint of all. So the same
command continues an interrupted run and does nothing to a finished one. A stage that lacks what an earlier one makes says which.
`manifest.json` is written last and renamed into place; without it the folder is not a dataset.

    out/manifest.json   the dataset: files, sizes, sha256, tokenizer, policy
    out/recipe.json     the settings that made it, for a repair without giving them again
    out/tokenizer.json  the tokenizer that made the ids
    out/train, heldout  .bin/.idx pairs
    out/text            extracted text, for sources that extract
    out/work            shards, records, checksums; may be deleted once the manifest is there
    out/stats.*         figures and a page
    out/cache           indices of megatron-core, under the manifest's hash
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.committing import (
    commit,
    dataset_fingerprint,
    finished_dataset,
    keep_recipe,
    refuse_other,
    write_blends,
)
from data_prep.config import Config
from data_prep.corpus import (
    Corpus,
    Work,
    fetch_corpus,
    find_corpus,
    need_corpus,
    plan_work,
    refuse_other_source,
    write_plan,
)
from data_prep.errors import InputError
from data_prep.files import only_writer
from data_prep.merging import merge
from data_prep.progress import Say
from data_prep.recipe import known_dataset, recipe_of, write_recipe
from data_prep.shards import Made
from data_prep.tokenizing import made_shards, tokenize
from data_prep.unreadable import naming_all_files
from ssa_pretrain.data.indexed_format import Manifest
from ssa_pretrain.data.repair import command


def prepare_dataset(config: Config, say: Say) -> Manifest | None:
    """Returns the manifest of a finished dataset in `config.out`, after making what was missing; None if jobs were queued.

    Args:
        config: checked settings.
        say: takes lines for the user.

    Raises:
        InputError: the input cannot be used, or `out` holds another dataset.
    """
    with _writing(config) as out:
        corpus = fetch_corpus(config, out, say)
        with naming_all_files(config, corpus.shards, say):
            work = plan_work(config, out, corpus, say)
        finished = finished_dataset(config, out, work, say)
        write_plan(out, config, corpus)
        if finished:
            keep_recipe(config, out, work)  # an older version wrote none, and its paths may have changed
            write_blends(finished)
            say(f"{out} is up to date: nothing to do")
            return finished
        with naming_all_files(config, corpus.shards, say):
            made = tokenize(config, out, work, say)
        return None if made is None else _finish(config, out, work, made, say)


def plan_stage(config: Config, say: Say) -> Corpus | None:
    """Writes work/plan.json and returns the corpus, None where its source has to fetch it first."""
    with _writing(config) as out:
        corpus = find_corpus(config, out, say)
        if corpus is None:
            write_plan(out, config, None)
            say(
                f"plan: the text of source={config.source.kind} comes first; run stage=fetch (`{command(out, 'stage=fetch')}`), then the plan "
                "has its shards"
            )
        else:
            write_plan(out, config, corpus)
        return corpus


def fetch_stage(config: Config, say: Say) -> Corpus:
    """Brings the text to this machine and completes the plan."""
    with _writing(config) as out:
        corpus = fetch_corpus(config, out, say)
        write_plan(out, config, corpus)
        return corpus


def tokenize_stage(config: Config, say: Say) -> list[Made] | None:
    """Makes the shards and returns them, None where jobs were queued."""
    with _writing(config) as out:
        corpus = need_corpus(config, out, say)
        with naming_all_files(config, corpus.shards, say):
            work = plan_work(config, out, corpus, say)
        refuse_other(config, out, dataset_fingerprint(config, work))  # whose records in work/ it would replace
        write_plan(out, config, work.corpus)
        with naming_all_files(config, work.corpus.shards, say):
            return tokenize(config, out, work, say)


def merge_stage(config: Config, say: Say) -> Manifest:
    """Makes the files of the dataset from its shards, and the manifest."""
    with _writing(config) as out:
        corpus = need_corpus(config, out, say)
        with naming_all_files(config, corpus.shards, say):
            work = plan_work(config, out, corpus, say)
        if finished := finished_dataset(config, out, work, say):
            keep_recipe(config, out, work)
            say(f"{out} is up to date: nothing to do")
            return finished
        made = made_shards(config, out, work)
        if made is None:
            first = command(out, "stage=tokenize")
            raise InputError(f"shards are missing in out={config.out}; run stage=tokenize first: `{first}`")
        return _finish(config, out, work, made, say)


def folder(config: Config) -> Path:
    """Returns the dataset's folder."""
    return Path(config.out).expanduser().absolute()


@contextmanager
def _writing(config: Config) -> Iterator[Path]:
    """Holds the lock on the dataset's folder, which is not another dataset's as far as the settings tell."""
    out = folder(config)
    refuse_other_source(config, out)
    with only_writer(out):
        if known_dataset(out) is None:
            write_recipe(out, recipe_of(config, out))  # so that `data_prep out=…` goes on with an interrupted run
        yield out


def _finish(config: Config, out: Path, work: Work, made: list[Made], say: Say) -> Manifest:
    # From here on files change, so the folder stops being a dataset until it is committed again.
    (out / "manifest.json").unlink(missing_ok=True)
    keep_recipe(config, out, work)
    splits = merge(out, made, config.merge, say)
    return commit(config, out, work, made, splits)
