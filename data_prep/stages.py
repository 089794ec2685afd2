"""Which stages a run consists of, and what each tells its reader."""

from collections.abc import Callable

from data_prep.config import Config, Stage
from data_prep.corpus import Corpus
from data_prep.errors import InputError
from data_prep.index import build_index
from data_prep.pipeline import fetch_stage, folder, merge_stage, plan_stage, prepare_dataset, tokenize_stage
from data_prep.progress import Say
from data_prep.readers import described
from data_prep.stats import stats_stage
from data_prep.validate import validate_dataset
from ssa_pretrain.data.indexed_format import Manifest
from ssa_pretrain.data.repair import command, repair_advice

Write = Callable[[str], object]


def run_stages(config: Config, say: Say, write: Write) -> None:
    """Runs the stage of the settings.

    Args:
        config: checked settings.
        say: takes lines about what is going on.
        write: takes the result, as text.

    Raises:
        InputError: the input cannot be used, an earlier stage has to come first, or the dataset is damaged.
    """
    stage = config.stage
    if stage is Stage.plan:
        if corpus := plan_stage(config, say):
            write(_shards(corpus))
    elif stage is Stage.fetch:
        write(_shards(fetch_stage(config, say)))
    elif stage is Stage.tokenize:
        made = tokenize_stage(config, say)
        if made is not None:
            write(
                f"{len(made)} shards are made; `{command(folder(config), 'stage=merge')}` makes the dataset of them\n"
            )
    elif stage is Stage.merge:
        write(summary(merge_stage(config, say)) + "\n")
    elif stage is Stage.validate:
        write(_validate(config, say))
    elif stage is Stage.stats:
        write(stats_stage(config, say))
    elif stage is Stage.index:
        write(build_index(config, say))
    else:
        manifest = prepare_dataset(config, say)
        if manifest is None:
            return
        write(summary(manifest) + "\n")
        if stage is Stage.all:
            write(_validate(config, say).splitlines()[-1] + "\n")
            write(stats_stage(config, say).splitlines()[-1] + "\n")
            if config.index.samples:
                write(build_index(config, say))


def summary(manifest: Manifest) -> str:
    """Returns a small table of what a dataset holds."""
    rows = [("split", "part", "documents", "tokens", "MB on disk")]
    for split, shards in manifest.splits.items():
        for name in dict.fromkeys(shard.name for shard in shards):
            part = [shard for shard in shards if shard.name == name]
            size = sum(shard.bin_bytes + shard.idx_bytes for shard in part) / 1e6
            rows.append(
                (split, name, f"{sum(s.documents for s in part):,}", f"{sum(s.tokens for s in part):,}", f"{size:.1f}")
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows]
    entropy = manifest.unigram_entropy_nats
    lines.append(
        f"{manifest.bytes_per_token:.2f} bytes a token; unigram entropy {entropy['train']:.3f} nats (train), "
        f"{entropy['heldout']:.3f} (held out)"
    )
    if skipped := manifest.details.get("skipped"):
        lines.append(f"left out by on_error=skip: {described(skipped)}")
    lines.append(f"{manifest.root / 'manifest.json'}")
    return "\n".join(lines)


def _shards(corpus: Corpus) -> str:
    rows = []
    for name in dict.fromkeys(shard.name for shard in corpus.shards):
        own = [shard for shard in corpus.shards if shard.name == name]
        rows.append(f"{name}: {len(own)} shards, {sum(shard.size for shard in own) / 1e6:,.1f} MB\n")
    return "".join(rows)


def _validate(config: Config, say: Say) -> str:
    verdict = validate_dataset(folder(config), config.retokenize)
    for problem in verdict.problems:
        say(f"damaged: {problem}")
    if found := len(verdict.problems):
        root = verdict.manifest.root
        raise InputError(f"{root} has {found} problem{'s' * (found > 1)}; {repair_advice(root)}")
    sound = f"valid: every file, id and document is as the manifest says; {verdict.rechecked}"
    return f"{summary(verdict.manifest)}\n{sound}\n"
