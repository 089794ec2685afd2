"""The arguments of `export` and `import_hf`: one folder, and key=value settings of a dataclass, all checked at once.

No Hydra: neither command has groups or files of settings. Values are converted as everywhere else (settings/convert.py).
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar, get_origin

import yaml

from ssa_pretrain.config import AttentionConfig, Method, Score
from ssa_pretrain.errors import UsageError
from ssa_pretrain.huggingface.settings import Mode
from ssa_pretrain.run_folder import named_folder, unwritable
from ssa_pretrain.settings.command_line import report
from ssa_pretrain.settings.convert import config_from_dict, known_keys
from ssa_pretrain.settings.problems import ConfigError, Problem, at_least

Options = TypeVar("Options")
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)
NO_DATA = "none"


class Dtype(StrEnum):
    """Number format of exported weights."""

    bf16 = "bf16"
    fp32 = "fp32"


class Weights(StrEnum):
    """Which weights of a checkpoint."""

    live = "live"  # those of its step
    ema = "ema"  # their running mean (optim.ema_decay)


class Gate(StrEnum):
    """The attention gate of a Llama, which has none."""

    off = "off"  # the model stays without: attention.gate=false
    open = "open"  # weights 0, so every gate is 1/2, and W_o is doubled: the same function, and the gate can learn


@dataclass(kw_only=True, slots=True)
class ExportOptions:
    """Settings of `python -m ssa_pretrain.export`."""

    out: str = ""  # folder of the export; must not exist
    weights: Weights = Weights.live
    dtype: Dtype = Dtype.bf16  # of the weights in the files
    attention_mode: Mode | None = (
        None  # what the model computes unless asked otherwise; null: full, sparse after method=moba, nsa or indexer
    )
    max_shard_size: str = "5GB"  # largest file of weights, in decimal units
    data: str = ""  # dataset whose tokenizer is exported; empty: the run's own; none: export no tokenizer
    add_bos: bool | None = None  # whether the tokenizer puts BOS before each text; null: as in training
    check: bool = False  # load the export with transformers and compare its logits with the training model's

    def problems(self) -> list[Problem]:
        """Returns the problems of these settings."""
        found = new_folder_problems("out", self.out)
        if not byte_count(self.max_shard_size):
            found.append(Problem("max_shard_size", self.max_shard_size, "must be a size", "try 5GB or 500MB"))
        if self.add_bos is not None and self.data == NO_DATA:
            rule = "is a setting of the tokenizer, and data=none exports none"
            found.append(Problem("add_bos", self.add_bos, rule, "leave out one of the two", ("data",)))
        return found


@dataclass(kw_only=True, slots=True)
class ImportOptions:
    """Settings of `python -m ssa_pretrain.import_hf`."""

    out: str = ""  # folder of the imported model; must not exist
    name: str = ""  # name of the model; empty: that of `out`
    gate: Gate | None = None  # the gate of a Llama without one; must be given for it, and for no other
    method: Method = Method.ssa  # attention.method in the folder's config.yaml
    sequence_length: int = (
        0  # data.sequence_length there; 0: the longest input of config.json, at most 8192 for foreign models
    )
    vocab_divisor: int = (
        0  # the embedding is padded to a multiple of this number of rows, with rows of 0; 0: no padding
    )
    data: str = ""  # data.path there, for `evaluate`; empty: to be given then

    def problems(self) -> list[Problem]:
        """Returns the problems of these settings."""
        return [*new_folder_problems("out", self.out), *at_least("", self, 0, "sequence_length", "vocab_divisor")]


def wants_help(arguments: Sequence[str]) -> bool:
    """Returns whether a command line asks for help."""
    return not arguments or bool({"-h", "--help"} & set(arguments))


def read_options(root: type[Options], program: str, what: str, arguments: Sequence[str]) -> tuple[Path, Options]:
    """Returns the folder and the settings of a command line.

    Args:
        root: the dataclass of the settings, with `problems()`.
        program: name of the command's module, such as "ssa_pretrain.export".
        what: the folder is, such as "the folder of a run".
        arguments: of the command line.

    Raises:
        UsageError: with every problem.
    """
    folders = [argument for argument in arguments if "=" not in argument or named_folder(argument).is_dir()]
    options, problems = read_settings(root, [argument for argument in arguments if argument not in folders])
    if len(folders) != 1:
        named = Problem(
            "the command line", None, f"names {len(folders) or 'no'} folder{'s' * (len(folders) > 1)}", f"give {what}"
        )
        problems = [named, *problems]
    elif not named_folder(folders[0]).is_dir():
        problems = [Problem(folders[0], None, "is not a folder", f"give {what}"), *problems]
    if problems:
        raise UsageError(report(program, ConfigError(problems)))
    return named_folder(folders[0]), options


def read_settings(root: type[Options], words: Sequence[str]) -> tuple[Options, list[Problem]]:
    """Returns the settings that words of the form KEY=VALUE give, and all their problems."""
    given, kinds = [word.partition("=") for word in words], known_keys(root)
    options, problems = config_from_dict(root, {key: _value(kinds.get(key), value) for key, _, value in given})
    wrong = {problem.key for problem in problems}
    return options, problems + [problem for problem in options.problems() if problem.key not in wrong]  # pyright: ignore[reportAttributeAccessIssue]


def _value(kind: Any, text: str) -> Any:
    """Returns a value from the command line: of lists and mappings its content, and one word is a list of one. Quotes around a text, as Hydra takes
    them in other commands, are left out.
    """
    if get_origin(kind) not in (list, dict):
        return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return [value] if get_origin(kind) is list and not isinstance(value, list) else value


def new_folder_problems(key: str, path: str) -> list[Problem]:
    """Returns the problem of a folder that is to be created: it has no name, something is there already, or it cannot be written."""
    if not path.strip():
        return [Problem(key, path, "must name a folder that does not exist yet", f"try {key}=outputs/{key}")]
    if Path(path).exists():
        return [
            Problem(key, path, "exists, and nothing is overwritten", f"remove it, or try {key}={path.rstrip('/')}_2")
        ]
    reason = unwritable(Path(path))
    return [Problem(key, path, reason, "try another folder")] if reason else []


def byte_count(text: str) -> int | None:
    """Returns the bytes of a size such as 5GB (decimal units); None if it is not one."""
    match = SIZE.fullmatch(text.strip())
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else None


def as_arguments(section: str, values: Any) -> list[str]:
    """Returns all settings of a section as a user writes them, such as model.num_layers=16: those of an experiment may differ from the defaults."""
    found = []
    for f in dataclasses.fields(values):
        value = getattr(values, f.name)
        if dataclasses.is_dataclass(value):
            found += as_arguments(f"{section}.{f.name}", value)
        else:
            found.append(f"{section}.{f.name}={str(value).lower() if isinstance(value, bool) else value}")
    return found


def attention_arguments(attention: AttentionConfig) -> list[str]:
    """Returns the settings of the attention that decide which weights a model has, as a user writes them."""
    if attention.method is Method.nsa:
        return ["attention=nsa", f"attention.score={attention.score}", f"attention.window={attention.window}"]
    found = ["attention=indexer"] * (attention.method is Method.indexer)
    found.append(f"attention.gate={str(attention.gate).lower()}")
    if attention.score is Score.indexer:
        found += ["attention.score=indexer", f"attention.indexer.heads={attention.indexer.heads}"]
    if attention.key_convolution:
        found.append(f"attention.key_convolution={attention.key_convolution}")
    return found
