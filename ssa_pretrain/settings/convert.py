"""Plain dictionaries to a typed configuration and back: the border between composed YAML and the dataclasses.

`config_from_dict` converts every value to its field's type. It collects all problems instead of stopping at the first one. A field with a problem
keeps its default, so that the rules of other fields still make sense. Numbers are read as a person means them: "1e-3" is a float, 1e9 an integer
where one is wanted. Booleans are never numbers. nan and inf are never values. Saved configurations are YAML.
"""

import dataclasses
import math
import re
import types
from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml

from ssa_pretrain.settings.files import write_atomically
from ssa_pretrain.settings.kinds import by_kind, kind_of, section_of, sections_in
from ssa_pretrain.settings.problems import SECRET, ConfigError, Problem, join, show
from ssa_pretrain.settings.suggestions import closest
from ssa_pretrain.settings.typed import read_yaml

MISSING = "???"
NOT_SET = "is not set and has no default"
SUFFIX = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kKmMgGbBtT])\s*$")
POWERS = {"k": 3, "m": 6, "g": 9, "b": 9, "t": 12}
SECRET_RULE = "is a secret, and the configuration is saved"
SECRET_ADVICE = "set WANDB_API_KEY or HF_TOKEN in the environment, or log in with `wandb login` or `hf auth login`"

Root = TypeVar("Root")


def config_from_dict(root: type[Root], tree: dict[str, Any]) -> tuple[Root, list[Problem]]:
    """Returns the typed configuration of a nested dictionary, and a problem for every key or value that does not fit."""
    reader = _Reader(known_keys(root))
    return reader.section(root, tree, ""), reader.problems


def config_to_dict(config: Any) -> dict[str, Any]:
    """Returns the configuration as plain dictionaries, lists, strings and numbers, in the order of the fields."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def save_config(config: Any, path: Path | str) -> None:
    """Writes the whole configuration as YAML that `load_config` and Hydra read back to the same values."""
    write_atomically(Path(path), yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True))


def load_config(root: type[Root], path: Path | str) -> Root:
    """Returns the configuration that `save_config` wrote; ConfigError (a ValueError) lists what does not fit."""
    tree = read_yaml(Path(path).read_text(encoding="utf-8"), root)
    if not isinstance(tree, dict):
        advice = "give a config.yaml that a run saved"
        raise ConfigError([Problem(str(path), None, "does not hold a configuration", advice)])
    config, problems = config_from_dict(root, tree)
    if problems:
        raise ConfigError(problems)
    return config


def known_keys(section: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the dotted key and the type of every field that holds a value, without the sections; those of every kind of a section."""
    keys: dict[str, Any] = {}
    for f in dataclasses.fields(section):
        members = sections_in(f.type)
        for member in members:
            keys = known_keys(member, f"{prefix}{f.name}.") | keys
        if not members:
            keys[prefix + f.name] = f.type
    return keys


def unknown_key(key: str, value: object, known: Iterable[str]) -> Problem:
    """Returns the problem of a key that no section has, with the nearest known one."""
    if SECRET.search(key):
        return Problem(key, value, SECRET_RULE, SECRET_ADVICE)
    if key.rsplit(".", 1)[-1].startswith("_") and key.endswith("_"):
        return Problem(key, value, "is not a key: nothing is instantiated from the configuration", "remove it")
    found = closest(key, known)
    advice = f"did you mean {join(found)}?" if found else "see --help for all keys"
    return Problem(key, value, "is not a known key", advice)


def absent_key(root: Any, tree: dict[str, Any], key: str) -> Problem:
    """Returns the problem of a key that the sections of a configuration do not have.

    Args:
        root: the dataclass of the whole configuration.
        tree: the configuration as plain values; it decides the kinds of its sections.
        key: dotted.
    """
    group = key.partition(".")[0]
    kind = next((f.type for f in dataclasses.fields(root) if f.name == group), None)
    other = _of_another_kind(kind, section_of(kind, tree.get(group)), key, None) if by_kind(kind) else None
    return other or unknown_key(key, None, known_keys(root))


def _of_another_kind(kind: Any, cls: Any, key: str, value: Any) -> Problem | None:
    """Returns the problem of a key that another kind of its section has; None if no kind has it."""
    section, _, name = key.rpartition(".")
    takers = [
        taker for taker, member in by_kind(kind).items() if any(f.name == name for f in dataclasses.fields(member))
    ]
    if not takers:
        return None
    rule = f"belongs to {section}={join(takers)}, and {section} is of the kind {kind_of(cls)}"
    choice = f"{section}.kind" if "." in section else section
    return Problem(key, value, rule, f"add {choice}={takers[0]}")


class MismatchError(Exception):
    """A value that does not fit its field's type; without advice of its own, the default is the advice."""

    def __init__(self, rule: str, advice: str = "") -> None:
        super().__init__(rule)
        self.rule = rule
        self.advice = advice


class _Reader:
    """Converts sections and collects their problems."""

    def __init__(self, known: Iterable[str]) -> None:
        self.known = list(known)
        self.problems: list[Problem] = []

    def section(self, kind: Any, tree: Any, key: str) -> Any:
        """Returns one dataclass from one dictionary, its subsections included."""
        cls, members = section_of(kind, tree), by_kind(kind)
        if not isinstance(tree, dict):
            names = join((f.name for f in dataclasses.fields(cls)), "and")
            self._report(key, tree, "is a section, not a value", f"it has the keys {names}")
            return cls()
        if members and (given := tree.get("kind")) not in members:
            near = closest(str(given), members, 1) if given else []
            advice = f"did you mean {near[0]}?" if near else f"try {next(iter(members))}"
            self._report(f"{key}.kind", given, f"must be {join(members)}", advice)
            return cls()
        prefix = f"{key}." if key else ""
        kinds = {f.name: f.type for f in dataclasses.fields(cls)}
        for name, value in tree.items():
            if name not in kinds:
                self.problems.append(self._unknown(kind, cls, f"{prefix}{name}", value))
        defaults, values = cls(), {}
        for name, inner in kinds.items():
            default = getattr(defaults, name)
            if name in tree:
                values[name] = self._field(inner, tree[name], prefix + name, default)
            elif isinstance(default, str) and default == MISSING:
                values[name] = self._not_set(inner, prefix + name, default)
        return cls(**values)

    def _field(self, kind: Any, value: Any, key: str, default: Any) -> Any:
        """Returns one field's value; its default if the value does not fit."""
        if sections_in(kind):
            return self.section(kind, value, key)
        if isinstance(value, str) and value == MISSING:
            return self._not_set(kind, key, default)
        if get_origin(kind) is dict and isinstance(value, dict):
            inner = get_args(kind)[1]
            return dict(entry for name, item in value.items() for entry in self._entry(inner, item, key, str(name)))
        if get_origin(kind) is list and isinstance(value, list) and sections_in(inner := get_args(kind)[0]):
            return [self.section(inner, item, f"{key}[{number}]") for number, item in enumerate(value)]
        try:
            return convert(kind, value)
        except MismatchError as mismatch:
            fallback = f"see --explain {key}" if default == MISSING else f"try {show(default)}"
            self._report(key, value, mismatch.rule, mismatch.advice or fallback)
            return _empty(kind) if default == MISSING else default

    def _entry(self, kind: Any, value: Any, mapping: str, name: str) -> Iterator[tuple[str, Any]]:
        """Yields a mapping's entry if it fits. A section that has a field `name` without a value is called after its key."""
        key = f"{mapping}.{name}"
        if not sections_in(kind):
            try:
                yield name, convert(kind, value)
            except MismatchError as mismatch:
                self._report(key, value, mismatch.rule, mismatch.advice or f"see --explain {mapping}")
            return
        named = isinstance(value, dict) and "name" not in value
        if named and any(f.name == "name" for f in dataclasses.fields(section_of(kind, value))):
            value = {"name": name, **value}
        yield name, self.section(kind, value, key)

    def _unknown(self, kind: Any, cls: Any, key: str, value: Any) -> Problem:
        """Returns the problem of a key that a section lacks."""
        if other := _of_another_kind(kind, cls, key, value):
            return other
        section, _, name = key.rpartition(".")
        if not section or SECRET.search(key) or any(known.startswith(f"{section}.") for known in self.known):
            return unknown_key(key, value, self.known)
        names = [f.name for f in dataclasses.fields(cls)]  # of a section in a mapping
        near = closest(name, names, 1)
        advice = f"did you mean {section}.{near[0]}?" if near else f"it has the keys {join(names, 'and')}"
        return Problem(key, value, f"is not a known key of {section}", advice)

    def _not_set(self, kind: Any, key: str, default: Any) -> Any:
        self.problems.append(Problem(key, None, NOT_SET, f"give {key}=…"))
        return _empty(kind) if default == MISSING else default

    def _report(self, key: str, value: Any, rule: str, advice: str) -> None:
        self.problems.append(Problem(key, show(value), rule, advice))


def convert(kind: Any, value: Any) -> Any:
    """Returns a value as a field's type; raises MismatchError."""
    if get_origin(kind) in (Union, types.UnionType):
        inner, *more = (member for member in get_args(kind) if member is not types.NoneType)
        return _number_or_word(inner, more[0], value) if more else _optional(inner, value)
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
            item = "" if value is None or sections_in(get_args(kind)[0]) else value
            raise MismatchError("must be a list", f"try [{item}]")
        if get_origin(get_args(kind)[0]) is list and not all(isinstance(item, list) for item in value):
            raise MismatchError("must be a list of lists", f"try [[{','.join(map(str, value))}]]")
        return [convert(get_args(kind)[0], item) for item in value]
    if not isinstance(value, dict):
        advice = "" if sections_in(get_args(kind)[1]) else "try {name: 1.0}"
        raise MismatchError("must be a mapping of names to values", advice)
    return {_text(name): convert(get_args(kind)[1], item) for name, item in value.items()}


def _optional(kind: Any, value: Any) -> Any:
    return None if value in (None, "null") else convert(kind, value)


def _number_or_word(number: Any, words: type[Enum], value: Any) -> Any:
    """Returns a number, or one of a few words that stand for one."""
    names = [member.value for member in words]
    if value in names:
        return words(value)
    try:
        return convert(number, value)
    except MismatchError as mismatch:
        raise MismatchError(f"{mismatch.rule} or {join(names)}", mismatch.advice or f"try {names[0]}") from None


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
    """Returns the advice for a number with a suffix such as 100B or 3k; empty for anything else."""
    suffixed = SUFFIX.match(value) if isinstance(value, str) else None
    return f"try {suffixed[1]}e{POWERS[suffixed[2].lower()]}" if suffixed else ""


def _empty(kind: Any) -> Any:
    """Returns a placeholder for a value that is not set, so that rules can still read it."""
    return {list: [], dict: {}}.get(get_origin(kind), MISSING)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return config_to_dict(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return {name: _plain(item) for name, item in value.items()} if isinstance(value, dict) else value
