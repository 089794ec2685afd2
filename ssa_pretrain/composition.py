"""From overrides to one dictionary: Hydra's composition, with every problem collected.

Hydra stops at the first error, and its advice for an unknown key (add a `+`) lets typing errors through in silence. So each
override is first looked at alone, against the dataclasses and the groups: unknown keys and options, sweeps and deletions
become problems, and the rest is composed. All values are composed untyped; config_io.py converts them, so that one place
says what a number is. A key that exists may be set with or without `+`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ssa_pretrain.config import Config
from ssa_pretrain.config_io import MISSING, SECRET_ADVICE, SECRET_RULE, config_to_dict, known_keys, unknown_key
from ssa_pretrain.problems import SECRET, Problem, join, show
from ssa_pretrain.settings.typed import PATH_PART, UnwritableNameError, as_typed, field_type, typed_files
from ssa_pretrain.suggestions import closest

NO_CHOICE = "experiment"  # the group of which nothing need be chosen


@dataclass(frozen=True, slots=True)
class Source:
    """Where a configuration lies.

    Attributes:
        folder: the primary folder of YAML files.
        name: the primary file, without its suffix.
        extra: a folder of the user's own, searched after the primary one; empty: none.
    """

    folder: Path
    name: str = "config"
    extra: str = ""

    def searchpath(self) -> list[str]:
        """Returns the override that makes Hydra search the user's folder."""
        quoted = self.extra.replace("\\", "\\\\").replace("'", "\\'")
        return [f"hydra.searchpath=['file://{quoted}']"] if self.extra else []


@contextmanager
def hydra_on(source: Source) -> Iterator[None]:
    """Hydra initialised on a configuration folder, with the dataclasses' defaults stored as `base`."""
    ConfigStore.instance().store(name="base", node=config_to_dict(Config()))
    with typed_files(Config), hydra.initialize_config_dir(config_dir=str(source.folder), version_base="1.3"):
        yield


def sort_overrides(lines: Sequence[str], source: Source) -> tuple[list[str], list[Problem]]:
    """Returns the overrides that Hydra may compose, and the problems of the others; needs `hydra_on`."""
    good, problems = source.searchpath(), []
    for line in lines:
        try:
            override = OverridesParser.create().parse_override(line)
        except HydraException as error:
            problems.append(_unreadable(line, error, source))
            continue
        accepted, found = _look_at(line, override, source)
        problems += found
        for accepted_line in accepted:
            try:
                good += as_typed(accepted_line, lambda key: _type_of(key, source))
            except UnwritableNameError as error:
                advice = "put the mapping into a YAML file of yours (-cd FOLDER)"
                problems.append(Problem(line.lstrip("+"), None, str(error), advice))
    return good, problems


def compose(overrides: Sequence[str], source: Source) -> tuple[dict[str, Any], list[Problem]]:
    """Returns the composed configuration as plain values, interpolations resolved; needs `hydra_on`."""
    try:
        composed = hydra.compose(config_name=source.name, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        reason = " ".join(str(error).split())
        return {}, [Problem("the configuration", None, f"does not compose: {reason}", "see --info defaults")]
    return _resolve(composed)


def group_options(source: Source) -> dict[str, list[str]]:
    """Returns the options of each group, those in the user's own folder included; needs `hydra_on`."""
    return {group: _options(group, source) for group in _groups()}


def _look_at(line: str, override: Override, source: Source) -> tuple[list[str], list[Problem]]:
    """One override as Hydra shall see it (or what was meant, for the sake of the other checks), and its problems."""
    key, value = override.key_or_group, line.partition("=")[2]
    if problem := _refused(line, override):
        return [], [problem]
    if options := _options(key, source):
        if key == NO_CHOICE and override.value() is None:
            return [], []
        given = _as_typed_value(line, source)
        chosen = given if isinstance(given, list) else [given]
        wrong = [choice for choice in chosen if choice not in options]
        return _no_option(key, wrong[0], options) if wrong else ([f"{key}={value}"], [])
    if _is_section(key) and not isinstance(override.value(), dict) and not has_groups(source):
        return [], [_no_group(key, override.value(), source)]
    if _is_settable(key) or override.is_hydra_override():
        return [line if override.is_hydra_override() else f"++{key}={value}"], []
    groups = _groups()
    near = closest(key, [*known_keys(), *groups], 1)
    if not near or near[0] not in groups:
        return [], [unknown_key(key, value)]
    options = _options(near[0], source)
    advice = f"did you mean {near[0]}=…? It has {join(options)}"
    meant = [f"{near[0]}={value}"] if value in options else []
    return meant, [Problem(key, value, "is not a known key or group", advice)]


def _type_of(key: str, source: Source) -> Any:
    """The type of what a key or a group takes; an option's name is text."""
    return str if _options(key, source) else field_type(Config, key)


def _as_typed_value(line: str, source: Source) -> Any:
    """The value of a group's override, with names as they were typed."""
    (typed,) = as_typed(line, lambda key: _type_of(key, source))
    return OverridesParser.create().parse_override(typed).value()


def _refused(line: str, override: Override) -> Problem | None:
    """The problem of an override that no key could carry: a secret, a sweep, a deletion, Hydra's own settings."""
    key, value = override.key_or_group, line.partition("=")[2]
    if SECRET.search(key):
        return Problem(key, value, SECRET_RULE, SECRET_ADVICE)
    if override.is_hydra_override():
        if key == "hydra.searchpath":
            return None
        return Problem(key, value, "has no effect: a run writes to output_dir alone", "try output_dir=…")
    if override.type is OverrideType.DEL:
        return Problem(line, None, "removes a key, and every key has a value", f"try {key}=… instead")
    if override.is_sweep_override():
        advice = "give one value; a text with commas is quoted: 'key=\"a,b\"'"
        return Problem(key, value, "is a sweep, and a command trains one run", advice)
    return None


def _is_settable(key: str) -> bool:
    """Whether a key is a field, a whole section, or an entry of a field that is a mapping."""
    known = known_keys()
    if key in known or any(name.startswith(f"{key}.") for name in known):
        return True
    parts = key.split(".")
    parents = (".".join(parts[:i]) for i in range(1, len(parts)))
    return any(parent in known and get_origin(known[parent]) is dict for parent in parents)


def _is_section(key: str) -> bool:
    """Whether a key is one of the configuration's sections."""
    return any(name.startswith(f"{key}.") for name in known_keys())


def has_groups(source: Source) -> bool:
    """Returns whether the folder offers options for any section, which a saved run's does not; needs `hydra_on`."""
    return any(_options(section, source) for section in {name.split(".")[0] for name in known_keys() if "." in name})


def _no_group(key: str, value: Any, source: Source) -> Problem:
    """A group's option asked of a configuration that is whole already."""
    names = [name for name in known_keys() if name.startswith(f"{key}.")]
    chosen = [f"{name}={value}" for name in names if name in (f"{key}.method", f"{key}.name")]
    rule = f"is not a value, and {source.folder / source.name}.yaml is a whole configuration without groups"
    return Problem(key, value, rule, f"set single keys, such as {(chosen or [f'{names[0]}=…'])[0]}")


def _unreadable(line: str, error: HydraException, source: Source) -> Problem:
    """An argument that is not key=value, or whose key or value Hydra's grammar refuses."""
    key, equals, value = line.partition("=")
    key = key.lstrip("+~")
    if SECRET.search(key):
        return Problem(key, None, SECRET_RULE, SECRET_ADVICE)
    if not equals and ("/" in line or line.endswith((".yaml", ".yml"))):
        return Problem(line, None, *_path(Path(line), source))
    if not equals:
        near = closest(line, [*known_keys(), *_groups()], 1)
        return Problem(line, None, "is not key=value", f"try {near[0]}=…" if near else "see --help")
    if not _is_settable(key) and not _options(key, source):
        return unknown_key(key, value)
    if not all(PATH_PART.fullmatch(part) for part in key.split(".")):
        advice = "put the mapping into a YAML file of yours (-cd FOLDER)"
        return Problem(line, None, "has a name that the command line cannot take", advice)
    reason = str(error).splitlines()[0]
    return Problem(line, None, f"cannot be read ({reason})", "quote special characters: 'key=\"value\"'")


def _path(named: Path, source: Source) -> tuple[str, str]:
    """What a path is that stands where a setting is wanted, and what to do."""
    experiments = _options(NO_CHOICE, source)
    if named.is_dir():
        is_run = (named / "config.yaml").is_file()
        advice = f"try -cp {named} output_dir={named} to go on with that run" if is_run else "see --help"
        return "is a folder, not key=value", advice
    near = closest(named.stem, experiments, 1)
    if named.is_file() and named.stem not in experiments and named.parent.name == NO_CHOICE:
        return "is a file, not key=value", f"try -cd {named.parent.parent} {NO_CHOICE}={named.stem}"
    rule = "is a file, not key=value" if named.exists() else "is not key=value"
    return rule, f"did you mean {NO_CHOICE}={near[0]}?" if near else f"see --explain {NO_CHOICE} for all experiments"


def _no_option(group: str, choice: Any, options: list[str]) -> tuple[list[str], list[Problem]]:
    """A group's unknown option, or a value given to a section that is a group."""
    rule = f"is not an option of the group {group}"
    path = Path(choice if isinstance(choice, str) else "")
    if path.is_file() and path.stem not in options and path.parent.name == group:
        return [], [Problem(group, choice, rule, f"try -cd {path.parent.parent} {group}={path.stem}")]
    typed = path.stem if path.suffix in (".yaml", ".yml") else str(choice)
    if near := closest(typed, options, 1) if isinstance(choice, str) else []:
        # The whole words are at fault, not the section: its rules are checked on what was meant.
        advice = f"did you mean {group}={near[0]}? It has {join(options)}"
        return [f"{group}={near[0]}"], [Problem(f"{group}={show(choice)}", None, rule, advice)]
    return [], [Problem(group, choice, rule, f"try {join(options)}")]


def _groups() -> list[str]:
    """The groups of the configuration folder."""
    return [name for name in GlobalHydra.instance().config_loader().list_groups("") if name != "hydra"]


def _options(group: str, source: Source) -> list[str]:
    """The options of a group, those in the user's own folder included; empty when there is no such group."""
    if not group.replace("/", "_").isidentifier():
        return []
    loader = GlobalHydra.instance().config_loader()
    return loader.get_group_options(group, config_name=source.name, overrides=source.searchpath())


def _resolve(composed: DictConfig) -> tuple[dict[str, Any], list[Problem]]:
    """Interpolations replaced by their values; one that leads nowhere is a problem and becomes a missing value."""
    problems: list[Problem] = []

    def walk(node: Any, key: str) -> Any:
        if isinstance(node, dict):
            return {name: walk(child, f"{key}.{name}" if key else str(name)) for name, child in node.items()}
        if isinstance(node, list):
            return [walk(child, f"{key}[{i}]") for i, child in enumerate(node)]
        if not (isinstance(node, str) and "${" in node):
            return node
        if SECRET.search(node):
            problems.append(Problem(key, None, SECRET_RULE, SECRET_ADVICE))
            return MISSING
        try:
            return OmegaConf.select(composed, key)
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            problems.append(Problem(key, node, f"leads nowhere ({reason})", "give a plain value"))
            return MISSING

    tree = OmegaConf.to_container(composed, resolve=False)
    return walk(tree, ""), problems
