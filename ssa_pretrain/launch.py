"""Launchers: `launchers/torchrun.sh`, `deepspeed.sh` and `quickstart.sh` find the interpreter and start this, which decides the rest.

    python -m ssa_pretrain.launch torchrun [flags] [KEY=VALUE ...]
    python -m ssa_pretrain.launch deepspeed [flags] [KEY=VALUE ...]
    python -m ssa_pretrain.launch steps HEADING COMMAND … [--then HEADING COMMAND …] …

Flags and the environment are checked, then the settings, by `ssa_pretrain.plan --check` for the number of processes that the flags come to: a bad
one is reported once, before torch is imported. The command then runs under supervision.py, which passes signals on and has the last sentence.
Exit codes: those of docs/launch.md. Stdlib only.
"""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from ssa_pretrain.jobs import POSITIVE, TRAIN, Job, Refused, deepspeed_job, torchrun_job
from ssa_pretrain.signals import INTERRUPTED, STOPPED, survive_terminal
from ssa_pretrain.supervision import AGAIN, NOT_BEGUN, Supervisor

REPORTING = (TRAIN, "ssa_pretrain.evaluate")  # modules whose ranks report their endings
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")  # of another launcher, and not for these ranks
PATIENCE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
THEN = "--then"


def main(words: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs a launcher's command line and returns its exit code."""
    survive_terminal()
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if words else 3
    launcher, *words = words
    if launcher not in ("steps", "torchrun", "deepspeed"):
        return report("ssa_pretrain.launch", 3, f"{launcher} is not a launcher; try torchrun, deepspeed or steps")
    if launcher == "steps":
        return steps(words, environment)
    program, read = {"torchrun": ("torchrun.sh", torchrun_job), "deepspeed": ("deepspeed.sh", deepspeed_job)}[launcher]
    try:
        job, is_shown = read(words, environment)
        return show(program, job, environment) if is_shown else start(program, job, environment)
    except Refused as refused:
        return report(program, 3, str(refused))


def start(program: str, job: Job, environment: Mapping[str, str]) -> int:
    """Runs a job to its end and returns its exit code."""
    patience = environment.get(PATIENCE, "600")
    if not POSITIVE.fullmatch(patience):
        raise Refused(f"{PATIENCE}={patience} in the environment must be a whole number of seconds; try 600")
    ours = of_the_job(environment)
    with Supervisor(float(patience), reports=job.module in REPORTING and not job.waits) as supervisor:
        if job.world_size and job.module == TRAIN:
            check = [sys.executable, "-m", "ssa_pretrain.plan", "--check", *job.arguments]
            # With a place in a Slurm job only the first node's check would report what is wrong.
            alone = {name: value for name, value in ours.items() if name != "SLURM_PROCID"}
            code = supervisor.run(check, alone | {"WORLD_SIZE": str(job.world_size)})
            if supervisor.stop:
                return report(program, STOPPED, f"{supervisor.stop.name}: {NOT_BEGUN}")
            if code:
                return code
        code = supervisor.run(job.runs, ours, waits=job.waits)
        if job.waits and supervisor.stop and not supervisor.abandoned:
            how = "passed on to DeepSpeed's launcher, which gives the ranks 30 seconds to save"
            return report(program, STOPPED, f"{supervisor.stop.name}: {how}; {AGAIN}")
        return report(program, *supervisor.verdict(code))


def show(program: str, job: Job, environment: Mapping[str, str]) -> int:
    """Prints a job's command and the plan of its run; starts nothing."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader such as head may leave
    settings = {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", "1")}
    if program == "torchrun.sh":
        settings[PATIENCE] = environment.get(PATIENCE, "600")
    print(*(f"{name}={value}" for name, value in settings.items()), shlex.join(job.command), flush=True)
    world = [f"parallel.world_size={job.world_size}"] if job.world_size else []
    if not world and not any("parallel.world_size=" in argument for argument in job.arguments):
        report(program, 0, f"the plan is for 1 process, since {job.uncounted}")
    plan = [sys.executable, "-m", job.module, *job.arguments, *world, "dry_run=true"]
    done = subprocess.run(plan, env=of_the_job(environment), stdout=subprocess.PIPE, text=True, check=False)
    # The plan's own guess at a command is left out: the exact one stands above.
    print(*(line for line in done.stdout.splitlines() if not line.startswith("command  ")), sep="\n")
    return done.returncode


def steps(words: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs commands in turn, each after its heading, until one fails; returns its exit code."""
    rest = list(words)
    with Supervisor(float("inf")) as supervisor:
        while rest:
            end = rest.index(THEN) if THEN in rest else len(rest)
            heading, *command = rest[:end]
            rest = rest[end + 1 :]
            print(f"\n{heading}", file=sys.stderr, flush=True)
            code = supervisor.run(command, environment, waits=True)
            if supervisor.abandoned:
                return report("quickstart", INTERRUPTED, f"SIGINT again: left at once; {AGAIN}")
            if supervisor.stop:
                sentence = "" if code > 0 else f"{supervisor.stop.name}: stopped; run the same command again to go on"
                return report("quickstart", STOPPED, sentence)
            if code:
                return code
    return 0


def of_the_job(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of a job: one thread per process unless set, and no place in another launcher's job."""
    kept = {name: value for name, value in environment.items() if name not in OF_A_RANK}
    return {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"} | kept


def report(program: str, code: int, sentence: str) -> int:
    """Prints a launcher's sentence, if there is one, and returns the exit code."""
    if sentence:
        print(f"{program}: {sentence}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
