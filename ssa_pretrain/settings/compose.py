"""From overrides to one dictionary: Hydra's composition, with every problem collected.

Hydra stops at the first error, and its advice for an unknown key (add a `+`) lets typing errors through silently. So each override is first
checked on its own, against the dataclasses and the groups. Unknown keys and options, sweeps and deletions of settings become problems. The rest is
composed untyped and converted by convert.py, so that one place defines what a number is. A key that exists may be set with or without `+`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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

from ssa_pretrain.settings.convert import MISSING, SECRET_ADVICE, SECRET_RULE, config_to_dict, known_keys, unknown_key
from ssa_pretrain.settings.kinds import OPTIONAL_GROUPS, kind_groups, offers
from ssa_pretrain.settings.problems import SECRET, Problem, join, show
from ssa_pretrain.settings.suggestions import closest
from ssa_pretrain.settings.typed import PATH_PART, UnwritableNameError, as_typed, field_type, typed_files

BASE = "base_"  # before the kind: the option of a group that has only its dataclass's defaults


@dataclass(frozen=True, slots=True)
class Source:
    """Where a configuration comes from.

    Attributes:
        root: the dataclass of the whole configuration.
        folder: the primary folder of YAML files.
        name: the primary file, without its suffix.
        extra: a folder of the user's own, searched after the primary one; empty: none.
        experiments: the group whose option sets keys of all sections, if there is one; nothing need be chosen from it.
        recipe: settings by section that are applied before those of the command line.
        options: those of the groups that were looked up since `hydra_on` began; Hydra reads files for each.
    """

    root: Any
    folder: Path
    name: str = "config"
    extra: str = ""
    experiments: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    options: dict[str, list[str]] = field(default_factory=dict, init=False, compare=False, repr=False)

    def search_path(self) -> list[str]:
        """Returns the override that makes Hydra search the user's folder."""
        quoted = self.extra.replace("\\", "\\\\").replace("'", "\\'")
        return [f"hydra.searchpath=['file://{quoted}']"] if self.extra else []

    def recipe_overrides(self) -> list[str]:
        """Returns the overrides that apply the recipe."""
        kinds = [
            f"{group}={BASE}{self.recipe[group]['kind']}" for group in kind_groups(self.root) if group in self.recipe
        ]
        return [*kinds, "+recipe=settings"] if self.recipe else []


@contextmanager
def hydra_on(source: Source) -> Iterator[None]:
    """Initialises Hydra on a configuration folder. The dataclasses' defaults are stored as `base`, and each kind's as an option of its group."""
    store, groups = ConfigStore.instance(), kind_groups(source.root)
    defaults = {name: value for name, value in config_to_dict(source.root()).items() if name not in groups}
    store.store(name="base", node=defaults)
    for group, members in groups.items():
        for kind, section in members.items():
            store.store(group=group, name=f"{BASE}{kind}", node=config_to_dict(section()))
    if source.recipe:
        store.store(group="recipe", name="settings", node=dict(source.recipe), package="_global_")
    source.options.clear()
    with typed_files(source.root), hydra.initialize_config_dir(config_dir=str(source.folder), version_base="1.3"):
        yield


def check_overrides(lines: Sequence[str], source: Source) -> tuple[list[str], list[Problem]]:
    """Returns the overrides that Hydra may compose, and the problems of the others; needs `hydra_on`."""
    good, problems = source.search_path() + source.recipe_overrides(), []
    for line in lines:
        try:
            override = OverridesParser.create().parse_override(line)
        except HydraException:
            problems.append(_unreadable(line, source))
            continue
        accepted, found = _check_override(line, override, source)
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
        if problems := _absent_entries(overrides, source):
            return {}, problems
        reason = " ".join(str(error).split())
        return {}, [Problem("the configuration", None, f"does not compose: {reason}", "see --info defaults")]
    return _resolve(composed)


def _absent_entries(overrides: Sequence[str], source: Source) -> list[Problem]:
    """Returns the problems of deletions whose entry does not exist, which Hydra refuses to compose."""
    deletions = [line for line in overrides if line.startswith("~")]
    if not deletions:
        return []
    tree, _ = compose([line for line in overrides if line not in deletions], source)
    found = []
    for line in deletions:
        mapping, _, name = line[1:].partition("=")[0].rpartition(".")
        entries: Any = tree
        for part in mapping.split("."):
            entries = entries.get(part) if isinstance(entries, dict) else None
        if not isinstance(entries, dict) or name not in entries:
            advice = f"{mapping} has {join(entries, 'and')}" if isinstance(entries, dict) and entries else ""
            found.append(Problem(line, None, "removes an entry that does not exist", advice or f"{mapping} is empty"))
    return found


def group_options(source: Source) -> dict[str, list[str]]:
    """Returns the options of each group, those in the user's own folder included; needs `hydra_on`."""
    found = {group: _options(group, source) for group in _groups(source)}
    return {group: options for group, options in found.items() if options}


def _check_override(line: str, override: Override, source: Source) -> tuple[list[str], list[Problem]]:
    """Returns the overrides to compose in place of one, and its problems. A wrong one is replaced by the likeliest, so that other checks can run."""
    key, value = override.key_or_group, line.partition("=")[2]
    if problem := _refused(line, override, source):
        return [], [problem]
    if options := _options(key, source):
        if key == source.experiments and override.value() is None:  # nothing need be chosen
            return [], []
        given = _as_typed_value(line, source)
        chosen = given if isinstance(given, list) else [given]
        wrong = [choice for choice in chosen if choice not in options]
        good, found = _no_option(key, wrong[0], options) if wrong else ([f"{key}={value}"], [])
        sign = "+" * (key in OPTIONAL_GROUPS)  # no defaults list names them
        return [f"{sign}{choice}" for choice in good], found
    if _is_section(key, source) and not isinstance(override.value(), dict) and not has_groups(source):
        return [], [_no_group(key, override.value(), source)]
    if override.is_hydra_override() or override.type is OverrideType.DEL:
        return [line], []
    if _is_settable(key, source):
        return [f"++{key}={value}"], []
    groups = _groups(source)
    near = closest(key, [*known_keys(source.root), *groups], 1)
    if not near or near[0] not in groups:
        return [], [unknown_key(key, value, known_keys(source.root))]
    options = _options(near[0], source)
    advice = f"did you mean {near[0]}=…? It has {join(options)}"
    meant = [f"{near[0]}={value}"] if value in options else []
    return meant, [Problem(key, value, "is not a known key or group", advice)]


def _type_of(key: str, source: Source) -> Any:
    """Returns the type of the value of a key or a group; an option's name is text."""
    return str if _options(key, source) else field_type(source.root, key)


def _as_typed_value(line: str, source: Source) -> Any:
    """Returns the value of a group's override, with names as they were typed."""
    (typed,) = as_typed(line, lambda key: _type_of(key, source))
    return OverridesParser.create().parse_override(typed).value()


def _refused(line: str, override: Override, source: Source) -> Problem | None:
    """Returns the problem of an override that is refused for every key: a secret, a sweep, a deletion, Hydra's own settings."""
    key, value = override.key_or_group, line.partition("=")[2]
    if SECRET.search(key):
        return Problem(key, value, SECRET_RULE, SECRET_ADVICE)
    if override.is_hydra_override():
        if key == "hydra.searchpath":
            return None
        return Problem(key, value, "has no effect: Hydra writes nothing here", "remove it")
    if override.type is OverrideType.DEL and not _is_entry(key, source):
        advice = f"try {key}=… instead" if _is_settable(key, source) else "see --help for all keys"
        return Problem(line, None, "removes a key, and every key has a value", advice)
    if override.is_sweep_override():
        advice = f"give one value; {_quoted(key, value)}"
        return Problem(key, value, "is a sweep of several values", advice)
    return None


def _is_settable(key: str, source: Source) -> bool:
    """Returns whether a key is a field, a whole section, or an entry of a field that is a mapping."""
    known = known_keys(source.root)
    if key in known or any(name.startswith(f"{key}.") for name in known):
        return True
    parts = key.split(".")
    return any(_is_mapping(".".join(parts[:i]), known) for i in range(1, len(parts)))


def _is_entry(key: str, source: Source) -> bool:
    """Returns whether a key is an entry of a field that maps names of the user's own choice."""
    return _is_mapping(key.rpartition(".")[0], known_keys(source.root))


def _is_mapping(key: str, known: Mapping[str, Any]) -> bool:
    return get_origin(known.get(key)) is dict


def _is_section(key: str, source: Source) -> bool:
    """Returns whether a key is one of the configuration's sections."""
    return any(name.startswith(f"{key}.") for name in known_keys(source.root))


def has_groups(source: Source) -> bool:
    """Returns whether the folders offer options for any section, which a saved run's folder does not."""
    sections = {name.split(".")[0] for name in known_keys(source.root) if "." in name}
    folders = [source.folder, *[Path(source.extra)] * bool(source.extra)]
    return any(any((folder / section).glob("*.yaml")) for folder in folders for section in sections)


def _no_group(key: str, value: Any, source: Source) -> Problem:
    """Returns the problem of choosing a group's option in a whole configuration, which has no groups."""
    names = [name for name in known_keys(source.root) if name.startswith(f"{key}.")]
    chosen = [f"{name}={value}" for name in names if name in (f"{key}.method", f"{key}.name")]
    rule = f"is not a value, and {source.folder / source.name}.yaml is a whole configuration without groups"
    return Problem(key, value, rule, f"set single keys, such as {(chosen or [f'{names[0]}=…'])[0]}")


def _unreadable(line: str, source: Source) -> Problem:
    """Returns the problem of an argument that is not key=value, or whose key or value Hydra's grammar refuses."""
    key, equals, value = line.partition("=")
    key = key.lstrip("+~")
    if SECRET.search(key):
        return Problem(key, None, SECRET_RULE, SECRET_ADVICE)
    if not equals and ("/" in line or line.endswith((".yaml", ".yml"))):
        return Problem(line, None, *_path(Path(line), source))
    if not equals:
        near = closest(line, [*known_keys(source.root), *_groups(source)], 1)
        return Problem(line, None, "is not key=value", f"try {near[0]}=…" if near else "see --help")
    if not _is_settable(key, source) and not _options(key, source):
        return unknown_key(key, value, known_keys(source.root))
    if not all(PATH_PART.fullmatch(part) for part in key.split(".")):
        advice = "put the mapping into a YAML file of yours (-cd FOLDER)"
        return Problem(line, None, "has a name that the command line cannot take", advice)
    return Problem(line, None, "cannot be read", _quoted(key, value))


def _quoted(key: str, value: str) -> str:
    """Returns the advice how to quote a value, so that both the shell and Hydra's grammar take it as text."""
    if value.startswith("["):
        items = [item.strip().strip("'\"") for item in value.strip("[]").split(",")]
        plain = all(items) and not re.search(r"['\"\[\]{}$`\\]", "".join(items))
        shown = ",".join(f'"{item}"' for item in items) if plain else '"a","b"'
        bracket = "" if value.endswith("]") else "close the bracket, and "
        return f"{bracket}put each text in quotes inside quotes: '{key}=[{shown}]'"
    if value.startswith("{"):
        return f"put each text in quotes inside quotes: '{key}={{name:\"value\"}}'"
    shown = "VALUE" if re.search(r"['\"$`\\]", value) or not value else value
    return f"put a text in quotes inside quotes: \"{key}='{shown}'\""


def _path(named: Path, source: Source) -> tuple[str, str]:
    """Returns rule and advice for a path given in place of a setting."""
    if named.is_dir():
        is_run = (named / "config.yaml").is_file()
        advice = f"try -cp {named} output_dir={named} to continue that run" if is_run else "see --help"
        return "is a folder, not key=value", advice
    rule = "is a file, not key=value" if named.exists() else "is not key=value"
    if not source.experiments:
        return rule, "see --help for all keys"
    group, experiments = source.experiments, _options(source.experiments, source)
    near = closest(named.stem, experiments, 1)
    if named.is_file() and named.stem not in experiments and named.parent.name == group:
        return rule, f"try -cd {named.parent.parent} {group}={named.stem}"
    return rule, f"did you mean {group}={near[0]}?" if near else f"see --explain {group} for all experiments"


def _no_option(group: str, choice: Any, options: list[str]) -> tuple[list[str], list[Problem]]:
    """Returns the replacement and the problem of a group's unknown option, or of a value given to a section that is a group."""
    rule = f"is not an option of the group {group}"
    path = Path(choice if isinstance(choice, str) else "")
    if path.is_file() and path.stem not in options and path.parent.name == group:
        return [], [Problem(group, choice, rule, f"try -cd {path.parent.parent} {group}={path.stem}")]
    typed = path.stem if path.suffix in (".yaml", ".yml") else str(choice)
    if near := closest(typed, options, 1) if isinstance(choice, str) else []:
        # Only the option is wrong, not its section: the section's rules are checked with the likeliest option.
        advice = f"did you mean {group}={near[0]}? It has {join(options)}"
        return [f"{group}={near[0]}"], [Problem(f"{group}={show(choice)}", None, rule, advice)]
    return [], [Problem(group, choice, rule, f"try {join(options)}")]


def _groups(source: Source) -> list[str]:
    """Returns the groups of the configuration folder."""
    groups = GlobalHydra.instance().config_loader().list_groups("")
    return [name for name in groups if offers(source.root, name)]


def _options(group: str, source: Source) -> list[str]:
    """Returns the options of a group, including those in the user's own folder; empty if there is no such group."""
    if not group.replace("/", "_").isidentifier() or not offers(source.root, group):
        return []
    if group not in source.options:
        loader = GlobalHydra.instance().config_loader()
        options = loader.get_group_options(group, config_name=source.name, overrides=source.search_path())
        source.options[group] = [option for option in options if not option.startswith(BASE)]
    return source.options[group]


def _resolve(composed: DictConfig) -> tuple[dict[str, Any], list[Problem]]:
    """Returns the configuration with interpolations replaced by their values. One that leads nowhere is a problem and becomes a missing value."""
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
