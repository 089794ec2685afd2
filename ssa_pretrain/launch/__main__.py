"""Launchers: `launchers/torchrun.sh`, `deepspeed.sh`, `quickstart.sh` and `stages.sh` only find the interpreter and start this module.

    python -m ssa_pretrain.launch torchrun [flags] [KEY=VALUE ...]
    python -m ssa_pretrain.launch deepspeed [flags] [KEY=VALUE ...]
    python -m ssa_pretrain.launch quickstart [flags] [KEY=VALUE ...]
    python -m ssa_pretrain.launch stages [flags] [KEY=VALUE ...] [STAGE:KEY=VALUE ...]
    python -m ssa_pretrain.launch render target=TARGET spec=FILE [KEY=VALUE ...]

It checks the flags and the environment, then the settings, with `ssa_pretrain.plan --check` for the number of processes that the flags give. So a bad
setting is reported once, before torch is imported. The command then runs under supervision.py, which passes signals on and reports how the run ended.
After a fault that a restart can cure (restarts.py) it runs again.
The flags of each are listed by `launchers/NAME.sh --help`. Exit codes: those of docs/launch.md. Stdlib only.
"""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from ssa_pretrain.errors import ExitCode, LaunchError
from ssa_pretrain.launch.jobs import POSITIVE, TRAIN, Job, deepspeed_job, torchrun_job
from ssa_pretrain.launch.quickstart import Quickstart, quickstart_environment, read_quickstart
from ssa_pretrain.launch.restarts import Restarts
from ssa_pretrain.launch.supervision import NOT_BEGUN, RERUN, Supervisor
from ssa_pretrain.process import command, exit_with_starter
from ssa_pretrain.settings.problems import hide_secrets, secrets_of
from ssa_pretrain.signals import survive_terminal

REPORTING = (TRAIN, "ssa_pretrain.evaluate")  # entry points whose ranks report their exits
DOCTOR = "ssa_pretrain.doctor"
RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
)  # set by another launcher, wrong for these ranks
PATIENCE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
JOBS = {"torchrun": torchrun_job, "deepspeed": deepspeed_job}
PROGRAMS = {
    "torchrun": "torchrun.sh",
    "deepspeed": "deepspeed.sh",
    "quickstart": "quickstart",
    "stages": "stages",
}  # before messages


def main(words: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs the command line of a launcher and returns its exit code."""
    survive_terminal()
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return ExitCode.DONE if words else ExitCode.CONFIGURATION
    launcher, *words = words
    if launcher in PROGRAMS and words[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return ExitCode.DONE
    if launcher == "render":  # starts nothing; it and `stages` need the configuration's libraries
        from ssa_pretrain.launch.render.command import main as render

        return render(words)
    if launcher == "stages":
        from ssa_pretrain.launch.stages.command import main as stages

        return stages(words, environment)
    program = PROGRAMS.get(launcher, "ssa_pretrain.launch")
    try:
        if launcher == "quickstart":
            return quickstart(read_quickstart(words), quickstart_environment(environment))
        if launcher not in JOBS:
            raise LaunchError(f"{launcher} is not a launcher; try torchrun, deepspeed, quickstart, stages or render")
        job, dry_run = JOBS[launcher](words, environment)
        return (show if dry_run else start)(program, job, environment)
    except LaunchError as error:
        return report(program, error.exit_code, str(error))


def start(program: str, job: Job, environment: Mapping[str, str]) -> int:
    """Runs a job to its end, with restarts after faults that a restart cures, and returns its exit code."""
    patience = environment.get(PATIENCE, "600")
    if not POSITIVE.fullmatch(patience):
        raise LaunchError(f"{PATIENCE}={patience} in the environment must be a whole number of seconds; try 600")
    exit_with_starter(environment)
    variables = job_environment(environment)
    reports = job.module in REPORTING and not job.is_remote
    restarts = Restarts(job.max_restarts, job.restart_wait)
    checked = False
    while True:
        with Supervisor(float(patience), reports=reports) as supervisor:
            if not checked and (refused := check(program, job, variables, supervisor)) is not None:
                return refused
            checked = True
            code, sentence = run_once(job, variables, supervisor)
            wait = None if supervisor.stop else restarts.wait_after(supervisor.outcome(code))
            if wait is None:
                if restarts.count and code and not supervisor.stop:
                    sentence += (
                        f" (after {restarts.count} restart{'s' * (restarts.count > 1)} without a new checkpoint)"
                    )
                return report(program, code, sentence)
            why = sentence.removesuffix(f"; {RERUN}") or f"ended with exit code {code}"
            again = f"restart {restarts.count} of {restarts.limit} in {wait:g} s, from the newest checkpoint"
            report(program, code, f"{why}; {again}")
            if supervisor.pause(wait) and supervisor.stop:
                return report(program, ExitCode.STOPPED, f"{supervisor.stop.name}: stopped before the restart; {RERUN}")


def check(program: str, job: Job, variables: Mapping[str, str], supervisor: Supervisor) -> int | None:
    """Checks the settings of a training job. Returns the exit code if they are refused or a signal arrives, None if the job can start."""
    if not (job.world_size and job.module == TRAIN):
        return None
    words = [sys.executable, "-m", "ssa_pretrain.plan", "--check", *job.arguments]
    # Without its place in a Slurm job, since with it only the check on the first node would report a problem.
    alone = {name: value for name, value in variables.items() if name != "SLURM_PROCID"}
    code = supervisor.run(words, alone | {"WORLD_SIZE": str(job.world_size)})
    if supervisor.stop:
        return report(program, ExitCode.STOPPED, f"{supervisor.stop.name}: {NOT_BEGUN}")
    return code or None


def run_once(job: Job, variables: Mapping[str, str], supervisor: Supervisor) -> tuple[int, str]:
    """Runs a job once; returns its exit code and the launcher's last sentence, which may be empty."""
    code = supervisor.run(job.executed, variables, waits=job.is_remote)
    if job.is_remote and supervisor.stop and not supervisor.abandoned:
        how = "passed on to DeepSpeed's launcher, which gives the ranks 30 seconds to save"
        return ExitCode.STOPPED, f"{supervisor.stop.name}: {how}; {RERUN}"
    return supervisor.verdict(code)


def show(program: str, job: Job, environment: Mapping[str, str]) -> int:
    """Prints the command of a job and the plan of its run; starts nothing."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader such as head may leave
    settings = {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", "1")}
    if program == PROGRAMS["torchrun"]:
        settings[PATIENCE] = environment.get(PATIENCE, "600")
    shown = hide_secrets(shlex.join(job.command), secrets_of(environment))
    print(*(f"{name}={value}" for name, value in settings.items()), shown, flush=True)
    if job.module == DOCTOR:
        return ExitCode.DONE  # it has no settings to plan
    world = [f"parallel.world_size={job.world_size}"] if job.world_size else []
    if not world and not any("parallel.world_size=" in argument for argument in job.arguments):
        report(program, ExitCode.DONE, f"the plan is for 1 process, since {job.uncounted}")
    plan = [sys.executable, "-m", job.module, *job.arguments, *world, "dry_run=true"]
    done = subprocess.run(plan, env=job_environment(environment), stdout=subprocess.PIPE, text=True, check=False)
    # Without the command that the plan itself guesses: the exact one is above.
    print(*(line for line in done.stdout.splitlines() if not line.startswith("command  ")), sep="\n")
    return done.returncode


def quickstart(asked: Quickstart, environment: Mapping[str, str]) -> int:
    """Checks the settings of a quickstart, then runs its commands in turn until one fails; returns its exit code."""
    missing = asked.missing()
    if missing and not asked.dry_run:
        raise LaunchError(missing)
    if missing:
        report(PROGRAMS["quickstart"], ExitCode.DONE, f"the settings are not checked: {missing}")
    elif code := subprocess.run(asked.check, env=environment, stdout=subprocess.DEVNULL, check=False).returncode:
        return code
    if not asked.dry_run:
        return run_in_turn(asked.started(), environment)
    for heading, words in asked.shown():
        print(f"\n{heading}", file=sys.stderr, flush=True)
        print(shlex.join(words), flush=True)
    return ExitCode.DONE


def run_in_turn(commands: Sequence[tuple[str, list[str]]], environment: Mapping[str, str]) -> int:
    """Runs the commands of a quickstart, each after its heading, until one fails; returns its exit code."""
    program = PROGRAMS["quickstart"]
    with Supervisor(float("inf")) as supervisor:
        for heading, words in commands:
            print(f"\n{heading}", file=sys.stderr, flush=True)
            code = supervisor.run(words, environment, waits=True)
            if supervisor.abandoned:
                return report(program, ExitCode.INTERRUPTED, f"SIGINT again: exited at once; {RERUN}")
            if supervisor.stop:
                sentence = (
                    "" if code > 0 else f"{supervisor.stop.name}: stopped; run the same command again to continue"
                )
                return report(program, ExitCode.STOPPED, sentence)
            if code:
                return code
    return ExitCode.DONE


def job_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of a job: one thread per process unless set, and no place in the job of another launcher."""
    kept = {name: value for name, value in environment.items() if name not in RANK_VARIABLES}
    return {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"} | kept


def report(program: str, code: int, sentence: str) -> int:
    """Prints the sentence of a launcher unless it is empty, and returns the exit code."""
    if sentence:
        print(f"{program}: {sentence}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    with command("ssa_pretrain.launch"):
        sys.exit(main(sys.argv[1:], os.environ))
