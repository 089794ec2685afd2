"""The command line of every entry point: a typed `Config`, or one message that lists every problem.

Hydra's command line keeps its meaning: groups, `experiment=`, overrides, `--help`, `--cfg job [--resolve]`,
`--info defaults`, `-cd`, `-cp`, `-cn`; `--explain KEY` is ours. What only shows something is handed to `hydra.main`; a run is composed by
composition.py, converted by config_io.py and checked by config/rules, because Hydra itself stops at the first error and writes
a folder per process. `dry_run=true` (or `--dry-run`) prints the plan and leaves. Exit code 3: the configuration is wrong;
4: only the data is.

Every rank of a run reads the same command, and rank 0 alone speaks; of a problem the first rank of every node does, since nodes may
differ. Neither torch nor megatron-core is imported.
"""

import argparse
import json
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from ssa_pretrain import saved_run
from ssa_pretrain.advice import in_keys_only, with_tried_advice
from ssa_pretrain.completion import answer
from ssa_pretrain.composition import Source, compose, group_options, has_groups, hydra_on, sort_overrides
from ssa_pretrain.config import Config, EngineName
from ssa_pretrain.config.deepspeed import ds_config
from ssa_pretrain.config.machine import Machine, launcher_number, this_machine
from ssa_pretrain.config.rules import check, warning
from ssa_pretrain.config_io import SECRET_ADVICE, SECRET_RULE, config_from_dict, known_keys
from ssa_pretrain.data.indexed_format import Manifest, load_manifest
from ssa_pretrain.explain import explain
from ssa_pretrain.monitor.environment import PACKAGES
from ssa_pretrain.outlook import outlook
from ssa_pretrain.planning.plan import make_plan
from ssa_pretrain.planning.table import describe
from ssa_pretrain.problems import SECRET, ConfigError, Problem
from ssa_pretrain.settings.output import captured, pipe_may_close, version_line
from ssa_pretrain.suggestions import closest

CONF = Path(__file__).resolve().parents[1] / "conf"


def read_config(entry: str, argv: Sequence[str] | None = None) -> Config:
    """Returns the checked configuration of a command; shows and leaves for `--help`, `--cfg`, `--explain`, `dry_run=true` and their like.

    Args:
        entry: the entry point's name, as in `python -m ssa_pretrain.<entry>`.
        argv: the command's arguments; None: the process's.

    Raises:
        SystemExit: 0 after showing something (141 where its reader left early); 3 or 4 after one message that lists every problem.
    """
    arguments, speaks = sys.argv[1:] if argv is None else argv, True
    given = arguments
    try:
        speaks = _speaks()
        machine = replace(this_machine(), entry=entry)
        if entry == "evaluate":
            machine = replace(machine, splits=("heldout",), has_wandb=None)
            given, note = saved_run.expand(arguments, machine.world_size or 1)
            sys.stderr.write(f"{note}\n" if note and speaks else "")
        # Of a run's ranks only rank 0 looks: it holds the folder itself when a later one comes to this point.
        machine = replace(machine, claims_folder=entry == "train" and speaks)
        with pipe_may_close():
            config = resolve_config(entry, given, machine, speaks=speaks)
        plan = _planned(entry, config, arguments) if _plans(entry, config) else ""
    except ConfigError as error:
        if speaks:
            sys.stderr.write(report(entry, error) + "\n")
        elif os.environ.get("LOCAL_RANK") == "0":
            sys.stderr.write(f"{socket.gethostname()}: {report(entry, error)}\n")
        raise SystemExit(error.exit_code) from None
    if plan:
        with pipe_may_close():
            sys.stdout.write(plan * speaks)
        raise SystemExit(0)
    return config


def resolve_config(entry: str, argv: Sequence[str], machine: Machine, *, speaks: bool = True) -> Config:
    """Returns the checked configuration of a command on a machine; raises ConfigError with all problems at once."""
    command, problems = _read_command(argv)
    if command.asks_version:
        sys.stdout.write(f"{version_line('ssa_pretrain', PACKAGES[1:])}\n" * speaks)
        raise SystemExit(0)
    if command.completes:
        sys.stdout.write(answer(command.overrides, os.environ.get("COMP_LINE", ""), command.source.folder) * speaks)
        raise SystemExit(0)
    if not command.source.folder.is_dir():
        raise ConfigError(problems)
    with hydra_on(command.source):
        overrides, found = sort_overrides(command.overrides, command.source)
        problems += found
        if command.flags and not problems:
            _show(entry, command, overrides, speaks=speaks)
        if command.flags:
            raise ConfigError(problems)
        tree, found = compose(overrides, command.source)
        groups = group_options(command.source) if command.explained is not None else {}
        only_keys = not has_groups(command.source)
    problems += found
    if tree:
        config, found = config_from_dict(tree)
        problems += [problem for problem in found if problem.key not in {earlier.key for earlier in problems}]
        if command.explained is not None and not problems:
            sys.stdout.write(f"{explain(command.explained, config, groups)}\n" * speaks)
            raise SystemExit(0)
        wrong = {problem.key for problem in problems}
        # Without the experiment or the run that was meant, by its name or by a path, every rule would complain.
        if "experiment" not in wrong and not any("/" in key and "=" not in key for key in wrong):
            known = machine.unknown() if _plans(entry, config) else machine
            problems += check(config, known, wrong)
            problems = with_tried_advice(problems, config, known) if problems else []
    if problems:
        raise ConfigError([replace(p, advice=in_keys_only(p.advice)) for p in problems] if only_keys else problems)
    return config


def _speaks() -> bool:
    """Returns whether this process prints: rank 0, and any that no launcher has started; raises ConfigError where RANK is not a number."""
    names = ("RANK", "LOCAL_RANK", *["SLURM_PROCID"] * ("WORLD_SIZE" in os.environ))
    rank = launcher_number(next((name for name in names if name in os.environ), "RANK"), default=0)
    return rank == 0 or "WORLD_SIZE" not in os.environ


def report(entry: str, error: ConfigError) -> str:
    """Returns the one message of a refused configuration."""
    count = f"{len(error.problems)} problem{'s' if len(error.problems) > 1 else ''}"
    what = "data" if error.exit_code == 4 else "configuration"
    head = f"ssa_pretrain.{entry}: {count} in the {what}; nothing was started."
    return f"{head}\n{error}\nAll keys and groups: python -m ssa_pretrain.{entry} --help"


def _plans(entry: str, config: Config) -> bool:
    """Whether a command plans a run, perhaps for another machine, rather than starting it."""
    return entry == "plan" or config.dry_run


def _planned(entry: str, config: Config, arguments: Sequence[str]) -> str:
    """The plan as a table; the data, where it is prepared already, gives the vocabulary and the epochs."""
    manifest = _prepared(Path(config.data.path))
    vocab_size = manifest.tokenizer.vocab_size if manifest else None
    plan = make_plan(config, config.parallel.world_size or this_machine().world_size or 1, vocab_size)
    overrides = [argument for argument in arguments if not argument.startswith("--")]
    table = describe(config, plan, overrides, manifest, entry="evaluate" if entry == "evaluate" else "train") + "\n"
    table += "".join(f"{name:<11}{text}\n" for name, text in outlook(entry, config, plan, manifest))
    if said := warning(config):
        table += f"{'warning':<11}{said}\n"
    if config.engine.name is EngineName.deepspeed:
        table += f"DeepSpeed's configuration:\n{json.dumps(ds_config(config, plan.dp), indent=2)}\n"
    return table


def _prepared(path: Path) -> Manifest | None:
    """The manifest of prepared data, None where there is none yet; raises ConfigError where it is damaged."""
    if not (path.is_file() or os.path.lexists(path / "manifest.json")):
        return None
    try:
        return load_manifest(path)
    except ValueError as error:
        raise ConfigError([Problem("data.path", str(path), f"is not usable: {error}", exit_code=4)]) from None


@dataclass(frozen=True, slots=True)
class _Command:
    """A parsed command line.

    Attributes:
        overrides: its key=value arguments.
        source: where the configuration lies.
        flags: Hydra's flags that only show something, as hydra.main wants them.
        completes: the shell asks for completions, and the overrides are its own.
        asks_version: it asks for the version.
        explained: the key, section or pattern that --explain asks for, empty for all; None without that flag.
    """

    overrides: list[str]
    source: Source
    flags: list[str]
    completes: bool
    asks_version: bool = False
    explained: str | None = None


def _parser() -> argparse.ArgumentParser:
    """Hydra's flags, by their names."""
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
    parser.add_argument("--local_rank", "--local-rank")  # some launchers append it; the environment says it too
    parser.add_argument("overrides", nargs="*")
    return parser


def _read_command(argv: Sequence[str]) -> tuple[_Command, list[Problem]]:
    """Parses a command line; what is neither a flag nor key=value is a problem."""
    try:
        parsed, unknown = _parser().parse_known_intermixed_args(list(argv))
    except argparse.ArgumentError as error:
        raise ConfigError([Problem("the command line", None, f"cannot be read: {error}", "see --help")]) from None
    problems = [_dashed(argument) for argument in unknown if argument.startswith("-")]
    # argparse gives up on positional arguments after a flag that it does not know.
    late = [argument for argument in unknown if not argument.startswith("-")]
    if parsed.multirun:
        advice = "try: for s in 1 2 3; do … seed=$s name=run_$s; done"
        problems.append(Problem("--multirun", None, "is refused: a command trains one run", advice))
    folder = Path(parsed.config_path).resolve() if parsed.config_path else CONF
    if not parsed.config_path and not CONF.is_dir():
        rule = f"has no {CONF}: the configuration lies in the repository"
        raise ConfigError(
            [Problem("this installation", None, rule, "pip install -e . in a clone, or give --config-path")]
        )
    extra = str(Path(parsed.config_dir).resolve()) if parsed.config_dir else ""
    for flag, path in (("--config-path", str(folder)), ("--config-dir", extra)):
        if path and not Path(path).is_dir():
            problems.append(Problem(flag, path, "is not a folder", f"the project's own is {CONF}"))
            extra = "" if path == extra else extra
    name = (parsed.config_name or "config").removesuffix(".yaml")
    shown = ("help", "hydra_help")
    flags = [f"--{flag.replace('_', '-')}" for flag in shown if getattr(parsed, flag)]
    flags += [f"--{flag}={getattr(parsed, flag)}" for flag in ("cfg", "info") if getattr(parsed, flag)]
    if parsed.cfg:
        flags += ["--resolve"] * parsed.resolve + [f"--package={parsed.package}"] * bool(parsed.package)
    overrides = [*parsed.overrides, *late, *["dry_run=true"] * parsed.dry_run]
    explained = parsed.explain
    if explained and "=" in explained:  # a setting after the bare flag, or the key with its value
        overrides, explained = [*overrides, explained], explained.partition("=")[0]
    source = Source(folder, name, extra)
    return _Command(overrides, source, flags, parsed.shell_completion, parsed.version, explained), problems


def _dashed(argument: str) -> Problem:
    """An argument with dashes that is none of Hydra's flags."""
    flag, _, value = argument.partition("=")
    if SECRET.search(flag):
        return Problem(flag, None, SECRET_RULE, SECRET_ADVICE)
    near = closest(flag.lstrip("-").replace("-", "_"), known_keys(), 1)
    advice = f"try {near[0]}={value or '…'}" if near else "see --help"
    return Problem(argument, None, "is not a flag: settings are written key=value, without dashes", advice)


def _show(entry: str, command: _Command, overrides: Sequence[str], *, speaks: bool) -> None:
    """Lets hydra.main answer --help, --cfg and their like, and leaves."""
    GlobalHydra.instance().clear()
    before, source = sys.argv, command.source
    sys.argv = [f"ssa_pretrain.{entry}", *overrides, *command.flags]
    try:
        shown = hydra.main(version_base="1.3", config_path=str(source.folder), config_name=source.name)(_nothing)
        text, code = captured(shown)
    finally:
        sys.argv = before
    if "--help" in command.flags:
        text = text.replace("-m ssa_pretrain.train", f"-m ssa_pretrain.{entry}")
    sys.stdout.write(text * speaks)
    raise SystemExit(code)


def _nothing(_: DictConfig) -> None:
    """The task that hydra.main never reaches: every flag given to it only shows something."""
