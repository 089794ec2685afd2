"""The command line of every entry point: Hydra composes `conf/`, the user gets a typed `Config` or one list of all problems.

Hydra keeps its meaning: groups, `experiment=`, overrides, `--help`, `--cfg job [--resolve]`, `--info defaults`, `-cd`, `-cp`, `-cn`. What
only shows something goes to `hydra.main` itself. A run composes through the compose API instead, for three reasons: Hydra stops at the
first error and we list all; it writes a folder per process and we write one per run; its advice for an unknown key (add a `+`) accepts
typing errors in silence. So each override is first looked at alone, unknown keys and options are put aside, the rest is composed, and the
result is converted and checked (config_io.py, config.py, rules.py). Exit code 3: the configuration; 4: only the data.

Every rank of a run reads the same command; rank 0 alone speaks. Neither torch nor megatron-core is imported.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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
from ssa_pretrain.config_io import (
    MISSING,
    SECRET_ADVICE,
    SECRET_RULE,
    config_from_dict,
    config_to_dict,
    known_keys,
    unknown_key,
)
from ssa_pretrain.problems import SECRET, ConfigError, Problem, closest, join
from ssa_pretrain.rules import Machine, check

CONF = Path(__file__).resolve().parents[1] / "conf"
PLANNING = ("plan",)  # entry points that look at another machine than this one


def read_config(entry: str, argv: Sequence[str] | None = None) -> Config:
    """Returns the checked configuration of a command; shows and leaves for `--help`, `--cfg` and their like.

    Args:
        entry: the entry point's name, as in `python -m ssa_pretrain.<entry>`.
        argv: the command's arguments; None: the process's.

    Raises:
        SystemExit: 0 after showing something, 3 or 4 after one message that lists every problem.
    """
    speaks = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0
    try:
        return resolve_config(entry, sys.argv[1:] if argv is None else argv, this_machine(), speaks)
    except ConfigError as error:
        if speaks:
            print(_report(entry, error), file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def resolve_config(entry: str, argv: Sequence[str], machine: Machine, speaks: bool = True) -> Config:
    """Returns the checked configuration of a command on a machine; raises ConfigError with all problems at once."""
    command, problems = _read_command(argv)
    with _hydra(command.config_dir):
        overrides, found = _sort_overrides(command)
        problems += found
        if command.shows:
            if problems:
                raise ConfigError(problems)
            _show(entry, command, speaks)
        tree, found = _compose(command, overrides)
    problems += found
    config, found = config_from_dict(tree)
    problems += found
    if entry in PLANNING or config.dry_run:
        machine = machine.unknown(config.parallel.world_size)
    problems += check(config, machine, {key for problem in problems for key in (problem.key, problem.key.lstrip("+"))})
    if problems:
        raise ConfigError(problems)
    return config


def this_machine() -> Machine:
    """Returns what the rules may know of this process's machine: the launcher's world size, whether a GPU and TE are there."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1", "NoDevFiles")
    gpu = not hidden and any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))
    return Machine(
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        has_gpu=gpu,
        has_transformer_engine=find_spec("transformer_engine") is not None,
    )


class _Command(argparse.Namespace):
    """A parsed command line: Hydra's flags, overrides, and where the configuration lies."""

    overrides: list[str]
    cfg: str | None
    info: str | None
    resolve: bool
    package: str | None
    config_dir: Path  # the primary folder
    config_name: str
    searchpath: list[str]
    flags: list[str]  # as hydra.main wants them
    shows: bool


def _read_command(argv: Sequence[str]) -> tuple[_Command, list[Problem]]:
    """Parses flags by Hydra's names; what is neither a flag nor key=value is a problem."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    for names in (
        ("--help", "-h"),
        ("--hydra-help",),
        ("--version",),
        ("--resolve",),
        ("--run", "-r"),
        ("--multirun", "-m"),
    ):
        parser.add_argument(*names, action="store_true")
    parser.add_argument("--shell-completion", "-sc", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--cfg", "-c", choices=["job", "hydra", "all"])
    parser.add_argument("--package", "-p")
    info = ["all", "config", "defaults", "defaults-tree", "plugins", "searchpath"]
    parser.add_argument("--info", "-i", const="all", nargs="?", choices=info)
    parser.add_argument("--config-path", "-cp")
    parser.add_argument("--config-name", "-cn")
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--local_rank", "--local-rank")  # some launchers append it; the environment says it too
    parser.add_argument("overrides", nargs="*")
    try:
        parsed, unknown = parser.parse_known_intermixed_args(list(argv))
    except argparse.ArgumentError as error:
        raise ConfigError([Problem(f"the command line: {error}", None, "cannot be read", "see --help")]) from None
    problems = [_dashed(argument) for argument in unknown]
    if parsed.multirun:
        advice = "try: for s in 1 2 3; do python -m ssa_pretrain.train … seed=$s name=run_$s; done"
        problems.append(Problem("--multirun", None, "is not supported: a command trains one run", advice))
    if parsed.dry_run:
        parsed.overrides.append("dry_run=true")
    command = _Command(**{name: getattr(parsed, name) for name in ("overrides", "cfg", "info", "resolve", "package")})
    command.config_dir = Path(parsed.config_path).resolve() if parsed.config_path else CONF
    command.config_name = (parsed.config_name or "config").removesuffix(".yaml")
    command.searchpath = [f"file://{Path(parsed.config_dir).resolve()}"] if parsed.config_dir else []
    shown = ("help", "hydra_help", "version", "shell_completion")
    command.flags = [f"--{name.replace('_', '-')}" for name in (*shown, "resolve") if getattr(parsed, name)]
    command.flags += [
        f"--{name}={getattr(parsed, name)}" for name in ("cfg", "info", "package") if getattr(parsed, name)
    ]
    command.flags += [f"--config-dir={Path(parsed.config_dir).resolve()}"] if parsed.config_dir else []
    command.shows = bool(parsed.cfg or parsed.info) or any(getattr(parsed, name) for name in shown)
    for flag, folder in (("--config-path", command.config_dir), ("--config-dir", parsed.config_dir)):
        if folder and not Path(folder).is_dir():
            problems.append(Problem(flag, str(folder), "is not a folder", f"the project's is {CONF}"))
    if problems and not command.config_dir.is_dir():
        raise ConfigError(problems)
    return command, problems


def _dashed(argument: str) -> Problem:
    """An argument with dashes that is none of Hydra's flags."""
    key, _, value = argument.lstrip("-").partition("=")
    key = key.replace("-", "_")
    near = closest(key, known_keys(), 1)
    key = near[0] if near else key
    return Problem(
        argument, None, "is not a flag: settings are written key=value, without dashes", f"try {key}={value or '…'}"
    )


@contextmanager
def _hydra(config_dir: Path) -> Iterator[None]:
    """Hydra initialised on a configuration folder, the dataclasses' defaults stored as `base`."""
    ConfigStore.instance().store(name="base", node=config_to_dict(Config()))
    with hydra.initialize_config_dir(config_dir=str(config_dir), version_base="1.3"):
        yield


def _sort_overrides(command: _Command) -> tuple[list[str], list[Problem]]:
    """Returns the overrides that Hydra may compose, and the problems of the others."""
    good: list[str] = []
    problems: list[Problem] = []
    if command.searchpath:
        quoted = command.searchpath[0].replace("'", "\\'")
        good.append(f"hydra.searchpath=['{quoted}']")
    for line in command.overrides:
        try:
            override = OverridesParser.create().parse_override(line)
        except HydraException as error:
            problems.append(_unreadable(line, str(error)))
            continue
        accepted = _look_at(line, override, command)
        if isinstance(accepted, Problem):
            problems.append(accepted)
        else:
            good.append(accepted)
    return good, problems


def _look_at(line: str, override: Override, command: _Command) -> str | Problem:
    """One override as Hydra shall see it, or its problem."""
    key, value = override.key_or_group, line.partition("=")[2]
    if SECRET.search(key):
        return Problem(key, value, SECRET_RULE, SECRET_ADVICE)
    if override.is_hydra_override():
        if key == "hydra.searchpath":
            return line
        return Problem(line, None, "has no effect: a run writes to one folder and starts no other", "try output_dir=…")
    if override.type is OverrideType.DEL:
        return Problem(line, None, "removes a key, and every key has a value", f"try {key.lstrip('~')}=… instead")
    if override.is_sweep_override():
        return Problem(
            key,
            value,
            "is a sweep, and a command trains one run",
            f"try {key}={value.split(',')[0]}, or quote: '{key}=\"{value}\"'",
        )
    options = _options(key, command)
    if options:
        wanted = override.value() if isinstance(override.value(), list) else [override.value()]
        wrong = [choice for choice in wanted if choice is not None and choice not in options]
        return _no_option(key, wrong[0], options) if wrong else f"{key}={value}"
    known = known_keys()
    inside = any(key.startswith(f"{name}.") and known[name] not in (int, float, str, bool) for name in known)
    section = any(name.startswith(f"{key}.") for name in known)
    if key in known or inside or section:
        return f"++{key}={value}"
    group = closest(key, [*known, *_groups()], 1)
    if group and group[0] in _groups():
        return Problem(
            key,
            value,
            "is not a known key or group",
            f"did you mean {group[0]}=…? It has {join(_options(group[0], command))}",
        )
    return unknown_key(key, value)


def _unreadable(line: str, reason: str) -> Problem:
    """An argument that Hydra's grammar refuses."""
    key = line.partition("=")[0]
    if SECRET.search(key):
        return Problem(key, None, SECRET_RULE, SECRET_ADVICE)
    if "=" not in line:
        near = closest(line, [*known_keys(), *_groups()], 1)
        return Problem(line, None, "is not key=value", f"try {near[0]}=…" if near else "see --help")
    return Problem(
        line, None, f"cannot be read ({reason.splitlines()[0]})", "quote special characters: 'key=\"value\"'"
    )


def _no_option(group: str, choice: Any, options: list[str]) -> Problem:
    """A group's unknown option, or a value given to a section."""
    near = closest(str(choice), options, 1)
    advice = f"did you mean {group}={near[0]}? It has {join(options)}" if near else f"try {join(options)}"
    return Problem(group, choice, f"is not an option of the group {group}", advice)


def _groups() -> list[str]:
    """The groups of the configuration folder."""
    return [name for name in GlobalHydra.instance().config_loader().list_groups("") if name != "hydra"]


def _options(group: str, command: _Command) -> list[str]:
    """The options of a group, those of the user's own folder included; empty when there is no such group."""
    if not group.replace("/", "_").isidentifier():
        return []
    loader = GlobalHydra.instance().config_loader()
    searchpath = [f"hydra.searchpath=['{path}']" for path in command.searchpath]
    return loader.get_group_options(group, config_name=command.config_name, overrides=searchpath)


def _compose(command: _Command, overrides: list[str]) -> tuple[dict[str, Any], list[Problem]]:
    """The composed configuration as plain values; a file that Hydra cannot compose ends here."""
    try:
        composed = hydra.compose(config_name=command.config_name, overrides=overrides)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            [Problem("the configuration files", None, f"do not compose: {reason}", "see --info defaults")]
        ) from None
    return _resolve(composed)


def _resolve(composed: DictConfig) -> tuple[dict[str, Any], list[Problem]]:
    """Interpolations replaced by their values; those that lead nowhere are problems and become missing values."""
    problems: list[Problem] = []

    def walk(node: Any, prefix: str) -> Any:
        if isinstance(node, dict):
            return {name: walk(child, f"{prefix}.{name}" if prefix else str(name)) for name, child in node.items()}
        if not (isinstance(node, str) and "${" in node):
            return node
        if SECRET.search(node):
            problems.append(Problem(prefix, None, SECRET_RULE, SECRET_ADVICE))
            return node
        try:
            return OmegaConf.select(composed, prefix)
        except OmegaConfBaseException as error:
            problems.append(
                Problem(prefix, node, f"refers to nothing ({str(error).splitlines()[0]})", "give a plain value")
            )
            return MISSING

    return walk(OmegaConf.to_container(composed, resolve=False), ""), problems


def _show(entry: str, command: _Command, speaks: bool) -> None:
    """Lets hydra.main answer --help, --cfg and their like, and leaves."""
    if speaks:
        GlobalHydra.instance().clear()
        before = sys.argv
        sys.argv = [f"ssa_pretrain.{entry}", *command.overrides, *command.flags]
        try:
            hydra.main(version_base="1.3", config_path=str(command.config_dir), config_name=command.config_name)(
                _nothing
            )()
        finally:
            sys.argv = before
    raise SystemExit(0)


def _nothing(_: DictConfig) -> None:
    """The task that hydra.main never reaches: every flag given to it only shows something."""


def _report(entry: str, error: ConfigError) -> str:
    """The one message of a refused configuration."""
    count = len(error.problems)
    what = "data" if error.exit_code == 4 else "configuration"
    head = f"ssa_pretrain.{entry}: {count} problem{'s' if count > 1 else ''} in the {what}; nothing was started."
    return f"{head}\n{error}\nAll keys and groups: python -m ssa_pretrain.{entry} --help"
