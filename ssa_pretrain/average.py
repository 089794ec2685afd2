"""Entry point: averages the weights of several checkpoints into the folder of a run that `evaluate`, `export` and `checkpoint.init_from` take.

    python -m ssa_pretrain.average outputs/run@9000 outputs/run@9500 outputs/run@10000 out=outputs/soup
    python -m ssa_pretrain.average outputs/seed_1 outputs/seed_2 out=outputs/soup 'weights=[0.7,0.3]'

RUN@STEP is a run's checkpoint of that step, RUN its newest intact one; a checkpoint's folder is accepted too. All must hold the same model with the same
tokenizer; engine, layout and data do not matter. The result has the configuration of the first one, only weights, and the step of the latest one. It
records the checkpoints that it averages. Settings, as key=value:

    out      folder of the result; must not exist
    weights  share of each checkpoint; default: all the same
    dtype    fp32 (default) or bf16: number format of the result; sums are in fp64
    ema      true: average the running means of the weights instead (optim.ema_decay)

Exit codes: 0 done, 3 wrong settings, 5 no checkpoint, or one of another model. Guide: docs/schedules.md
"""

import os
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ssa_pretrain.config import Config, ParallelConfig
from ssa_pretrain.errors import CheckpointError, ExitCode, UsageError
from ssa_pretrain.huggingface.options import Dtype, new_folder_problems, read_settings, wants_help
from ssa_pretrain.libraries import hide_library_warnings, import_megatron_core
from ssa_pretrain.process import rank_process
from ssa_pretrain.run_folder import named_folder
from ssa_pretrain.saved_run import CONFIG, find_run_folder
from ssa_pretrain.settings.command_line import report
from ssa_pretrain.settings.convert import load_config, save_config
from ssa_pretrain.settings.problems import ConfigError, Problem

PROGRAM = "ssa_pretrain.average"


@dataclass(kw_only=True, slots=True)
class AverageOptions:
    """Settings of `python -m ssa_pretrain.average`."""

    out: str = ""  # folder of the result; must not exist
    weights: list[float] = field(default_factory=list)  # share of each checkpoint; empty: all the same
    dtype: Dtype = Dtype.fp32  # number format of the result
    ema: bool = False  # average the running means of the weights

    def problems(self) -> list[Problem]:
        """Returns the problems of these settings."""
        found = new_folder_problems("out", self.out)
        if self.weights and (min(self.weights) < 0.0 or sum(self.weights) <= 0.0):
            rule = "must be shares of at least 0 with a sum above 0"
            found.append(Problem("weights", self.weights, rule, "try weights=[0.5,0.5]"))
        return found


def main() -> None:
    """Reads the command line and averages."""
    with rank_process(
        "interrupted; the same command averages again", code=ExitCode.INTERRUPTED, signals=[signal.SIGINT]
    ):
        average_checkpoints(sys.argv[1:])


def average_checkpoints(arguments: Sequence[str]) -> None:
    """Averages the checkpoints that a command line names.

    Raises:
        UsageError: the command line is wrong.
        ConfigError: there are several processes, or a folder is not a run's.
        CheckpointError: a checkpoint is missing, damaged or holds another model.
        WeightsError: a checkpoint has no common weights, or no running mean.
    """
    if wants_help(arguments):
        print(__doc__)
        return
    named, options = read_arguments(arguments)
    if (world_size := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        rule = "must be 1: one process reads the checkpoints"
        raise ConfigError([Problem("WORLD_SIZE", world_size, rule, "start it without a launcher")])
    folders = [named_folder(name) for name in named]
    runs = [find_run_folder(str(folder)) for folder in folders]
    hide_library_warnings()
    import_megatron_core()
    from ssa_pretrain.parallel.state import joined

    config = load_config(Config, runs[0] / CONFIG)
    with joined(ParallelConfig(), seed=config.seed) as placement:
        published, step = publish_average(folders, options, config, placement.device)
    print(f"averaged {len(folders)} checkpoints: {published}, as step {step}")


def read_arguments(arguments: Sequence[str]) -> tuple[list[str], AverageOptions]:
    """Returns the named checkpoints and the settings of a command line.

    Raises:
        UsageError: with every problem.
    """
    named = [word for word in arguments if "=" not in word or named_folder(word).is_dir()]
    options, problems = read_settings(AverageOptions, [word for word in arguments if word not in named])
    missing = [word for word in named if not named_folder(word).is_dir()]
    advice = "give RUN, RUN@STEP or a checkpoint's folder"
    problems += [Problem(word, None, "is neither a run nor a checkpoint", advice) for word in missing]
    if len(named) < 2:
        count = f"names {len(named) or 'no'} checkpoint{'s' * (len(named) != 1)}"
        problems.append(Problem("the command line", None, count, "give two or more: RUN@STEP RUN@STEP …"))
    elif options.weights and len(options.weights) != len(named):
        count = len(options.weights)
        rule = f"has {count} share{'s' * (count > 1)} for {len(named)} checkpoints"
        problems.append(Problem("weights", options.weights, rule, "give one for each, in their order"))
    if problems:
        raise UsageError(report(PROGRAM, ConfigError(problems)))
    return named, options


def publish_average(folders: Sequence[Path], options: AverageOptions, config: Config, device: Any) -> tuple[Path, int]:
    """Writes the run's folder of an average. Returns its checkpoint and the step."""
    from ssa_pretrain.checkpoint.averaging import average
    from ssa_pretrain.checkpoint.facts import AVERAGED, HISTORY
    from ssa_pretrain.checkpoint.find import newest, require_same_model
    from ssa_pretrain.checkpoint.publish import publish
    from ssa_pretrain.checkpoint.weights import EMA, WEIGHTS, WeightsReader, ema_weights
    from ssa_pretrain.huggingface.exporting import DTYPES

    sources = []
    for folder in folders:
        found = newest(folder, is_rank_0=True, device=device, report=print)
        if found is None:
            raise CheckpointError(f"{folder} holds no checkpoint; give RUN, RUN@STEP or a checkpoint's folder")
        sources.append(found)
    first = sources[0]
    for other in sources[1:]:
        require_same_model(other, first.facts)
        ours, theirs = (one.facts.get("vocabulary.tokenizer_sha256") for one in (first, other))
        if None not in (ours, theirs) and ours != theirs:
            raise CheckpointError(f"{other.folder} was trained with another tokenizer than {first.folder}")
    shares = options.weights or [1.0] * len(sources)
    readers = [WeightsReader(ema_weights(s.folder) if options.ema else s.folder / WEIGHTS) for s in sources]
    averaged = [
        {"from": str(source.folder), "step": source.step, "share": share / sum(shares)}
        | ({EMA: True} if options.ema else {})
        for source, share in zip(sources, shares, strict=True)
    ]
    facts = {key: value for key, value in first.facts.items() if key != HISTORY} | {AVERAGED: averaged}
    out, step = Path(options.out), max(source.step for source in sources)
    out.mkdir(parents=True)
    try:
        dtype = DTYPES[options.dtype]
        published = publish(
            out, step, facts, lambda folder: average(readers, shares, folder / WEIGHTS, dtype), keep=1, is_rank_0=True
        )
        checkpoints = replace(config.checkpoint, init_from="", branch_from="")
        save_config(replace(config, name=out.name, output_dir=str(out), checkpoint=checkpoints), out / CONFIG)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return published, step


if __name__ == "__main__":
    main()
