"""The command line: Hydra composes the settings, the dataclasses check them, mistakes become one message and an exit code.

Hydra's compose API is used and not its decorator: the decorator makes an output folder for each run, changes logging and ends
every mistake with code 1. Exit codes: 0 done, 3 a setting is wrong, 4 an input cannot be used, 130 interrupted.
"""

import argparse
import copy
import difflib
import errno
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast, get_args

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from data_prep import config as settings
from data_prep.errors import ConfigurationError, InputError
from data_prep.own_settings import NAME, kind_of, own_settings
from data_prep.pipeline import run_stages
from data_prep.run_config import LocalExecutor, RayExecutor, SlurmExecutor
from data_prep.sources.catalog import SOURCES
from data_prep.sources.mixed import MixedSource
from ssa_pretrain.settings.explain import explained, settings_of
from ssa_pretrain.settings.output import READER_GONE, discard_output, pipe_may_close, reader_gone, version_line
from ssa_pretrain.settings.typed import UnwritableNameError, as_typed, field_type

USAGE = """\
Text in, indexed binaries out.

  python -m data_prep source=quickstart tokenizer=bpe8k out=outputs/quickstart/data
  python -m data_prep source=jsonl 'source.paths=[texts/*.jsonl.gz]' tokenizer=llama3 out=outputs/mine
  python -m data_prep stage=validate out=outputs/mine

Settings are KEY=VALUE; --cfg job shows all of them with their values, --explain KEY says what one means, docs/data.md has the guide.
"""

CONF = Path(__file__).parent / "conf"

# What the file system refuses, and what the user can do about it; anything else it says is a fault of this program.
NO_ROOM = "there is no room left for {path}; make room or choose another out= or cache="
FORBIDDEN = "{path} may not be read or written by this user; change its permissions or choose another path"
REFUSALS = {
    errno.ENOSPC: NO_ROOM,
    errno.EDQUOT: NO_ROOM,
    errno.EACCES: FORBIDDEN,
    errno.EPERM: FORBIDDEN,
    errno.EROFS: "{path} lies on a disk that can only be read; choose another out= or cache=",
    errno.ENOTDIR: "{path} cannot be reached, since a part of it is a file and no folder; choose another path",
    errno.EEXIST: "{path} is a file where a folder is needed; move it away or choose another path",
    errno.EISDIR: "{path} is a folder where a file is needed; choose another path",
    errno.ENAMETOOLONG: "{path} is longer than the disk allows; choose a shorter path",
    errno.ELOOP: "{path} is a link that leads back to itself; remove it or choose another path",
}
PACKAGES = ("tokenizers", "tiktoken", "gigatoken", "pyarrow", "datatrove")  # whose versions --version prints

# Dictionaries whose keys are names of the user's.
OWN_NAMES = ("mix.weights", "executor.sbatch", "source.parts", "source.subsets")
TYPED = ("source.subsets.",)  # those with values of a dataclass, of which Hydra makes none behind a dotted name

SCHEMAS = {
    "source": {**{kind: source.settings for kind, source in SOURCES.items()}, "mixed": MixedSource},
    "tokenizer": {"bpe": settings.BpeTokenizer, "llama3": settings.Llama3Tokenizer, "file": settings.FileTokenizer},
    "executor": {"local": LocalExecutor, "slurm": SlurmExecutor, "ray": RayExecutor},
}
GROUPS = (*SCHEMAS, "mix", "packing")


class _Parser(argparse.ArgumentParser):
    """A parser whose refusals are a setting's."""

    def error(self, message: str) -> NoReturn:
        """Raises ConfigurationError."""
        raise ConfigurationError(
            f"{message}; settings are written KEY=VALUE, without dashes, and --help lists the flags"
        )


def main(arguments: list[str]) -> int:
    """Runs data_prep and returns its exit code."""
    parser = _Parser("python -m data_prep", description=_help(), formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cfg", choices=["job"], help="print the settings and stop")
    parser.add_argument("--explain", nargs="?", const="", metavar="KEY", help="print what a setting means and stop")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--version", action="version", version=version_line("data_prep", PACKAGES))
    try:
        with pipe_may_close():
            options = parser.parse_args(arguments)
        composed = compose_settings(options.overrides, own_settings(options.overrides, SCHEMAS, _say))
        if options.cfg:
            sys.stdout.write(OmegaConf.to_yaml(composed))
        elif options.explain is not None:
            sys.stdout.write(explain(options.explain, composed, options.overrides) + "\n")
        else:
            run_stages(checked(composed), _say, sys.stdout.write)
        sys.stdout.flush()
    except (ConfigurationError, InputError) as error:
        _say(f"error: {error}")
        return error.exit_code
    except OSError as error:
        if error.errno == errno.EPIPE and reader_gone():
            discard_output()
            return READER_GONE
        if error.errno not in REFUSALS:
            raise
        _say(f"error: {REFUSALS[error.errno].format(path=error.filename or 'a file')}, then run the same command again")
        return InputError.exit_code
    except KeyboardInterrupt:
        _say("interrupted; run the same command again to go on")
        return 130
    return 0


def compose_settings(overrides: list[str], recipe: Sequence[str] = ()) -> DictConfig:
    """Returns the settings as Hydra composes them; ConfigurationError for an unknown key, group or type.

    Args:
        overrides: the command line.
        recipe: overrides that come before it: the recipe of the dataset in `out`.
    """
    store = ConfigStore.instance()
    store.store(name="base_config", node=settings.Config)
    for group, schemas in SCHEMAS.items():
        for name, schema in schemas.items():
            store.store(group=group, name=f"base_{name}", node=schema)
    as_given = {line: override for override in overrides for line in _typed(override, overrides)}
    opened = list(as_given)
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose("config", [*recipe, *opened])
        unknown = next(_unknown(composed), None)  # let in by a + of the user's or of `_opened`
    except OverrideParseException as error:
        raise ConfigurationError(_unreadable(as_given.get(error.override, error.override))) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigurationError(_explain(error, [*recipe, *overrides])) from None
    if unknown is not None:
        raise ConfigurationError(_no_setting(unknown, [*recipe, *overrides]))
    return composed


def _typed(override: str, overrides: list[str]) -> list[str]:
    """Returns the overrides that one stands for, with text as it was typed."""
    opened = _opened(override)
    try:
        lines = as_typed(opened, lambda key: _type_of(key, overrides))
    except HydraException:  # the composition reports it
        return [opened]
    except UnwritableNameError as error:
        raise ConfigurationError(f"{override} {error}; choose another name") from None
    if split := [line for line in lines if line.lstrip("+").startswith(TYPED)]:
        name = split[0].partition("=")[0].split(".")[2]
        raise ConfigurationError(
            f"{override} has the name {name}, which the command line reads as a number; choose another name, such as part_{name}"
        )
    return lines


def _type_of(key: str, overrides: list[str]) -> Any:
    """Returns the type of a setting, that of a group's choice included; None where nothing is known of it."""
    group, _, name = key.partition(".")
    if group in (*SCHEMAS, "mix", "packing") and not name:
        return str
    if group not in SCHEMAS:
        return field_type(settings.Config, key)
    schema = SCHEMAS[group].get(_kinds(group).get(_chosen(group, overrides), ""))
    if schema is MixedSource and name.startswith("parts"):
        return str | None  # each part's kind has types of its own, which convert text
    return field_type(schema, name)


def _opened(override: str) -> str:
    """Returns an override that may add keys, where the keys are the user's own names."""
    bare = override.lstrip("+")
    if not bare.startswith(tuple(name + end for name in OWN_NAMES for end in ".=")):
        return override
    key, equals, value = bare.partition("=")
    if equals and key.startswith(TYPED):
        section, name, *inner = key.split(".")
        for part in reversed(inner):
            value = f"{{{part}:{value}}}"
        bare = f"{section}.{name}={value}"
    return f"++{bare}"


def _unknown(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yields the keys of a composed section that its dataclass lacks."""
    known = getattr(OmegaConf.get_type(node), "__dataclass_fields__", None)
    for key in map(str, node):
        if known is not None and key not in known:
            yield prefix + key
        elif OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        elif isinstance(inner := node[key], DictConfig):
            yield from _unknown(inner, f"{prefix}{key}.")


def checked(composed: DictConfig) -> settings.Config:
    """Returns the settings as dataclasses; ConfigurationError with every problem found."""
    try:
        missing = sorted(OmegaConf.missing_keys(composed))
    except OmegaConfBaseException as error:  # ${…} that leads nowhere
        raise ConfigurationError(_explain(error, [])) from None
    if missing:
        raise ConfigurationError("; ".join(f"{key}= is not set and has no default; give {key}=…" for key in missing))
    try:
        config = OmegaConf.to_object(composed)
    except (MissingMandatoryValue, OmegaConfBaseException) as error:
        raise ConfigurationError(_explain(error, [])) from None
    if not isinstance(config, settings.Config):
        raise TypeError(f"settings became {type(config).__name__}, not Config")
    if problems := config.problems():
        raise ConfigurationError("; ".join(problems))
    return config


def explain(asked: str, composed: DictConfig, overrides: list[str]) -> str:
    """Returns what a key, a section or a pattern of keys means and its value; ConfigurationError where nothing is called so."""
    values = OmegaConf.to_container(composed, enum_to_str=True)
    kinds = {group: OmegaConf.get_type(composed[group]) for group in SCHEMAS}
    text = explained(
        asked, settings_of(settings.Config, cast("dict[str, Any]", values), kinds), lambda key: _ranges(key, composed)
    )
    if text is None and any(sign in asked for sign in "*?["):
        raise ConfigurationError(f"{asked} matches no setting; try 'source.*', or --explain alone for all of them")
    if text is None:
        raise ConfigurationError(_no_setting(asked, overrides))
    head, *table = text.splitlines()
    return "\n".join([head, *[f"  choices: {', '.join(_choices(asked))}"] * (asked in GROUPS), *table])


def _ranges(key: str, composed: DictConfig) -> list[str]:
    """Returns the rules that a number keeps, as its section words them when it is asked about values at both ends."""
    given, rules = OmegaConf.select(composed, key), {}
    if isinstance(given, bool) or not isinstance(given, int | float):
        return []
    for probe in (-1, 0, 1, 10**15 + 1):
        tried = copy.deepcopy(composed)
        OmegaConf.update(tried, key, probe)
        if OmegaConf.is_missing(tried, "out"):
            OmegaConf.update(tried, "out", "data")
        try:
            section: Any = OmegaConf.to_object(tried[key.split(".")[0]] if "." in key else tried)
        except OmegaConfBaseException:  # another setting is missing, and rules may read it
            return []
        said = (re.match(rf"{re.escape(key)}=\S+ (must [^;]+);", problem) for problem in section.problems())
        rules |= {found[1]: None for found in said if found}
    return list(rules)


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _help() -> str:
    groups = "\n".join(f"  {group}={'|'.join(_choices(group))}" for group in (*SCHEMAS, "mix", "packing"))
    groups += f"\n  stage={'|'.join(stage.value for stage in settings.Stage)}"
    return f"{USAGE}\nGroups:\n{groups}"


def _choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _unreadable(override: str) -> str:
    """Returns what is wrong with an override that Hydra's grammar does not take, and how to write it."""
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override} is no setting; write KEY=VALUE, --help has examples"
    if not re.fullmatch(r"[+~]*[A-Za-z_][\w./@:-]*", key, re.ASCII):
        return f"{override} cannot be read; names of settings have letters of ASCII, digits, - and _, so change {key}"
    if key in (*SCHEMAS, "mix", "packing"):
        return f"{override} must be one of {', '.join(_choices(key))}"
    if value.startswith("["):
        items = [item.strip().strip("'\"") for item in value.strip("[]").split(",")]
        plain = all(items) and not re.search(r"['\"\[\]{}$`\\]", "".join(items))
        shown = ",".join(f'"{item}"' for item in items) if plain else '"a","b"'
        bracket = "" if value.endswith("]") else "close the bracket, and "
        return f"{override} cannot be read; {bracket}put each value in quotes inside quotes, '{key}=[{shown}]'"
    if value.startswith("{"):
        return f"{override} cannot be read; put each value in quotes inside quotes, '{key}={{name:\"value\"}}'"
    shown = "VALUE" if re.search(r"['\"$`\\]", value) or not value else value
    return f"{override} cannot be read; put the value in quotes inside quotes, \"{key}='{shown}'\""


def _no_setting(key: str, overrides: list[str]) -> str:
    """Returns where a key would be known, or else the nearest that is."""
    group, name = [*key.split("."), ""][:2]
    known = [*SCHEMAS, *_fields(settings.Config, "", key)]
    for each, schemas in SCHEMAS.items():
        kinds = _kinds(each)
        chosen = _chosen(each, overrides)
        if each == group:
            takers = [choice for choice, kind in kinds.items() if name in schemas[kind].__dataclass_fields__]
            if takers and chosen not in takers:
                # A kind's own name comes before those of its presets.
                takers.sort(key=lambda choice: (list(schemas).index(kinds[choice]), choice != kinds[choice], choice))
                listed = " or ".join(filter(None, (", ".join(takers[:-1]), takers[-1])))
                section = f"{group}.{name}"
                return f"{section} is a setting of {group}={listed}, not of {group}={chosen}; add {group}={takers[0]}"
        if chosen in kinds:
            known += _fields(schemas[kinds[chosen]], f"{each}.", key)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"{key} is no setting; {f'did you mean {near[0]}?' if near else 'see --cfg job for all keys'}"


def _kinds(group: str) -> dict[str, str]:
    """Returns the kind of each choice of a group, which is the dataclass that its file names."""
    kinds = {}
    for choice in _choices(group):
        found = re.search(r"- base_(\w+)", (CONF / group / f"{choice}.yaml").read_text())
        kinds[choice] = found[1] if found else choice
    return kinds


def _chosen(group: str, overrides: list[str]) -> str:
    """Returns the choice of a group: the last one on the command line, else that of conf/config.yaml."""
    given = [override.partition("=")[2] for override in overrides if override.lstrip("+").startswith(f"{group}=")]
    if given:
        return kind_of(group) if given[-1] == NAME else given[-1]
    found = re.search(rf"- {group}: (\w+)", (CONF / "config.yaml").read_text())
    return found[1] if found else ""


def _fields(schema: Any, prefix: str, key: str) -> Iterator[str]:
    """Yields the keys of a dataclass and of those inside it; `key` says under which name of the user's to look."""
    for name, field in schema.__dataclass_fields__.items():
        yield prefix + name
        inner = field.type
        below = f"{prefix}{name}."
        if key.startswith(below) and get_args(inner):
            inner = get_args(inner)[-1]
            below += key.removeprefix(below).split(".")[0] + "."
        if hasattr(inner, "__dataclass_fields__"):
            yield from _fields(inner, below, key)


def _explain(error: BaseException, overrides: list[str]) -> str:
    """Returns Hydra's complaint as one sentence with the nearest valid choice."""
    text = str(error)
    if found := re.search(r"Could not override '([^']*)'", text):
        return _no_setting(found[1], overrides)
    if found := re.search(r"Could not find '(\w+)/([^']*)'", text):
        group, value = found[1], found[2]
        near = difflib.get_close_matches(value, _choices(group), n=1)
        hint = f"; did you mean {group}={near[0]}?" if near else ""
        return f"{group}={value} must be one of {', '.join(_choices(group))}{hint}"
    if found := re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(.*)'", text):
        return _unreadable(found[1])
    if found := re.match(r"Could not delete from config. '(.*)' does not exist", text):
        return f"{found[1]} is not there, so ~{found[1]} has nothing to leave out; see --cfg job for what is"
    if found := re.match(r"Multiple values for (\w+)\..*'override \w+: (.*)'", text):
        return f"{found[1]} has a value already; write {found[1]}={found[2]} without the +"
    # The innermost cause is the complaint itself; what surrounds it repeats the command line.
    inner = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
    if "is not a ListConfig" in str(inner):
        return f"{key}= takes a list; write {key}=[…], with the brackets"
    if "does not support deletion" in str(inner):
        return f"{key} cannot be left out; give it another value"
    if re.match(r"Key '.*' not in '", str(inner)):
        return _no_setting(key, overrides)
    lines = [line for line in lines if not line.startswith(("full_key:", "object_type=", "reference_type="))]
    return f"{key}: {' '.join(lines)}; see docs/data.md for what it takes" if key else " ".join(lines)
