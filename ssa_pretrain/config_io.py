"""Plain dictionaries to a typed `Config` and back: the border between composed YAML and the dataclasses.

`config_from_dict` converts every value to its field's type and collects all problems instead of stopping at the first; a
field with a problem keeps its default, so that the checks of other fields still make sense. Numbers are read as a person
means them ("1e-3" is a float, 1e9 an integer where one is wanted); booleans are never numbers; nan and inf are never values.
Saved configurations are YAML.
"""

import dataclasses
import math
import re
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from ssa_pretrain.config import Config
from ssa_pretrain.problems import SECRET, ConfigError, Problem, join, show
from ssa_pretrain.settings.files import write_atomically
from ssa_pretrain.settings.typed import read_yaml
from ssa_pretrain.suggestions import closest

MISSING = "???"
SUFFIX = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kKmMgGbBtT])\s*$")
POWERS = {"k": 3, "m": 6, "g": 9, "b": 9, "t": 12}
SECRET_RULE = "is a secret, and the configuration is saved with the run"
SECRET_ADVICE = "set WANDB_API_KEY in the environment or run `wandb login`"


def config_from_dict(tree: dict[str, Any]) -> tuple[Config, list[Problem]]:
    """Returns the typed configuration of a nested dictionary, and every key or value in it that does not fit."""
    problems: list[Problem] = []
    return _section(Config, tree, "", problems), problems


def config_to_dict(config: Any) -> dict[str, Any]:
    """Returns the configuration as plain dictionaries, lists, strings and numbers, in the order of the fields."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def save_config(config: Config, path: Path | str) -> None:
    """Writes the whole configuration as YAML that `load_config` and Hydra read back to the same values."""
    write_atomically(Path(path), yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True))


def load_config(path: Path | str) -> Config:
    """Returns the configuration that `save_config` wrote; ConfigError (a ValueError) lists what does not fit."""
    tree = read_yaml(Path(path).read_text(encoding="utf-8"), Config)
    if not isinstance(tree, dict):
        raise ConfigError(
            [Problem(str(path), None, "does not hold a configuration", "give a config.yaml that a run saved")]
        )
    config, problems = config_from_dict(tree)
    if problems:
        raise ConfigError(problems)
    return config


def known_keys(section: Any = Config, prefix: str = "") -> dict[str, Any]:
    """Returns the dotted key and the type of every field that holds a value (sections left out)."""
    keys: dict[str, Any] = {}
    for f in dataclasses.fields(section):
        if dataclasses.is_dataclass(f.type):
            keys |= known_keys(f.type, f"{prefix}{f.name}.")
        else:
            keys[prefix + f.name] = f.type
    return keys


def unknown_key(key: str, value: object) -> Problem:
    """Returns the problem of a key that no section has, with the nearest one that exists."""
    if SECRET.search(key):
        return Problem(key, value, SECRET_RULE, SECRET_ADVICE)
    if key.rsplit(".", 1)[-1].startswith("_") and key.endswith("_"):
        return Problem(key, value, "is not a key: nothing is instantiated from the configuration", "remove it")
    found = closest(key, known_keys())
    advice = f"did you mean {join(found)}?" if found else "see --help for all keys"
    return Problem(key, value, "is not a known key", advice)


def _section(cls: Any, tree: Any, prefix: str, problems: list[Problem]) -> Any:
    """One dataclass from one dictionary, its subsections included."""
    if not isinstance(tree, dict):
        names = join((f.name for f in dataclasses.fields(cls)), "and")
        advice = f"it has the keys {names}"
        problems.append(Problem(prefix.rstrip("."), show(tree), "is a section, not a value", advice))
        return cls()
    types = {f.name: f.type for f in dataclasses.fields(cls)}
    defaults = cls()
    problems.extend(unknown_key(f"{prefix}{name}", value) for name, value in tree.items() if name not in types)
    values = {}
    for name, kind in types.items():
        if name not in tree:
            continue
        if dataclasses.is_dataclass(kind):
            values[name] = _section(kind, tree[name], f"{prefix}{name}.", problems)
            continue
        try:
            values[name] = convert(kind, tree[name])
        except MismatchError as mismatch:
            advice = mismatch.advice or f"try {show(getattr(defaults, name))}"
            problems.append(Problem(prefix + name, show(tree[name]), mismatch.rule, advice))
    return cls(**values)


class MismatchError(Exception):
    """A value that is not of its field's type; without advice of its own, the default is the advice."""

    def __init__(self, rule: str, advice: str = "") -> None:
        super().__init__(rule)
        self.rule = rule
        self.advice = advice


def convert(kind: Any, value: Any) -> Any:
    """Returns a value as a field's type; raises MismatchError."""
    if value == MISSING:
        raise MismatchError("is missing", "give it a value")
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _choice(kind, value)
    if kind is Any:
        return value
    if kind is bool:
        return _boolean(value)
    if kind is int:
        return _integer(value)
    if kind is float:
        return _number(value)
    if kind is str:
        return _text(value)
    if get_origin(kind) is list:
        if not isinstance(value, list):
            raise MismatchError("must be a list", f"try [{'' if value is None else value}]")
        return [convert(get_args(kind)[0], item) for item in value]
    if not isinstance(value, dict):
        raise MismatchError("must be a mapping of names to values", "try {name: 1.0}")
    return {_text(name): convert(get_args(kind)[1], item) for name, item in value.items()}


def _choice(kind: type[Enum], value: Any) -> Enum:
    names = [member.value for member in kind]
    # YAML reads a bare `off` as false.
    value = "off" if value is False and "off" in names else value
    if value in names:
        return kind(value)
    near = closest(str(value), names, 1)
    raise MismatchError(f"must be {join(names)}", f"did you mean {near[0]}?" if near else f"try {names[0]}")


def _boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    words = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False}
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    advice = {"1": "try true", "0": "try false"}.get(str(value), "")
    raise MismatchError("must be true or false", advice)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise MismatchError("must be a number", _example(value))
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise MismatchError("must be a number", _example(value)) from None
    if not math.isfinite(number):
        raise MismatchError("must be a finite number")
    return number


def _integer(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        number = _number(value)
    except MismatchError as mismatch:
        raise MismatchError(mismatch.rule.replace("number", "whole number"), mismatch.advice) from None
    if number != int(number):
        raise MismatchError("must be a whole number", f"try {math.floor(number)} or {math.ceil(number)}")
    return int(number)


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise MismatchError("must be text")
    return str(value)


def _example(value: Any) -> str:
    """The number that a person meant who wrote 100B or 3k; empty for anything else."""
    suffixed = SUFFIX.match(value) if isinstance(value, str) else None
    return f"try {suffixed[1]}e{POWERS[suffixed[2].lower()]}" if suffixed else ""


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return config_to_dict(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return {name: _plain(item) for name, item in value.items()} if isinstance(value, dict) else value
