"""`--explain KEY`: a key's meaning, type, range, default and value in the command's configuration.

The meaning is the comment on the field's line, else the docstring of its type (a section, an enumeration). The range comes from the rules: the
configuration's `problems` are read with values at both ends. Nothing is written twice.
"""

import ast
import copy
import dataclasses
import inspect
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from io import StringIO
from operator import attrgetter
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from ssa_pretrain.settings.convert import absent_key, config_to_dict, known_keys
from ssa_pretrain.settings.kinds import section_of, sections_in
from ssa_pretrain.settings.problems import ConfigError, Problem, join
from ssa_pretrain.settings.suggestions import closest

PROBES = (-1, 0, 1, 10**15 + 1)
SHOWN_VALUE = 24  # letters of a value in a list of keys
NO_VALUE = "???"


@dataclass(frozen=True, slots=True)
class Setting:
    """One key.

    Attributes:
        key: dotted.
        meaning: in one line.
        type: of its value.
        default: its value where nothing sets it; dataclasses.MISSING: none.
        value: its value in a configuration, as plain values.
    """

    key: str
    meaning: str
    type: Any
    default: Any
    value: Any


@dataclass(frozen=True, slots=True)
class Section:
    """A section of keys, or the whole configuration under the empty key."""

    key: str
    meaning: str


def explain(asked: str, config: Any, groups: Mapping[str, Sequence[str]]) -> str:
    """Returns the text for a key, a section, a group or a pattern of keys.

    Args:
        asked: the key, section, group or pattern that the user gave; empty: everything.
        config: the command's configuration; its `problems` are its rules.
        groups: the options of each group.

    Raises:
        ConfigError: nothing has this name.
    """
    root, values = type(config), config_to_dict(config)
    known = settings_of(root, values)
    text = explained(asked, known, lambda key: ranges(config, key))
    options = groups.get(asked, ())
    if options and text:
        head, *table = text.splitlines()
        return "\n".join([head, f"  options of the group: {join(options)}", *table])
    if options:
        return f"{asked}: a group of whole settings; {asked}={join(options)}"
    if text:
        return text
    if any(sign in asked for sign in "*?["):
        section = next(entry.key for entry in known if isinstance(entry, Section) and entry.key)
        advice = f"try '{section}.*', or --explain without a key for all keys"
        raise ConfigError([Problem(asked, None, "matches no key", advice)])
    names = [*groups, *(entry.key for entry in known if isinstance(entry, Section) and entry.key)]
    near = closest(asked, [*known_keys(root), *names], 1)
    if near and near[0] in names:
        raise ConfigError([Problem(asked, None, "is not a known key", f"did you mean {near[0]}?")])
    raise ConfigError([absent_key(root, values, asked)])


def ranges(config: Any, key: str) -> list[str]:
    """Returns the section's rules for a number, in words. Rules that also read other keys are left out."""
    if known_keys(type(config)).get(key) not in (int, float):
        return []
    section, _, name = key.rpartition(".")
    rules: dict[str, None] = {}
    for probe in PROBES:
        trial = copy.deepcopy(config)
        values: Any = attrgetter(section)(trial) if section else trial
        if hasattr(values, "enabled"):
            values.enabled = True  # a section that is off has no rules
        setattr(values, name, probe)
        rules |= {p.rule: None for p in trial.problems() if p.key == key and not p.reads}
    return list(rules)


def settings_of(cls: Any, values: Mapping[str, Any]) -> list[Section | Setting]:
    """Returns a configuration's sections and keys in the order of the fields.

    Args:
        cls: the dataclass of the whole configuration.
        values: a configuration as plain values; a key that it lacks has its default.
    """
    return [Section("", _docstring(cls)), *_walk(cls, values, "")]


def field_comments(cls: Any) -> dict[str, str]:
    """Returns the comment on the line of each field of a dataclass, inherited ones first, or of each member of an enumeration; empty where there is none."""
    found: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base) and base is not cls]):
        found |= _own_comments(base)
    return found | _own_comments(cls)


def _own_comments(cls: Any) -> dict[str, str]:
    """Returns the comments on the fields or members that a class itself has."""
    source = Path(inspect.getfile(cls)).read_text(encoding="utf-8")
    tree = next(n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ClassDef) and n.name == cls.__name__)
    lines = source.splitlines(keepends=True)
    found = {}
    for node in tree.body:
        target = (
            node.target
            if isinstance(node, ast.AnnAssign)
            else node.targets[0]
            if isinstance(node, ast.Assign)
            else None
        )
        if isinstance(target, ast.Name):
            found[target.id] = _comment("".join(lines[node.lineno - 1 : node.end_lineno]))
    return found


def explained(asked: str, known: list[Section | Setting], ranges: Callable[[str], list[str]]) -> str | None:
    """Returns the text for a key, a section or a pattern of keys. None if nothing has that name.

    Args:
        asked: the key, section or pattern; a key within a mapping stands for the mapping, "" and "*" for everything.
        known: all sections and keys, as `settings_of` lists them.
        ranges: returns the rules for a key's value.
    """
    asked = "" if asked == "*" else asked.removesuffix(".")
    settings = [entry for entry in known if isinstance(entry, Setting)]
    for entry in settings:
        if entry.key == asked or (get_origin(entry.type) is dict and asked.startswith(f"{entry.key}.")):
            return _one(entry, ranges(entry.key))
    if section := next((entry for entry in known if isinstance(entry, Section) and entry.key == asked), None):
        below = [entry for entry in settings if not asked or entry.key.startswith(f"{asked}.")]
        return "\n".join([f"{asked}: {section.meaning}" if asked else section.meaning, *_table(below)])
    found = [entry for entry in settings if fnmatchcase(entry.key, asked)]
    return "\n".join(_table(found)) if found else None


def _walk(cls: Any, values: Mapping[str, Any], prefix: str) -> Iterator[Section | Setting]:
    comments = field_comments(cls)
    for field in dataclasses.fields(cls):
        key, kind = prefix + field.name, field.type
        value = values.get(field.name, dataclasses.MISSING)
        if sections_in(kind):
            section = section_of(kind, value)
            yield Section(key, comments[field.name] or _docstring(section))
            yield from _walk(section, value if isinstance(value, Mapping) else {}, f"{key}.")
            continue
        meaning = comments[field.name] or (_uncapitalized(_docstring(kind)) if _is_enum(kind) else "")
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        yield Setting(key, meaning, kind, default, default if value is dataclasses.MISSING else value)


def _one(setting: Setting, rules: list[str]) -> str:
    lines = [f"{setting.key}: {setting.meaning}"]
    lines.append(f"  type     {'; '.join([_type(setting.type), *rules])}")
    if _is_enum(setting.type):
        comments = field_comments(setting.type)
        width = max(len(str(member.value)) for member in setting.type)
        choices = [f"{member.value:<{width}}  {comments.get(member.name, '')}".rstrip() for member in setting.type]
        lines += [f"           {choice}" for choice in choices]
    return "\n".join([*lines, f"  default  {_shown(setting.default)}", f"  here     {_shown(setting.value)}"])


def _table(settings: list[Setting]) -> list[str]:
    rows = [(entry.key, _shown(entry.value), entry.meaning) for entry in settings]
    rows = [
        (key, f"{value[: SHOWN_VALUE - 1]}…" if len(value) > SHOWN_VALUE else value, text) for key, value, text in rows
    ]
    wide = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
    return [f"  {key:<{wide[0]}}  {value:<{wide[1]}}  {text}" for key, value, text in rows]


def _type(kind: Any) -> str:
    """Returns a type in words."""
    words = {
        bool: "true or false",
        int: "whole number",
        float: "number",
        str: "text",
        Any: "any value",
        type(None): "null",
    }
    if _is_enum(kind):
        return "one of"
    if isinstance(kind, UnionType):
        return " or ".join(
            ", ".join(member.value for member in part) if _is_enum(part) else _type(part) for part in get_args(kind)
        )
    if get_origin(kind) is list and sections_in(get_args(kind)[0]):
        names = (f.name for f in dataclasses.fields(get_args(kind)[0]))
        return f"list, each a mapping with some of {join(names, 'and')}"
    if get_origin(kind) is list:
        return f"list, each a {_type(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return f"mapping of names, each to a {_type(get_args(kind)[1])}".replace("a any", "any")
    return words.get(kind, "mapping")


def _shown(value: Any) -> str:
    """Returns a value as a user writes it."""
    if value is dataclasses.MISSING or value == NO_VALUE:
        return "none; must be set"
    value = value.value if isinstance(value, Enum) else value
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(_shown, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {_shown(item)}' for name, item in value.items())}}}"
    return str(value) or "''"


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _docstring(cls: Any) -> str:
    """Returns the first paragraph of a class's docstring, in one line, without its full stop."""
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split()).removesuffix(".")


def _uncapitalized(text: str) -> str:
    return text[:1].lower() + text[1:]


def _comment(text: str) -> str:
    """Returns the comments in a statement's source."""
    tokens = tokenize.generate_tokens(StringIO(inspect.cleandoc(text)).readline)
    return " ".join(token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT)
