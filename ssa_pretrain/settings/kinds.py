"""Sections of several kinds: `source: JsonlSource | HubSource`, where the value of the field `kind` picks the dataclass."""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin

NOT_GROUPS = ("hydra", "recipe", "lm_eval")  # folders beside the groups; lm_eval holds tasks, which no run reads
OPTIONAL_GROUPS = (
    "hardware",
)  # only programs whose configuration has this section offer the group; nothing need be chosen from it


def offers(root: Any, group: str) -> bool:
    """Returns whether a folder of the settings is a group of a program with this configuration."""
    if group in OPTIONAL_GROUPS:
        return any(field.name == group for field in dataclasses.fields(root))
    return group not in NOT_GROUPS


def sections_in(kind: Any) -> list[Any]:
    """Returns the dataclasses that a field's type allows: one, several for a union of them, none for a plain value."""
    if dataclasses.is_dataclass(kind):
        return [kind]
    if get_origin(kind) not in (Union, types.UnionType):
        return []
    members = list(get_args(kind))
    return members if all(dataclasses.is_dataclass(member) for member in members) else []


def first_of(kind: Any) -> Any:
    """Returns the first type of a union, such as the number of `int | Auto`; any other type as it is."""
    return get_args(kind)[0] if get_origin(kind) in (Union, types.UnionType) else kind


def by_kind(kind: Any) -> dict[str, Any]:
    """Returns the dataclasses of a union by the value of `kind` that picks them; empty unless there are several."""
    members = sections_in(kind)
    return {kind_of(member): member for member in members} if len(members) > 1 else {}


def kind_of(section: Any) -> str:
    """Returns the value of `kind` that picks a dataclass; empty if it has no such field."""
    return next((str(field.default) for field in dataclasses.fields(section) if field.name == "kind"), "")


def kind_groups(root: Any) -> dict[str, dict[str, Any]]:
    """Returns the dataclasses by kind of each section of a configuration that has several kinds."""
    found = {field.name: by_kind(field.type) for field in dataclasses.fields(root)}
    return {name: members for name, members in found.items() if members}


def section_of(kind: Any, values: Any) -> Any:
    """Returns the dataclass of a section: the one that its values' `kind` picks, else the first."""
    given = values.get("kind") if isinstance(values, Mapping) else None
    return (by_kind(kind).get(given) if isinstance(given, str) else None) or sections_in(kind)[0]
