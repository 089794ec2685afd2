"""The five stages of a recipe: the entry point and arguments of each, what it reads, and how to see that it is done.

    data        every byte of the dataset is compared with its manifest
    8k          trains the experiment RECIPE_8k
    32k         trains RECIPE_32k from the weights of 8k's last checkpoint, with llama3 RoPE scaling, its own tokens and schedule
    evaluation  evaluates 32k's last checkpoint at 4 times its length, with 4 times its RoPE factor
    export      writes 32k's last checkpoint as a Hugging Face folder

The paper (arXiv 2511.20102) has no stage at 32k: it extrapolates the 8k model by RoPE scaling at inference. The 32k stage is this project's.
A stage's inputs are named by digests: of manifest.json, which lists the sha256 of every file of data, and of checkpoint.json, which does so for a
checkpoint. torch is not imported.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ssa_pretrain.checkpoint.integrity import FACTS, find_damage
from ssa_pretrain.cli import resolve_config
from ssa_pretrain.config import Config
from ssa_pretrain.config.machine import Machine
from ssa_pretrain.data.repair import quoted_value
from ssa_pretrain.errors import CheckpointError, DataError, Interrupted
from ssa_pretrain.launch.stages import data_check
from ssa_pretrain.launch.stages.options import DATA, EVALUATION, EXPORT, LONG, SHORT, Options
from ssa_pretrain.settings.files import file_sha256

TRAIN, EVALUATE, EXPORTER = "ssa_pretrain.train", "ssa_pretrain.evaluate", "ssa_pretrain.export"
TIMES = 4  # the evaluation's length over that of training
RESULTS = "at_4x"  # name of the evaluation's files
Digests = dict[str, str]


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage.

    Attributes:
        name: as in the state and before settings.
        heading: for the console.
        module: the entry point of its processes.
        words: its arguments.
        inputs: returns the digests of what it reads, and raises if that is missing.
        verify: reads what it reads entirely, and raises if it is damaged.
        outputs: returns the digests of what it wrote, and raises if that is incomplete.
        repeatable: whether it is run again without being asked if what it wrote is gone or has changed.
        steps: training steps; 0 if it does not train.
    """

    name: str
    heading: str
    module: str
    words: list[str]
    inputs: Callable[[], Digests]
    verify: Callable[[], None]
    outputs: Callable[[], Digests]
    repeatable: bool = True
    steps: int = 0


@dataclass(frozen=True, slots=True)
class Configs:
    """The checked configurations of the stages that have one."""

    short: Config
    long: Config
    evaluated: Config


def words_of(options: Options, stage: str) -> list[str]:
    """Returns the arguments of a training stage, without the weights that it starts from."""
    folder = options.out / stage
    return [f"experiment={options.recipe}_{stage}", f"output_dir={quoted(folder)}", *options.settings[stage]]


def resolve(options: Options, stage: str, machine: Machine, long: Config | None = None) -> Config:
    """Returns the checked configuration of a stage.

    Args:
        options: the command line.
        stage: 8k, 32k or evaluation.
        machine: what is known of the machine.
        long: the configuration of 32k, for the evaluation.

    Raises:
        ConfigError: with all problems.
    """
    asked = ["dry_run=true"] if options.dry_run else []
    if stage == SHORT:
        return resolve_config("train", [*words_of(options, SHORT), *asked], machine)
    # The weights do not exist yet.
    words = [*words_of(options, LONG), "checkpoint.init_from=''", *asked]
    if long is None:
        return resolve_config("train", words, machine)
    reader = replace(machine, entry="evaluate", splits=("heldout",), has_wandb=None, has_deepspeed=None)
    return resolve_config("evaluate", [*words, *evaluation_words(options, long)], reader)


def evaluation_words(options: Options, long: Config) -> list[str]:
    """Returns the settings of the evaluation, which replace those of 32k; the number of tokens that are evaluated stays."""
    rope, rows = long.model.rope_scaling, long.evaluation.rows
    given = {
        "data.sequence_length": TIMES * long.data.sequence_length,
        "model.rope_scaling.enabled": "true",
        "model.rope_scaling.factor": TIMES * (rope.factor if rope.enabled else 1.0),
        "evaluation.rows": max(1, rows // TIMES) if rows else 0,
        "evaluation.name": RESULTS,
        "training.micro_batch_size": 1,
        "training.global_batch_tokens": TIMES * long.training.global_batch_tokens,  # as many rows as in training
    }
    own = options.settings[EVALUATION]
    asked = {word.lstrip("+").partition("=")[0] for word in own}
    return [*(f"{key}={value}" for key, value in given.items() if key not in asked), *own]


def stages(options: Options, configs: Configs) -> list[Stage]:
    """Returns the stages in their order."""
    short = last_checkpoint(options.out / SHORT, configs.short)
    long = last_checkpoint(options.out / LONG, configs.long)
    return [
        data_stage(options, configs),
        training_stage(options, SHORT, configs.short),
        training_stage(options, LONG, configs.long, weights=short),
        evaluation_stage(options, configs, long),
        export_stage(options, long),
    ]


def data_stage(options: Options, configs: Configs) -> Stage:
    """Returns the check of every dataset that a stage reads."""
    verdicts, used = verdicts_of(options.out), (configs.short, configs.long, configs.evaluated)
    datasets = list(dict.fromkeys(Path(config.data.path) for config in used))
    return Stage(
        name=DATA,
        heading="Data: every byte against its manifest",
        module=data_check.__name__,
        words=[str(verdicts), *map(str, datasets)],
        inputs=partial(digest_of_data, datasets),
        verify=lambda: None,  # this stage is the verification
        outputs=lambda: {str(path): require_data(path, verdicts) for path in datasets},
    )


def training_stage(options: Options, name: str, config: Config, weights: Path | None = None) -> Stage:
    """Returns a run, from new weights or from those of a checkpoint."""
    data = Path(config.data.path)
    start = [f"checkpoint.init_from={quoted(weights)}"] if weights else []
    return Stage(
        name=name,
        heading=f"Training at {name}: {options.recipe}_{name}" + (f", from the weights of {SHORT}" if weights else ""),
        module=TRAIN,
        words=[*words_of(options, name), *start],
        inputs=partial(digests, data, weights),
        verify=partial(verify, options, data, weights),
        outputs=partial(finished, last_checkpoint(options.out / name, config)),
        repeatable=False,
        steps=config.training.num_steps(),
    )


def evaluation_stage(options: Options, configs: Configs, checkpoint: Path) -> Stage:
    """Returns the evaluation of a checkpoint at TIMES its length."""
    data, name = Path(configs.evaluated.data.path), configs.evaluated.evaluation.name
    results = options.out / LONG / "evaluations" / f"{name}.json"
    return Stage(
        name=EVALUATION,
        heading=f"Evaluation of {LONG} at {TIMES} times its length",
        module=EVALUATE,
        words=[str(checkpoint), *evaluation_words(options, configs.long)],
        inputs=partial(digests, data, checkpoint),
        verify=partial(verify, options, data, checkpoint),
        outputs=lambda: {"results": digest(results)},
    )


def export_stage(options: Options, checkpoint: Path) -> Stage:
    """Returns the export of a checkpoint."""
    folder = options.out / EXPORT
    return Stage(
        name=EXPORT,
        heading=f"Export of {LONG} as a Hugging Face folder",
        module=EXPORTER,
        words=[str(checkpoint), f"out={folder}", *options.settings[EXPORT]],
        inputs=partial(digest_of, checkpoint),
        verify=partial(require_intact, checkpoint),
        outputs=lambda: {"config": digest(folder / "config.json"), "bytes": str(size_of(folder))},
    )


def digests(data: Path, checkpoint: Path | None) -> Digests:
    """Returns the digests of a dataset and of a checkpoint that a stage reads. Raises CommandError if one is missing."""
    return digest_of_data([data]) | (digest_of(checkpoint) if checkpoint else {})


def verify(options: Options, data: Path, checkpoint: Path | None) -> None:
    """Raises CommandError unless a dataset is unchanged since its check, and every file of a checkpoint has its checksum."""
    data_check.require_checked(data, verdicts_of(options.out))
    if checkpoint:
        require_intact(checkpoint)


def verdicts_of(out: Path) -> Path:
    """Returns the folder of the verdicts on the data."""
    return out / "data_check"


def last_checkpoint(run: Path, config: Config) -> Path:
    """Returns the folder of the checkpoint that ends a run."""
    return run / "checkpoints" / f"step_{config.training.num_steps():08d}"


def finished(checkpoint: Path) -> Digests:
    """Returns the digest of a run's last checkpoint.

    Raises:
        Interrupted: the run has ended before it, as by training.stop_at_step.
    """
    if not (checkpoint / FACTS).is_file():
        raise Interrupted(
            f"{checkpoint.parents[1]} has ended before its last step {int(checkpoint.name[5:])} (training.stop_at_step?); "
            "run the same command again without that to continue"
        )
    return digest_of(checkpoint)


def require_intact(checkpoint: Path) -> None:
    """Raises CheckpointError unless every file of a checkpoint has its size and sha256."""
    if damage := find_damage(checkpoint):
        raise CheckpointError(
            f"{checkpoint} is damaged ({damage}); restore it, or remove it: its run then writes it again"
        )


def digest_of(checkpoint: Path) -> Digests:
    """Returns the digest of a checkpoint. Raises CheckpointError if there is none."""
    return {"weights": digest(checkpoint / FACTS)}


def digest_of_data(datasets: list[Path]) -> Digests:
    """Returns the digests of datasets. Raises DataError if one is missing."""
    found = {}
    for path in datasets:
        manifest = path if path.suffix == ".json" else path / "manifest.json"
        if not manifest.is_file():
            raise DataError(f"data.path={path} has no manifest.json; prepare it with python -m data_prep out={path}")
        found[f"data {path}"] = file_sha256(manifest)
    return found


def require_data(dataset: Path, verdicts: Path) -> str:
    """Returns the fingerprint of a dataset that has been checked. Raises DataError."""
    data_check.require_checked(dataset, verdicts)
    return data_check.manifest_of(dataset).fingerprint


def digest(file: Path) -> str:
    """Returns the sha256 of a small file. Raises CheckpointError if it is missing."""
    if not file.is_file():
        raise CheckpointError(
            f"{file} does not exist; restore it, or move stages.json away and run the same command again"
        )
    return file_sha256(file)


def size_of(folder: Path) -> int:
    """Returns the bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def quoted(path: Path) -> str:
    """Returns a path as a value of Hydra's grammar."""
    text = str(path)
    return text if re.fullmatch(r"[\w/.+@%-]+", text, re.ASCII) else quoted_value(text)
