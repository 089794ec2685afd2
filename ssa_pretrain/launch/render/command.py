"""The command `python -m ssa_pretrain.launch render`: prints the file that starts a spec's run on one kind of cluster.

    python -m ssa_pretrain.launch render target=slurm spec=launchers/spec.yaml > run.sbatch
    python -m ssa_pretrain.launch render target=jobset spec=launchers/spec.yaml nodes=2 name=trial -- optim.lr=5e-4
    python -m ssa_pretrain.launch render target=slurm spec=launchers/spec.yaml --dry-run

Targets: torchrun, deepspeed, slurm, docker, jobset, pytorchjob, skypilot. KEY=VALUE changes a value of the spec; words after -- are further overrides of the
run. The spec and the run's settings, for the spec's number of GPUs, are checked first. --dry-run also prints the command of each node, the variables and
the run's plan. Nothing is started or written. Keys of a spec:

"""

import shlex
import sys
from collections.abc import Sequence

from ssa_pretrain.errors import ExitCode
from ssa_pretrain.launch.render.spec import LaunchSpec, check_run, read_spec
from ssa_pretrain.launch.render.targets import TARGETS, Target, target_problems
from ssa_pretrain.outlook import plan_text
from ssa_pretrain.settings.explain import explain
from ssa_pretrain.settings.output import pipe_may_close
from ssa_pretrain.settings.problems import ConfigError, Problem, independent, join
from ssa_pretrain.settings.suggestions import closest

PROGRAM = "python -m ssa_pretrain.launch render"


def main(words: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    with pipe_may_close():
        if "-h" in words or "--help" in words:
            print((__doc__ or "").lstrip() + explain("", LaunchSpec(), {}))
            return ExitCode.DONE
        try:
            sys.stdout.write(answer(words))
        except ConfigError as error:
            count = f"{len(error.problems)} problem{'s' * (len(error.problems) > 1)}"
            print(f"ssa_pretrain.launch render: {count}; nothing was rendered.\n{error}", file=sys.stderr)
            return error.exit_code
    return ExitCode.DONE


def answer(words: Sequence[str]) -> str:
    """Returns what the command prints.

    Raises:
        ConfigError: with all problems of the command, the spec and the run.
    """
    own, overrides = list(words), []
    if "--" in own:
        own, overrides = own[: own.index("--")], own[own.index("--") + 1 :]
    given = dict(word.split("=", 1) for word in own if "=" in word)
    name, path = given.get("target", ""), given.get("spec", "")
    problems = [
        Problem(word, None, "is not KEY=VALUE", "see --help") for word in own if "=" not in word and word != "--dry-run"
    ]
    if name not in TARGETS:
        near = closest(name, TARGETS, 1) if name else []
        problems.append(
            Problem("target", name or None, f"must be {join(TARGETS)}", f"did you mean {near[0]}?" if near else "")
        )
    if not path:
        problems.append(Problem("spec", None, "must name a file", "try spec=launchers/spec.yaml"))
    if problems:
        raise ConfigError(problems)
    target = TARGETS[name]
    changes = [word for word in own if "=" in word and not word.startswith(("target=", "spec="))]
    spec = read_spec(path, changes, overrides)
    problems = target_problems(spec, name)
    try:
        config = check_run(spec, target.engine)
    except ConfigError as error:
        problems += independent(error.problems, [problem.key for problem in problems])
        config = None
    if problems:
        raise ConfigError(problems)
    shown = [word for word in words if word != "--dry-run"]
    rendered = target.render(spec, f"{PROGRAM} {shlex.join(shown)}")
    if "--dry-run" not in own:
        return rendered
    plan = ""
    if config:
        table = plan_text("train", config, spec.settings, spec.world_size).splitlines(keepends=True)
        plan = "".join(line for line in table if not line.startswith("command  "))
    return f"{rendered}\n{details(spec, target)}{plan}"


def details(spec: LaunchSpec, target: Target) -> str:
    """Returns the command of each node and the variables of its processes."""
    names = spec.hosts or [f"node {index}" for index in range(spec.nodes)]
    if target.engine:
        names = names[:1]  # DeepSpeed's launcher reaches the others
    command = " ".join(target.command(spec).replace("\\\n", " ").split())
    lines = [f"{name}: {command}\n" for name in names]
    lines += [f"{name}={shlex.quote(value)}\n" for name, value in spec.variables.items()]
    lines += [f"{name}: passed on, not in the spec\n" for name in spec.secrets]
    return "".join(lines)
