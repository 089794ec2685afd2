"""A run's folder on the command line: `evaluate RUN key=value …`, where the run's own `config.yaml` is the configuration.

RUN is the folder of a run, even after it was moved, or one of its checkpoints, also as RUN@STEP. `expand` replaces it by arguments that every entry point
takes: `--config-path`, `output_dir`, and overrides of settings that only training needs. The user's own settings follow and win.
Checkpoints load on any layout, so if the run's layout does not fit the number of processes, the layout is reset to its defaults.
Neither torch nor Hydra is imported.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ssa_pretrain.config import Config, ParallelConfig
from ssa_pretrain.errors import CheckpointError
from ssa_pretrain.run_folder import named_folder
from ssa_pretrain.settings.convert import load_config
from ssa_pretrain.settings.problems import ConfigError, Problem

CONFIG = "config.yaml"
FACTS = "checkpoint.json"
# Flags that take the next word as their value.
TAKE_A_WORD = ("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--cfg", "-c", "--package", "-p")
TAKE_A_WORD += ("--info", "-i", "--explain", "--local_rank", "--local-rank")


def find_run_argument(arguments: Sequence[str]) -> int | None:
    """Returns the index of the argument that is neither a flag nor key=value: the run's folder. None if there is none."""
    for index, argument in enumerate(arguments):
        if argument.startswith("-") or (index and arguments[index - 1] in TAKE_A_WORD):
            continue
        key, equals, _ = argument.partition("=")
        if not equals or ("/" in key and named_folder(argument).is_dir()):
            return index
    return None


def named_checkpoint(arguments: Sequence[str]) -> Path | None:
    """Returns the folder of the run or the checkpoint that a command names. None if it names nothing.

    Raises:
        CheckpointError: it names a run that has no checkpoint.
    """
    if (index := find_run_argument(arguments)) is None:
        return None
    folder = named_folder(arguments[index])
    if (folder / FACTS).is_file():
        return folder
    if (folder / CONFIG).is_file() and not any((folder / "checkpoints").glob("step_*")):
        raise CheckpointError(
            f"{folder} holds no checkpoint; wait for the run's first one, or give another run's folder"
        )
    return folder


def expand(arguments: Sequence[str], world_size: int) -> tuple[list[str], str]:
    """Returns a command line with RUN replaced by flags and settings, and a line for the user if the run's layout does not fit, else "".

    Args:
        arguments: the command line.
        world_size: processes of this command.

    Raises:
        ConfigError: the folder is not a run's, or its configuration cannot be read.
    """
    if (index := find_run_argument(arguments)) is None:
        return list(arguments), ""
    named, rest = arguments[index], [*arguments[:index], *arguments[index + 1 :]]
    if any(word.partition("=")[0] in ("-cp", "--config-path") for word in rest):
        rule = "is a run's folder, and --config-path names another configuration"
        raise ConfigError([Problem(named, None, rule, "give one of the two")])
    folder = find_run_folder(named)
    try:
        saved = load_config(Config, folder / CONFIG)
    except ConfigError:  # the composition reports each of its problems
        saved = None
    layout, note = _layout_overrides(saved.parallel, world_size, rest) if saved else ([], "")
    origin = ["checkpoint.init_from=''", "checkpoint.branch_from=''", "evaluation.ema=false"]
    placed = [f"output_dir={_quoted(str(folder))}", *origin, "parallel.world_size=0", *layout]
    return ["--config-path", str(folder), *placed, *rest], note


def find_run_folder(named: str) -> Path:
    """Returns the run's folder for an argument that names it or one of its checkpoints."""
    folder = named_folder(named)
    if not folder.is_dir():
        if folder != Path(named):
            raise ConfigError(
                [Problem(named, None, f"does not exist: there is no {folder}", "give a step that is kept")]
            )
        rule = "is neither a run's folder nor key=value"
        raise ConfigError([Problem(named, None, rule, "give a folder that holds a run's config.yaml, or key=value")])
    if (folder / FACTS).is_file() and not (folder / CONFIG).is_file():
        run = folder.absolute().parents[1]
        run = folder.parents[1] if len(folder.parts) > 2 else run
        if not (run / CONFIG).is_file():
            rule = f"is a checkpoint outside a run's folder: {run / CONFIG} does not exist"
            raise ConfigError([Problem(named, None, rule, "give a checkpoint that lies in its run's folder")])
        return run
    if not (folder / CONFIG).is_file():
        rule = f"is not a run's folder: {folder / CONFIG} does not exist"
        advice = "give the output_dir of a run, or the run's own command line"
        raise ConfigError([Problem(named, None, rule, advice)])
    return folder


def _layout_overrides(saved: ParallelConfig, world_size: int, rest: Sequence[str]) -> tuple[list[str], str]:
    """Returns overrides that reset the run's layout, and a line about them. Both are empty if the layout fits or the user sets one."""
    unit = saved.tp * saved.pp * saved.cp
    if unit < 1 or world_size % unit == 0 or any(word.lstrip("+").startswith("parallel") for word in rest):
        return [], ""
    fields = [f for f in dataclasses.fields(ParallelConfig) if f.name != "world_size"]
    plain = [f"parallel.{f.name}={str(f.default).lower()}" for f in fields]
    degrees = f"tp {saved.tp}, pp {saved.pp}, cp {saved.cp}"
    processes = f"{world_size} process{'es' if world_size > 1 else ''}"
    note = f"the run's layout ({degrees}) takes a multiple of {unit} processes; on {processes} it is evaluated without"
    return [*plain, "engine.overlap_tp=false"], note


def _quoted(text: str) -> str:
    """Returns a text as a quoted value of Hydra's grammar."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
