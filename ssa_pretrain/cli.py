"""The command line of ssa_pretrain's entry points, on top of the shared one (settings/command_line.py).

It passes the root dataclass, the conf folder and the rules to the shared one, reads the machine and the launcher's environment, and prints
the plan for `dry_run=true` and `--dry-run`. Exit code 3: the configuration is wrong; 4: only the data is.

Every rank of a run reads the same command, and rank 0 prints. Problems are also printed by local rank 0 of every other node, since nodes may differ.
Neither torch nor megatron-core is imported.
"""

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace

from ssa_pretrain import saved_run
from ssa_pretrain.config import CONF, Config
from ssa_pretrain.config.advice import in_keys_only, with_tried_advice
from ssa_pretrain.config.hardware import PlanConfig
from ssa_pretrain.config.machine import Machine, launcher_number, this_machine
from ssa_pretrain.config.rules import check
from ssa_pretrain.errors import Answered
from ssa_pretrain.monitor.environment import PACKAGES
from ssa_pretrain.outlook import plan_text
from ssa_pretrain.settings.command_line import Program, report, resolve
from ssa_pretrain.settings.output import pipe_may_close
from ssa_pretrain.settings.problems import ConfigError, Problem, hide_secrets, secrets_of

HELP = {  # by entry point; {name} is its module
    "train": """\
Pretraining with SSA (Sparse Sparse Attention)

Start from an experiment and override anything:
  python -m {name} experiment=quickstart optim.lr=2e-3
""",
    "evaluate": """\
Evaluation of a checkpoint with full and with sparse attention

Name a run's folder or a checkpoint, and override anything:
  python -m {name} outputs/quickstart evaluation.rows=8
""",
    "plan": """\
Steps, memory, time and price of a run before it starts

Plan an experiment, and override anything:
  python -m {name} experiment=ssa_1b_8k hardware=h100 nodes=8
""",
}
VIEWS = ("--search", "--scale", "--measured")  # what else `plan` prints, see plan.py
PLAN_FOOTER = """\
Rank the layouts of these GPUs:           --search
The same run on 8 to 2,048 GPUs:          --scale
The measured runs behind the estimates:   --measured
Guide: docs/planning.md
"""
FOOTER = """\
What a key or section means:              --explain optim.lr
Show the configuration without starting:  --cfg job
Show steps, layout and memory:            --dry-run
Where each group comes from:              --info defaults
Evaluate a run:                           python -m ssa_pretrain.evaluate RUN_FOLDER
Guide: docs/configuration.md
"""


def program(entry: str) -> Program:
    """Returns the description of an entry point for the shared command line."""
    return Program(
        name=f"ssa_pretrain.{entry}",
        root=PlanConfig if entry == "plan" else Config,
        conf=CONF,
        help=HELP.get(entry, HELP["train"]),
        footer=FOOTER + PLAN_FOOTER * (entry == "plan"),
        packages=PACKAGES[1:],
        dry_run="dry_run=true",
        experiments="experiment",
    )


def read_config(entry: str, argv: Sequence[str] | None = None) -> Config:
    """Returns the checked configuration of a command; prints and exits for `--help`, `--cfg`, `--explain`, `dry_run=true` and the like.

    Args:
        entry: the entry point's name, as in `python -m ssa_pretrain.<entry>`.
        argv: the command's arguments; None: the process's.

    Raises:
        SystemExit: 0 after printing an answer (141 if its reader exited early); 3 or 4 after one message that lists every problem.
    """
    arguments, prints = sys.argv[1:] if argv is None else argv, True
    views = [argument for argument in arguments if argument in VIEWS and entry == "plan"]
    arguments = [argument for argument in arguments if argument not in views]
    given = [*arguments, "--dry-run"] if entry == "plan" else arguments
    try:
        prints = _is_printing_process()
        machine = replace(this_machine(), entry=entry)
        if entry == "evaluate":
            trackers = {"has_wandb": None, "has_tensorboard": None, "has_trackio": None}
            machine = replace(machine, splits=("heldout",), has_deepspeed=None, **trackers)
            given, note = saved_run.expand(arguments, machine.world_size or 1)
            sys.stderr.write(f"{note}\n" if note and prints else "")
        # Only rank 0 checks that the folder is free. It may already have locked it when a slower rank gets here.
        machine = replace(machine, locks_folder=entry == "train" and prints)
        config = resolve_config(entry, given, machine)
        if config.dry_run:
            gpus = config.num_gpus() if isinstance(config, PlanConfig) else 0
            raise Answered(plan_text(entry, config, arguments, gpus or machine.world_size or 1, views))
    except Answered as answer:
        with pipe_may_close():
            sys.stdout.write(hide_secrets(answer.text, secrets_of(os.environ)) * prints)
        raise SystemExit(answer.exit_code) from None
    except ConfigError as error:
        message = hide_secrets(report(f"ssa_pretrain.{entry}", error), secrets_of(os.environ))
        if prints:
            sys.stderr.write(f"{message}\n")
        elif os.environ.get("LOCAL_RANK") == "0":
            sys.stderr.write(f"{socket.gethostname()}: {message}\n")
        raise SystemExit(error.exit_code) from None
    return config


def resolve_config(entry: str, argv: Sequence[str], machine: Machine) -> Config:
    """Returns the checked configuration of a command on a machine.

    Raises:
        Answered: a flag asks for a text instead of a run.
        ConfigError: with all problems at once.
    """

    def check_on_machine(config: Config, problems: list[Problem], has_groups: bool) -> list[Problem]:
        # A plan may be for another machine.
        known = machine.unknown() if config.dry_run else machine
        if isinstance(config, PlanConfig) and config.num_gpus():
            known = replace(known, world_size=config.num_gpus())
        problems = [*problems, *check(config, known, {problem.key for problem in problems})]
        if any(
            problem.key == "nodes" for problem in problems
        ):  # its own sentence says what the rule on processes would
            problems = [problem for problem in problems if problem.key != "world_size"]
        problems = with_tried_advice(problems, config, known) if problems else []
        return problems if has_groups else [replace(p, advice=in_keys_only(p.advice)) for p in problems]

    return resolve(program(entry), argv, check_on_machine)


def _is_printing_process() -> bool:
    """Returns whether this process prints: rank 0, or a process without a launcher; raises ConfigError if RANK is not a number."""
    names = ("RANK", "LOCAL_RANK", *["SLURM_PROCID"] * ("WORLD_SIZE" in os.environ))
    rank = launcher_number(next((name for name in names if name in os.environ), "RANK"), default=0)
    return rank == 0 or "WORLD_SIZE" not in os.environ
