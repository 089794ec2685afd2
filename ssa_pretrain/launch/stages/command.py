"""The command `python -m ssa_pretrain.launch stages`, behind launchers/stages.sh: runs the stages of a recipe in turn.

All settings of all stages are checked before anything starts. Then, for each stage: if it is done, and what it read and wrote is unchanged, it is
skipped. Else its inputs are read entirely and compared with their digests, its program runs to its end, and its outputs are looked at. The state is in
OUT/stages.json (state.py). After a kill at any point the same command continues there: a run from its newest checkpoint, the data check with the next
file. The evaluation and the export begin again; both write their results at once, at their end. Exit codes: that of the first stage that fails.

On several nodes the command runs on each of them, as launchers/torchrun.sh does. Every node checks that it reads the right data.
"""

import os
import shlex
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ssa_pretrain.config import Config
from ssa_pretrain.config.machine import this_machine
from ssa_pretrain.errors import CheckpointError, CommandError, ExitCode, LaunchError
from ssa_pretrain.huggingface.options import ExportOptions, read_settings
from ssa_pretrain.launch.jobs import torchrun_job
from ssa_pretrain.launch.stages.options import EVALUATION, EXPORT, LONG, SHORT, Options, read_stages
from ssa_pretrain.launch.stages.plan import Configs, Stage, resolve, stages
from ssa_pretrain.launch.stages.state import DONE, FAILED, RUNNING, STOPPED, Record, State, table
from ssa_pretrain.launch.supervision import RERUN, Supervisor
from ssa_pretrain.outlook import plan_text
from ssa_pretrain.run_folder import unwritable
from ssa_pretrain.settings.files import LockedError, lock, unlock
from ssa_pretrain.settings.output import pipe_may_close
from ssa_pretrain.settings.problems import ConfigError, Problem, hide_secrets, secrets_of

PROGRAM = "stages"
Execute = Callable[[list[str]], int]  # runs a command to its end and returns its exit code


def main(words: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs the command and returns its exit code."""
    try:
        options = read_stages(words)
        if options.status:
            with pipe_may_close():
                sys.stdout.write(table(State(options.out)))
            return ExitCode.DONE
        job, _ = torchrun_job(options.launcher_flags(SHORT), environment)  # checks its flags, and counts the processes
        if job.world_size is None:
            raise LaunchError(job.uncounted)
        configs = check(options, job.world_size)
        if options.dry_run:
            with pipe_may_close():
                sys.stdout.write(described(options, configs, job.world_size))
            return ExitCode.DONE
        with Supervisor(float("inf")) as supervisor:
            return run(options, configs, lambda command: supervised(supervisor, command, environment))
    except ConfigError as error:
        return say(
            error.exit_code,
            f"{len(error.problems)} problem{'s' * (len(error.problems) > 1)}; nothing was started.\n{error}",
        )
    except CommandError as error:
        return say(error.exit_code, str(error))


def check_words(words: Sequence[str], world_size: int) -> None:
    """Checks a command line for another machine. Raises ConfigError."""
    try:
        options = read_stages(words)
    except LaunchError as error:
        raise ConfigError([Problem(str(error), None, "")]) from None
    options.dry_run = True
    check(options, world_size)


def check(options: Options, world_size: int) -> Configs:
    """Returns the configurations of all stages.

    Raises:
        ConfigError: with the problems of every stage, whose keys have the stage's name before them.
    """
    machine = replace(this_machine(), world_size=world_size, slurm_tasks=1)
    problems: list[Problem] = []

    def resolved(stage: str, long: Config | None = None) -> Config | None:
        try:
            return resolve(options, stage, machine, long)
        except ConfigError as error:
            problems.extend(replace(problem, key=f"{stage}:{problem.key}") for problem in error.problems)
            return None

    short, long = resolved(SHORT), resolved(LONG)
    evaluated = resolved(EVALUATION, long) if long else None
    words = [f"out={options.out / EXPORT}", *options.settings[EXPORT]]
    _, found = read_settings(ExportOptions, words)
    problems += [replace(problem, key=f"{EXPORT}:{problem.key}") for problem in found if problem.key != "out"]
    if problems or not (short and long and evaluated):
        raise ConfigError(problems)
    return Configs(short, long, evaluated)


def run(options: Options, configs: Configs, execute: Execute) -> int:
    """Runs what is not done yet, and returns the exit code.

    Args:
        options: the command line.
        configs: of the stages.
        execute: runs the command of a stage.

    Raises:
        CommandError: another process runs the stages of this folder, it is that of another recipe, or it cannot be written.
    """
    if reason := unwritable(options.out):
        raise LaunchError(f"--out={options.out} {reason}; choose another folder")
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        held = lock(options.out / f".stages.{socket.gethostname()}.lock")
    except LockedError as owner:
        raise LaunchError(f"--out={options.out} is in use by {owner}; stop that, or choose another folder") from None
    try:
        state = State(options.out)
        if state.recipe not in ("", options.recipe):
            raise LaunchError(f"--out={options.out} has the stages of --recipe={state.recipe}; choose another folder")
        state.recipe = options.recipe
        todo = stages(options, configs)
        for number, stage in enumerate(todo, start=1):
            print(f"\n[{number}/{len(todo)}] {stage.heading}", file=sys.stderr, flush=True)
            if code := run_stage(stage, state, options, execute):
                return code
    finally:
        if held is not None:
            unlock(held)
    return say(ExitCode.DONE, f"all stages are done: {options.out / EXPORT} has the model, {options.out} the rest")


def run_stage(stage: Stage, state: State, options: Options, execute: Execute) -> int:
    """Runs one stage unless it is done; returns its exit code."""
    record = state[stage.name]
    try:
        inputs = stage.inputs()
        if is_done(stage, record, inputs):
            print(f"done since {record.since}", file=sys.stderr, flush=True)
            return ExitCode.DONE
        require_own(stage, record, inputs, options)
        print("reading its inputs", file=sys.stderr, flush=True)
        stage.verify()
        state.change(stage.name, RUNNING, words=stage.words, inputs=inputs, outputs={}, steps=stage.steps, code=None)
        # An export that was finished when this command was killed is not written again.
        if (code := 0 if was_exported(stage, options) else execute(command(stage, options))) == 0:
            state.change(stage.name, DONE, outputs=stage.outputs(), code=0)
        else:
            stopped = code in (ExitCode.STOPPED, ExitCode.INTERRUPTED)
            state.change(stage.name, STOPPED if stopped else FAILED, code=code)
        return code
    except CommandError as error:
        stopped = error.exit_code == ExitCode.STOPPED
        state.change(stage.name, STOPPED if stopped else FAILED, code=error.exit_code)
        return say(error.exit_code, f"{stage.name}: {error}")


def is_done(stage: Stage, record: Record, inputs: dict[str, str]) -> bool:
    """Returns whether a stage has run with these arguments and inputs, and its outputs are unchanged.

    Raises:
        CommandError: a run was done, and its last checkpoint is gone: it is not trained again without being asked.
    """
    if record.status != DONE or record.words != stage.words or record.inputs != inputs:
        return False
    try:
        return stage.outputs() == record.outputs
    except CommandError:
        if not stage.repeatable:
            raise
        return False


def require_own(stage: Stage, record: Record, inputs: dict[str, str], options: Options) -> None:
    """Checks that what a stage has left behind belongs to these arguments and inputs.

    Raises:
        CheckpointError: 32k has begun from other weights.
        LaunchError: there is an export of another model, or with other settings.
    """
    folder = options.out / stage.name
    same = record.inputs == inputs and record.words == stage.words
    if (
        stage.name == LONG
        and any(folder.glob("checkpoints/step_*"))
        and record.inputs.get("weights") != inputs["weights"]
    ):
        raise CheckpointError(
            f"{folder} has checkpoints of a run that began from other weights than the present ones of {options.out / SHORT}; "
            "move it away to start from these, or restore those"
        )
    if stage.name == EXPORT and folder.exists() and not same:
        raise LaunchError(
            f"{folder} exists, and is not known to be this export; move it away, and run the same command again"
        )


def was_exported(stage: Stage, options: Options) -> bool:
    """Returns whether this is the export and its folder, which appears atomically, is there; `require_own` has accepted it."""
    return stage.name == EXPORT and (options.out / EXPORT).exists()


def command(stage: Stage, options: Options) -> list[str]:
    """Returns the command of a stage: the launcher of its entry point, or a program of one process."""
    if not stage.module.startswith("ssa_pretrain.launch."):
        flags = [*options.launcher_flags(stage.name), f"--module={stage.module}"]
        return [sys.executable, "-m", "ssa_pretrain.launch", "torchrun", *flags, "--", *stage.words]
    return [sys.executable, "-m", stage.module, *stage.words]


def supervised(supervisor: Supervisor, words: list[str], environment: Mapping[str, str]) -> int:
    """Runs a command to its end, passes signals on to it, and returns the exit code."""
    code = supervisor.run(words, environment, waits=True)
    if supervisor.abandoned:
        return say(ExitCode.INTERRUPTED, f"SIGINT again: exited at once; {RERUN}")
    if supervisor.stop:
        if code < 0:
            say(code, f"{supervisor.stop.name}: stopped; run the same command again to continue")
        return ExitCode.STOPPED
    if code < 0:
        return say(
            ExitCode.FAILED, f"the stage's program was killed by signal {-code}; run the same command again to continue"
        )
    return code


def described(options: Options, configs: Configs, world_size: int) -> str:
    """Returns the command of every stage, and the plan of those that train."""
    text = ""
    plans = {SHORT: configs.short, LONG: configs.long}
    for number, stage in enumerate(stages(options, configs), start=1):
        shown = hide_secrets(shlex.join(command(stage, options)), secrets_of(os.environ))
        text += f"[{number}] {stage.heading}\n{shown}\n"
        if config := plans.get(stage.name):
            table = plan_text("train", config, stage.words, world_size).splitlines(keepends=True)
            text += "".join(line for line in table if not line.startswith("command  "))
        text += "\n"
    return text


def say(code: int, sentence: str) -> int:
    """Prints a sentence and returns the exit code."""
    print(f"{PROGRAM}: {sentence}", file=sys.stderr, flush=True)
    return code
