"""What a key of a configuration means, as both command lines print it for `--explain KEY`.

The text is what the dataclasses say: the comment on a field's line, else the docstring of its type (a section, an enumeration). Nothing is written
twice. Stdlib only.
"""

import ast
import dataclasses
import inspect
import tokenize
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from io import StringIO
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

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


def settings_of(cls: Any, values: Mapping[str, Any], kinds: Mapping[str, Any] | None = None) -> list[Section | Setting]:
    """Returns a configuration's sections and keys in the order of the fields.

    Args:
        cls: the dataclass of the whole configuration.
        values: a configuration as plain values; a key that it lacks has its default.
        kinds: the dataclasses of sections that a choice decides, by key.
    """
    return [Section("", _docstring(cls)), *_walk(cls, values, "", kinds or {})]


def field_comments(cls: Any) -> dict[str, str]:
    """Returns the comment on the line of each field of a dataclass, or of each member of an enumeration; empty where there is none."""
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
    """Returns the text for a key, a section or a pattern of keys, or None where nothing is called so.

    Args:
        asked: what to explain; a key within a mapping stands for the mapping, "" and "*" for everything.
        known: what there is, as `settings_of` lists it.
        ranges: the rules that a key's value keeps, by key.
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


def _walk(cls: Any, values: Mapping[str, Any], prefix: str, kinds: Mapping[str, Any]) -> Iterator[Section | Setting]:
    comments = field_comments(cls)
    for field in dataclasses.fields(cls):
        key, kind = prefix + field.name, kinds.get(prefix + field.name, field.type)
        value = values.get(field.name, dataclasses.MISSING)
        if dataclasses.is_dataclass(kind):
            yield Section(key, comments[field.name] or _docstring(kind))
            yield from _walk(kind, value if isinstance(value, Mapping) else {}, f"{key}.", kinds)
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
    """A type in words."""
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
        return " or ".join(_type(part) for part in get_args(kind))
    if get_origin(kind) is list:
        return f"list, each a {_type(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return f"mapping of names, each to a {_type(get_args(kind)[1])}".replace("a any", "any")
    return words.get(kind, "mapping")


def _shown(value: Any) -> str:
    """A value as a user writes it."""
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
    """The first paragraph of a class's docstring, in one line, without its full stop."""
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split()).removesuffix(".")


def _uncapitalized(text: str) -> str:
    return text[:1].lower() + text[1:]


def _comment(text: str) -> str:
    """The comments in a statement's source."""
    tokens = tokenize.generate_tokens(StringIO(inspect.cleandoc(text)).readline)
    return " ".join(token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT)
