"""`--explain KEY` for the configuration of a run: the key's meaning, type, range, default and value in the command's configuration.

The text comes from config/schema.py (see settings/explain.py). So does the range: each section's `problems` is asked what it says of values at both
ends. Torch is not imported.
"""

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

from ssa_pretrain.config import Config
from ssa_pretrain.config_io import config_to_dict, known_keys, unknown_key
from ssa_pretrain.problems import ConfigError, Problem, join
from ssa_pretrain.settings.explain import Section, explained, settings_of
from ssa_pretrain.suggestions import closest

PROBES = (-1, 0, 1, 10**15 + 1)


def explain(asked: str, config: Config, groups: Mapping[str, Sequence[str]]) -> str:
    """Returns the text for a key, a section, a group or a pattern of keys.

    Args:
        asked: what the user wants to know; empty: everything.
        config: the command's configuration.
        groups: the options of each group.

    Raises:
        ConfigError: nothing is called so.
    """
    known = settings_of(Config, config_to_dict(config))
    text = explained(asked, known, ranges)
    options = groups.get(asked, ())
    if options and text:
        head, *table = text.splitlines()
        return "\n".join([head, f"  options of the group: {join(options)}", *table])
    if options:
        return f"{asked}: a group of whole settings; {asked}={join(options)}"
    if text:
        return text
    if any(sign in asked for sign in "*?["):
        raise ConfigError([Problem(asked, None, "matches no key", "try 'optim.*', or --explain alone for all keys")])
    names = [*groups, *(entry.key for entry in known if isinstance(entry, Section) and entry.key)]
    near = closest(asked, [*known_keys(), *names], 1)
    if near and near[0] in names:
        raise ConfigError([Problem(asked, None, "is not a known key", f"did you mean {near[0]}?")])
    raise ConfigError([unknown_key(asked, None)])


def ranges(key: str) -> list[str]:
    """Returns the rules that a number keeps by itself, as its section words them; rules that read other keys are left out."""
    if known_keys().get(key) not in (int, float):
        return []
    section, _, name = key.rpartition(".")
    rules: dict[str, None] = {}
    for probe in PROBES:
        config = Config()
        values: Any = attrgetter(section)(config) if section else config
        if hasattr(values, "enabled"):
            values.enabled = True  # a section that is off has no rules
        setattr(values, name, probe)
        rules |= {p.rule: None for p in config.problems() if p.key == key and not p.reads}
    return list(rules)
