"""The command line of both packages: a typed configuration, or one message that lists every problem.

A package passes a `Program`: its dataclass, its folder of YAML files, its help text. Its own rules come as a function. Hydra's command line keeps
its meaning: groups, overrides, `--cfg job [--resolve]`, `--info defaults`, `-cd`, `-cp`, `-cn`. `--help`, `--explain KEY`, `--version`, `--dry-run`
and completion are ours. Flags that only print something of Hydra's are passed to `hydra.main`. Everything else is composed by compose.py and
converted by convert.py, because Hydra stops at the first error and writes a folder per process.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from ssa_pretrain.errors import Answered
from ssa_pretrain.settings.completion import completion
from ssa_pretrain.settings.compose import Source, check_overrides, compose, group_options, has_groups, hydra_on
from ssa_pretrain.settings.convert import NOT_SET, SECRET_ADVICE, SECRET_RULE, config_from_dict, known_keys
from ssa_pretrain.settings.explain import explain
from ssa_pretrain.settings.output import captured, version_line
from ssa_pretrain.settings.problems import SECRET, ConfigError, Problem
from ssa_pretrain.settings.suggestions import closest

# A configuration, its problems so far and whether its folder has groups -> all its problems.
Check = Callable[[Any, list[Problem], bool], list[Problem]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What a package passes to the shared command line.

    Attributes:
        name: as in `python -m NAME`.
        root: the dataclass of the whole configuration, with `problems()`.
        conf: the folder of its YAML files.
        help: the first lines of `--help`; `{name}` stands for the name.
        footer: the last lines of `--help`.
        packages: those whose versions `--version` prints.
        dry_run: the setting that `--dry-run` stands for.
        experiments: the group whose option sets keys of all sections, if there is one.
    """

    name: str
    root: Any
    conf: Path
    help: str
    footer: str
    packages: Sequence[str]
    dry_run: str
    experiments: str = ""


@dataclass(frozen=True, slots=True)
class Command:
    """A parsed command line.

    Attributes:
        overrides: its key=value arguments.
        source: where the configuration comes from.
        flags: Hydra's flags that only print something, as hydra.main takes them.
        action: the flag that is answered instead of starting a run: help, version or shell_completion; empty: none.
        explained: the key, section or pattern that --explain asks for, empty for all; None without that flag.
    """

    overrides: list[str]
    source: Source
    flags: list[str] = field(default_factory=list)
    action: str = ""
    explained: str | None = None


def resolve(
    program: Program,
    argv: Sequence[str],
    check: Check,
    *,
    recipe: Callable[[list[str]], Mapping[str, Any]] = lambda _: {},
) -> Any:
    """Returns the checked configuration of a command.

    Args:
        program: the program.
        argv: the command's arguments.
        check: the program's rules.
        recipe: returns the settings by section that are applied before those of the command line, from its overrides.

    Raises:
        Answered: a flag asks for a text instead of a run.
        ConfigError: with all problems at once.
    """
    command, problems = parse(program, argv)
    if command.action == "version":
        raise Answered(version_line(program.name.partition(".")[0], program.packages) + "\n")
    if command.action == "shell_completion":
        line, conf = os.environ.get("COMP_LINE", ""), command.source.folder
        raise Answered(completion(command.overrides, line, program.name, program.root, conf))
    if not command.source.folder.is_dir():
        raise ConfigError(problems)
    source = replace(command.source, recipe=recipe(command.overrides))
    with hydra_on(source):
        overrides, found = check_overrides(command.overrides, source)
        problems += found
        if command.flags:
            if problems:
                raise ConfigError(problems)
            raise Answered(*_hydra_prints(program, source, [*overrides, *command.flags]))
        tree, found = compose(overrides, source)
        problems += found
        groups = group_options(source) if command.action or command.explained is not None else {}
        grouped = has_groups(source)
    if command.action == "help" and not problems:
        raise Answered(_help(program, groups, tree))
    if not tree:
        raise ConfigError(problems)
    config, found = config_from_dict(program.root, tree)
    wrong = {problem.key for problem in problems}
    problems += [problem for problem in found if problem.key not in wrong]
    if command.explained is not None and all(problem.rule == NOT_SET for problem in problems):
        raise Answered(explain(command.explained, config, groups) + "\n")
    # If the experiment, the run or a path to either is unknown, the rules are skipped: they would all fail.
    wrong = {problem.key for problem in problems}
    if program.experiments not in wrong and not any("/" in key and "=" not in key for key in wrong):
        problems = check(config, problems, grouped)
    if problems:
        raise ConfigError(problems)
    return config


def report(name: str, error: ConfigError) -> str:
    """Returns the one message of a rejected configuration."""
    count = f"{len(error.problems)} problem{'s' if len(error.problems) > 1 else ''}"
    what = "data" if error.exit_code == 4 else "configuration"
    head = f"{name}: {count} in the {what}; nothing was started."
    return f"{head}\n{error}\nAll keys and groups: python -m {name} --help"


def parse(program: Program, argv: Sequence[str]) -> tuple[Command, list[Problem]]:
    """Returns a command line's parts, and a problem for each argument that is neither a flag nor key=value."""
    try:
        parsed, unknown = _parser().parse_known_intermixed_args(list(argv))
    except argparse.ArgumentError as error:
        raise ConfigError([Problem("the command line", None, f"cannot be read: {error}", "see --help")]) from None
    problems = [_dashed(argument, program) for argument in unknown if argument.startswith("-")]
    # argparse gives up on positional arguments after a flag that it does not know.
    late = [argument for argument in unknown if not argument.startswith("-")]
    if parsed.multirun:
        advice = "try: for s in 1 2 3; do … seed=$s; done"
        problems.append(Problem("--multirun", None, "is refused: a command starts one run", advice))
    source, found = _source(program, parsed)
    actions = [name for name in ("version", "shell_completion", "help") if getattr(parsed, name)]
    flags = ["--hydra-help"] * parsed.hydra_help
    flags += [f"--{flag}={getattr(parsed, flag)}" for flag in ("cfg", "info") if getattr(parsed, flag)]
    if parsed.cfg:
        flags += ["--resolve"] * parsed.resolve + [f"--package={parsed.package}"] * bool(parsed.package)
    overrides = [*parsed.overrides, *late, *[program.dry_run] * (parsed.dry_run and not parsed.shell_completion)]
    explained = parsed.explain
    if explained and "=" in explained:  # a setting after the bare flag, or the key with its value
        overrides, explained = [*overrides, explained], explained.partition("=")[0]
    return Command(overrides, source, flags, next(iter(actions), ""), explained), problems + found


def _source(program: Program, parsed: argparse.Namespace) -> tuple[Source, list[Problem]]:
    """Returns the source of the configuration, and a problem for each folder that does not exist."""
    if not parsed.config_path and not program.conf.is_dir():
        rule = f"has no {program.conf}: the configuration lies in the repository"
        advice = "pip install -e . in a clone, or give --config-path"
        raise ConfigError([Problem("this installation", None, rule, advice)])
    folder = Path(parsed.config_path).resolve() if parsed.config_path else program.conf
    extra = str(Path(parsed.config_dir).resolve()) if parsed.config_dir else ""
    given = {"--config-path": str(folder), "--config-dir": extra}
    advice = f"the project's own is {program.conf}"
    problems = [
        Problem(flag, path, "is not a folder", advice)
        for flag, path in given.items()
        if path and not Path(path).is_dir()
    ]
    name = (parsed.config_name or "config").removesuffix(".yaml")
    extra = extra if Path(extra).is_dir() else ""
    return Source(program.root, folder, name, extra, program.experiments), problems


def _parser() -> argparse.ArgumentParser:
    """Returns a parser of Hydra's flags, under their names, and of ours."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    switches = (("--help", "-h"), ("--hydra-help",), ("--version",), ("--resolve",), ("--shell-completion", "-sc"))
    for names in (*switches, ("--run", "-r"), ("--multirun", "-m"), ("--dry-run",)):
        parser.add_argument(*names, action="store_true")
    parser.add_argument("--cfg", "-c", choices=["job", "hydra", "all"])
    info = ["all", "config", "defaults", "defaults-tree", "plugins", "searchpath"]
    parser.add_argument("--info", "-i", const="all", nargs="?", choices=info)
    for names in (("--package", "-p"), ("--config-path", "-cp"), ("--config-name", "-cn"), ("--config-dir", "-cd")):
        parser.add_argument(*names)
    parser.add_argument("--explain", nargs="?", const="")
    parser.add_argument("--local_rank", "--local-rank")  # some launchers append it; it is also in the environment
    parser.add_argument("overrides", nargs="*")
    return parser


def _dashed(argument: str, program: Program) -> Problem:
    """Returns the problem of an argument with dashes that is not a flag."""
    flag, _, value = argument.partition("=")
    if SECRET.search(flag):
        return Problem(flag, None, SECRET_RULE, SECRET_ADVICE)
    near = closest(flag.lstrip("-").replace("-", "_"), known_keys(program.root), 1)
    advice = f"try {near[0]}={value or '…'}" if near else "see --help"
    return Problem(argument, None, "is not a flag: settings are written key=value, without dashes", advice)


def _help(program: Program, groups: Mapping[str, Sequence[str]], tree: Mapping[str, Any]) -> str:
    """Returns the text of --help."""
    options = "\n".join(f"{group}: {', '.join(names)}" for group, names in groups.items())
    keys = yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True)
    head = program.help.format(name=program.name)
    return f"{head}\nGroups (group=option)\n{options}\n\nConfiguration (key=value)\n\n{keys}\n{program.footer}"


def _hydra_prints(program: Program, source: Source, words: Sequence[str]) -> tuple[str, int]:
    """Returns the output of hydra.main for --cfg, --info and --hydra-help, and its exit code."""
    GlobalHydra.instance().clear()
    before = sys.argv
    sys.argv = [program.name, *words]
    try:
        return captured(hydra.main(version_base="1.3", config_path=str(source.folder), config_name=source.name)(_task))
    finally:
        sys.argv = before


def _task(_: DictConfig) -> None:
    """Does nothing. hydra.main never runs its task, because every flag passed to it only prints something."""
