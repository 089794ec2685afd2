"""Entry point: `python -m ssa_pretrain.experiments switching sparsity data.path=data/debian_8k --minutes 10`.

Starts the jobs of the recipes that are not done yet, several at once on each device, and writes OUT/report_NAME.md, .json and .png for every recipe. The same
command continues, also after a kill. `--dry-run` prints jobs, memory and device time; `--report` writes the reports from the results so far, also while
another command runs. Exit codes: 0 everything is done, 1 a job failed, 3 the command or a setting is wrong, 7 time was up or it was stopped; the reports are
written in each case except 3.
"""

import csv
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from shlex import join

from ssa_pretrain.data.manifest import load_manifest
from ssa_pretrain.errors import ExitCode, UsageError
from ssa_pretrain.experiments.contents import Evidence, state_of
from ssa_pretrain.experiments.devices import Device, devices, planned
from ssa_pretrain.experiments.estimates import Estimates
from ssa_pretrain.experiments.jobs import EvaluationJob, TrainJob
from ssa_pretrain.experiments.options import Options, read_options
from ssa_pretrain.experiments.planning import Experiment, plan
from ssa_pretrain.experiments.report import lines, write_report
from ssa_pretrain.experiments.scheduler import Scheduler
from ssa_pretrain.planning.estimate import GIB
from ssa_pretrain.process import command
from ssa_pretrain.settings.files import LockedError, lock, unlock
from ssa_pretrain.settings.output import pipe_may_close
from ssa_pretrain.settings.problems import hide_secrets, secrets_of

USUAL_PER_GPU = 4
REPORT_SECONDS = 15.0  # of --minutes, for the reports


def main(words: Sequence[str] | None = None) -> None:
    """Reads the command line, runs the jobs, writes the reports."""
    with command("experiments"), pipe_may_close():
        given = sys.argv[1:] if words is None else list(words)
        sys.exit(run(read_options(given), given))


def run(options: Options, words: Sequence[str]) -> int:
    """Runs a command and returns its exit code.

    Args:
        options: the command line.
        words: the same as text, for the reports.
    """
    began = time.monotonic()
    experiment = plan(options)
    if options.hardware:
        found = planned(options.hardware, options.gpus)
    else:
        found = [Device("cpu")] if options.report else devices(options.gpus)
    shared = options.per_gpu or (USUAL_PER_GPU if found[0].is_gpu else 1)
    estimates = Estimates(experiment.runs, found[0], shared, _vocabulary(experiment.runs))
    if options.dry_run:
        print(dry_run(experiment, estimates, len(found)))
        return ExitCode.DONE
    scheduler = Scheduler(found, shared, estimates)
    if not options.report:
        options.out.mkdir(parents=True, exist_ok=True)
        try:
            held = lock(options.out / ".experiments.lock", patience=0.0)
        except LockedError as owner:
            raise UsageError(f"out={options.out} is in use by {owner}; stop that, or choose another folder") from None
        try:
            if options.minutes:
                scheduler.limit = options.minutes * 60.0 - (time.monotonic() - began) - REPORT_SECONDS
            scheduler.run(experiment.jobs)
        finally:
            if held is not None:
                unlock(held)
    report(options, experiment, words)
    if scheduler.failed:
        return ExitCode.FAILED
    return ExitCode.DONE if options.report or all(job.is_done for job in experiment.jobs) else ExitCode.STOPPED


def report(options: Options, experiment: Experiment, words: Sequence[str]) -> None:
    """Writes the reports of all recipes and prints their verdicts and tables."""
    shown = hide_secrets(join(["python", "-m", "ssa_pretrain.experiments", *words]), secrets_of(os.environ))
    for recipe in experiment.recipes:
        runs = experiment.runs_of(recipe)
        own = [job for job in experiment.evaluations if job.run in runs and recipe.evaluations]
        benches = [job for job in experiment.benches if job.bench in recipe.benches]
        path = write_report(Evidence(recipe, runs, own, benches), options.out, shown)
        print(path.read_text(encoding="utf-8") if len(experiment.recipes) == 1 else f"report: {path}", flush=True)
    if options.csv:
        write_csv(experiment.runs, Path(options.csv))


def dry_run(experiment: Experiment, estimates: Estimates, count: int) -> str:
    """Returns the jobs as a table: state, minutes of one process, minutes of a device, and memory.

    Args:
        experiment: the jobs.
        estimates: of time and memory.
        count: devices.
    """
    rows, total = [], 0.0
    for job in experiment.jobs:
        seconds = estimates.seconds(job)
        shared = 1 if job.is_exclusive else estimates.shared
        total += seconds / shared
        cells = [f"{seconds / 60:.1f}", f"{seconds / shared / 60:.2f}", f"{estimates.memory(job) / GIB:.1f}"]
        rows.append([job.name, state_of(job)["state"], *cells, _work(job)])
    table = lines(["job", "state", "minutes", "device minutes", "memory, GiB", "work"], rows)
    kind = estimates.device.name if estimates.device.is_gpu else "CPU"
    ending = f"{total / 60:.1f} device minutes: about {total / 60 / count:.1f} minutes on {count} x {kind}, {estimates.shared} jobs at once on each"
    return f"{table}\n\n{ending}"


def write_csv(runs: Sequence[TrainJob], path: Path) -> None:
    """Writes a line per held-out evaluation of every run."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("setting", "seed", "step", "mode", "cross_entropy", "captured_mass"))
        for run in runs:
            for (step, mode), record in sorted(run.result.held_out.items()):
                mass = record.get("captured_mass")
                row = (run.setting, run.seed, step, mode, f"{record['cross_entropy']:.6f}")
                writer.writerow((*row, "" if mass is None else f"{mass:.6f}"))


def _work(job: object) -> str:
    """Returns what a job does, in a few words."""
    if isinstance(job, TrainJob):
        return f"{job.steps} steps of {job.config.training.global_batch_tokens:,} tokens"
    return (
        f"{len(job.missing)} evaluations" if isinstance(job, EvaluationJob) else "benchmark, with the device to itself"
    )


def _vocabulary(runs: Sequence[TrainJob]) -> int | None:
    """Returns the vocabulary of the data; None if it is not prepared."""
    for run in runs:
        path = Path(run.config.data.path)
        if (path / "manifest.json").is_file():
            return load_manifest(path).tokenizer.vocab_size
    return None


if __name__ == "__main__":
    main()
