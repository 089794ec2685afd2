"""The training loop: builds a run, resumes it, trains, evaluates and saves.

`step` counts the optimizer steps done and is the only clock. Rows, streams and learning rates are functions of (seed, step), so a
checkpoint holds only weights and optimizer states. A resumed run continues as if it had never stopped. The trainer does not know
which engine runs.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssa_pretrain import __version__
from ssa_pretrain.config import Config
from ssa_pretrain.config.rules import warning
from ssa_pretrain.data.batches import training_batches
from ssa_pretrain.engine import PendingStep
from ssa_pretrain.errors import Interrupted
from ssa_pretrain.evaluation import EMA_MODES, MODES
from ssa_pretrain.evaluation.heads import entropy_by_layer
from ssa_pretrain.evaluation.held_out import (
    evaluate_mode,
    evaluation_record,
    is_evaluation_missing,
    mean,
    missing_evaluations,
)
from ssa_pretrain.evaluation.tasks import build_tasks, evaluate_due_tasks
from ssa_pretrain.monitor.alerts import finished, hung, restarted
from ssa_pretrain.monitor.by_source import source_lines
from ssa_pretrain.monitor.console import Console, banner, end_line
from ssa_pretrain.monitor.environment import provenance, record_start, versions
from ssa_pretrain.monitor.metrics import MetricsLogger, Tracker
from ssa_pretrain.monitor.profiling import profiled
from ssa_pretrain.monitor.spikes import Spike
from ssa_pretrain.monitor.timeline import FINISHED, HUNG, ROLLED_BACK, STOPPED, Timeline, read_timeline
from ssa_pretrain.monitor.trackers import Opening, start_trackers
from ssa_pretrain.parallel.interruption import Interruption
from ssa_pretrain.parallel.state import joined
from ssa_pretrain.parallel.watchdog import Watchdog, watchdog
from ssa_pretrain.planning.epochs import stage_line
from ssa_pretrain.planning.flops import peak_flops
from ssa_pretrain.planning.plan import Plan
from ssa_pretrain.rates import learning_rate
from ssa_pretrain.resume import find_checkpoint, newest_checkpoint, restore, why_finished
from ssa_pretrain.rollback import load_incidents, roll_back
from ssa_pretrain.run import NODE_SETTINGS, Run, build_run, locked_folder, packing_of
from ssa_pretrain.run_folder import space_warning
from ssa_pretrain.saving import Saver
from ssa_pretrain.schedule import is_due
from ssa_pretrain.settings.convert import config_to_dict, save_config
from ssa_pretrain.settings.tree import flatten_settings
from ssa_pretrain.step_ranges import contains
from ssa_pretrain.step_records import flops_per_token, left_out_record, training_record

# Settings that do not affect the results of a step.
NEUTRAL_SETTINGS = (
    *NODE_SETTINGS,
    "name",
    "checkpoint.",
    "evaluation.",
    "profile.",
    "training.replica_check_interval",
    "training.stop_at_step",
    "parallel.timeout_minutes",
    "parallel.hang_minutes",
)


def train(config: Config, more_trackers: Sequence[Callable[[Path], Tracker]] = ()) -> None:
    """Trains to the configured last step, from the newest intact checkpoint if there is one. Does not change a finished run.

    Args:
        config: the run.
        more_trackers: functions that start a tracker beside the configured ones, given the run's folder; called on rank 0.

    Raises:
        DataError, CheckpointError, ConfigError: the run cannot start.
        DivergedError: too many steps in a row were not finite, or the weights are not.
        Interrupted: the run was asked to stop; its last step is saved.
    """
    with (
        joined(config.parallel, seed=config.seed) as placement,
        locked_folder(config, placement),
        watchdog(config, placement) as watch,
    ):
        run = build_run(config, placement)
        load_incidents(run)
        checkpoint = find_checkpoint(run)
        if checkpoint is not None and (reason := why_finished(run, checkpoint.step)):
            run.print(reason)
            return
        run.tasks = build_tasks(run)
        if placement.is_rank_0 and (shortage := space_warning(run.folder, run.plan.checkpoint_bytes)):
            run.print(shortage)
        first_step, begin = restore(run, checkpoint), time.monotonic()
        timeline = Timeline(run.folder, processes=placement.world_size, enabled=placement.is_rank_0)
        with Interruption(placement) as interruption:
            while (log := train_segment(run, first_step, interruption, watch, timeline, more_trackers)) is None:
                first_step = restore(run, newest_checkpoint(run))
        step, seconds = max(first_step, run.last_step), time.monotonic() - begin
        tokens = run.plan.tokens_before(step)
        if lines := source_lines(log.recent):
            log.console.print(lines)
        log.console.print(end_line(step, first_step, run.plan.steps, tokens, seconds))


def train_segment(
    run: Run,
    first_step: int,
    interruption: Interruption,
    watch: Watchdog,
    timeline: Timeline,
    more_trackers: Sequence[Callable[[Path], Tracker]],
) -> MetricsLogger | None:
    """Trains from `first_step` on, and records its times and how it ends. Returns the closed log; None if the run goes back to its newest checkpoint."""
    before = read_timeline(run.folder) if run.placement.is_rank_0 else []
    with (
        timeline.segment(first_step),
        open_log(run, first_step, more_trackers) as log,
        Saver(run, log, first_step, published=watch.saved) as saver,
    ):

        def on_hang(report: str) -> None:
            timeline.end(HUNG)
            log.alert(hung(report))

        watch.on_phase, watch.on_hang = timeline.enter, on_hang
        watch.print_line = log.console.print if run.placement.is_rank_0 else watch.print_line
        if alert := restarted(before, first_step, time.time()):
            log.alert(alert)
        begin = time.monotonic()
        if not loop(run, log, first_step, interruption, saver, watch):
            timeline.end(ROLLED_BACK)
            return None
        step = max(first_step, run.last_step)
        timeline.end(FINISHED if step >= run.plan.steps else STOPPED, step)
        log.alert(finished(step, run.plan.steps, run.plan.tokens_before(step), time.monotonic() - begin))
        return log


def loop(run: Run, log: MetricsLogger, step: int, interruption: Interruption, saver: Saver, watch: Watchdog) -> bool:
    """Trains from `step` to the last step; evaluates and saves when due. Returns False if the run goes back to its newest checkpoint instead.

    On a GPU the results of a step are read after the next step is queued, so the device never waits for the host to write a line. On a CPU
    a step is done when it returns. Its results are read at once, so that its time does not include the next step.
    """
    config = run.config
    max_queued = 1 if run.placement.device.type == "cuda" else 0
    queue: deque[QueuedStep] = deque()
    if evaluates_at_start(run, log, step):
        watch.enter("evaluating", step)
        evaluate(run, log, step)
    while step < run.last_step:
        if line := stage_line(config, step):
            log.console.print(line)
        watch.enter("profiling" if step + 1 in config.profile.at else "training", step)
        queue.append(train_step(run, step))
        step += 1
        stopping = interruption.stops_after(step)
        evaluating = is_due(step, config.evaluation.interval, run.plan.steps) and not stopping
        saver.after_step(step)
        saving = saver.is_due(step) or stopping
        own_seconds, found = log_results(run, log, queue, keep=0 if evaluating or saving else max_queued)
        for seconds in own_seconds:
            watch.add_own_seconds(seconds)
        if found is not None and config.training.rollback_on_spike:
            saver.wait(step)
            if roll_back(run, *found):
                return False
        if evaluating:
            watch.enter("evaluating", step)
            evaluate(run, log, step)
        if saving:
            watch.enter("saving", step)
            saver.save(step, wait=stopping or step == run.last_step)
        if stopping:
            raise Interrupted(
                f"{interruption.reason}: stopped after step {step}; its checkpoint is published, and the same command resumes from it"
            )
    return True


def evaluate(run: Run, log: MetricsLogger, step: int) -> None:
    """Evaluates the tasks that are due, then the held-out rows, in both modes, and logs what the run's metrics do not have yet.

    With `evaluation.ema` the held-out rows are evaluated with the running mean of the weights too.
    """
    for record in evaluate_due_tasks(run, run.tasks, log.evaluated, step):
        log.log_task(record)
    if run.config.evaluation.ema and (names := missing_evaluations(run, log.evaluated, step, EMA_MODES)):
        with run.engine.ema_weights():
            for name in names:
                log.log_evaluation(evaluation_record(run, evaluate_mode(run, EMA_MODES[name]), step, name))
    for mode in missing_evaluations(run, log.evaluated, step, MODES):
        log.log_evaluation(evaluation_record(run, evaluate_mode(run, mode), step, mode) | entropy_record(run, mode))


def entropy_record(run: Run, mode: str) -> dict[str, Any]:
    """Returns what `evaluation.entropy_rows` adds to the record of an evaluation; every rank calls it."""
    if not (rows := run.config.evaluation.entropy_rows):
        return {}
    by_layer = entropy_by_layer(run, mode, rows)
    return {"attention_entropy": mean(by_layer), "attention_entropy_by_layer": by_layer}


def evaluates_at_start(run: Run, log: MetricsLogger, step: int) -> bool:
    """Returns whether a run that starts after `step` evaluates before its first training step."""
    if step == 0:
        return run.config.evaluation.at_start
    return is_evaluation_missing(run, log.evaluated, step)


@dataclass(frozen=True, slots=True)
class QueuedStep:
    """A step that the device may not have finished.

    Attributes:
        number: its number, counted from 1.
        pending: its results; `result()` waits for the device. None: its data is left out.
        flops_per_token: model FLOPs per token; they depend on the step's documents.
        data_seconds: the time to read its rows.
    """

    number: int
    pending: PendingStep | None
    flops_per_token: float
    data_seconds: float

    def own_seconds(self, *, on_gpu: bool) -> float:
        """Returns this rank's own time (parallel/stragglers.py): on a GPU reading and computing overlap. Call it after `pending.result()`."""
        assert self.pending is not None  # its data was trained on
        computed = self.pending.own_seconds()
        return max(self.data_seconds, computed) if on_gpu else self.data_seconds + computed


def train_step(run: Run, step: int) -> QueuedStep:
    """Queues the next optimizer step after `step` steps, unless its data is left out."""
    assert run.rows is not None
    if contains(run.left_out, step + 1):
        return QueuedStep(step + 1, None, 0.0, 0.0)
    plan, dp_rank, begin = run.plan, run.placement.dp_rank, time.monotonic()
    first = plan.rows_before(step) // run.config.training.micro_batch_size
    batches = training_batches(
        run.rows, packing_of(run.config), first, count=plan.microbatches_at(step), dp=plan.dp, dp_rank=dp_rank
    )
    data_seconds, rate = time.monotonic() - begin, learning_rate(step, run.config.optim, plan)
    with profiling(run, step + 1):
        pending = run.engine.train_step(batches, step=step, learning_rate=rate)
    return QueuedStep(step + 1, pending, flops_per_token(run, batches, step), data_seconds)


def log_results(
    run: Run, log: MetricsLogger, queue: deque[QueuedStep], *, keep: int
) -> tuple[list[float], tuple[Spike, int] | None]:
    """Reads, judges and logs the results of the queued steps, oldest first, except the newest `keep`.

    Returns:
        This rank's own time of each trained step, and the first loss spike with its step, if there is one.

    Raises:
        DivergedError: too many steps in a row were skipped. Every rank has the same results, so all ranks stop at the same step.
        ReplicaError: data ranks hold different copies of the weights.
    """
    own_seconds, found = [], None
    while len(queue) > keep:
        queued = queue.popleft()
        if queued.pending is None:
            log.log_step(left_out_record(run, queued.number))
            continue
        result = queued.pending.result()
        verdict = run.health.judge(result, queued.number)
        record = training_record(run, result, queued.number) | verdict.record
        log.log_step(record, queued.flops_per_token, result.num_tokens)
        if verdict.line:
            log.console.print(verdict.line)
        run.health.require_progress(result, queued.number, run.folder)
        if result.differing_weights is not None:
            run.engine.replicas.require_equal(result.differing_weights, queued.number - 1)
        own_seconds.append(queued.own_seconds(on_gpu=run.placement.device.type == "cuda"))
        if found is None and verdict.spike is not None:
            found = verdict.spike, queued.number
    return own_seconds, found


def profiling(run: Run, step: int) -> AbstractContextManager[None]:
    """Returns a context that profiles a step if the configuration asks for it."""
    if step not in run.config.profile.at:
        return nullcontext()
    rank, memory = run.placement.rank, run.config.profile.memory
    return profiled(run.folder / "profile", step=step, rank=rank, memory=memory)


def open_log(run: Run, step: int, more_trackers: Sequence[Callable[[Path], Tracker]] = ()) -> MetricsLogger:
    """Prints the banner and returns the log of a run that starts after `step`. Only rank 0 writes."""
    console = Console(
        total_steps=run.plan.steps,
        first_step=step,
        enabled=run.placement.is_rank_0,
        timestamps=run.config.logging.timestamps,
    )
    trackers: list[Tracker] = []
    if run.placement.is_rank_0:
        run.folder.mkdir(parents=True, exist_ok=True)
        save_config(run.config, run.folder / "config.yaml")
        record_start(run.folder, step=step, device=run.device_name, processes=run.plan.world_size)
        console.print(banner(banner_facts(run)))
        trackers = [*start_own_trackers(run, console, step), *(start(run.folder) for start in more_trackers)]
    peak = peak_flops(run.device_name, run.config.precision.name)
    return MetricsLogger(
        run.folder,
        total_steps=run.plan.steps,
        tokens_per_step=run.plan.tokens_per_step,
        total_tokens=run.plan.total_tokens,
        resume_step=step,
        interval=run.config.logging.interval,
        flops_per_token=run.plan.flops_per_token,
        peak_flops=peak * run.placement.world_size if peak else None,
        console=console,
        trackers=trackers,
        enabled=run.placement.is_rank_0,
    )


def banner_facts(run: Run) -> dict[str, str]:
    """Returns the facts that the banner shows, by name: run, model, layout, data, length and a warning if there is one."""
    config, plan = run.config, run.plan
    context = f"cp {plan.cp}, " if plan.cp > 1 else ""
    layout = f"tp {plan.tp}, pp {plan.pp}, {context}dp {plan.dp}, {config.precision.name.value}"
    lines = {
        "run": f"{config.name} -> {run.folder}",
        "model": f"{config.model.name}, {plan.parameters:,} parameters, attention {config.attention.method.value}",
        "layout": f"{plan.world_size} x {run.device_name}: {layout}",
        "data": f"{config.data.path}, rows of {config.data.sequence_length} tokens, vocabulary {plan.vocab_size:,}",
        "length": length_of(plan),
    }
    if run.history:
        lines["branch"] = ", then ".join(f"{entry['from']} at step {entry['step']}" for entry in run.history)
    if text := warning(config):
        lines["warning"] = text
    return lines


def length_of(plan: Plan) -> str:
    """Returns the run's steps, their batches, and all its tokens."""
    sizes = " to ".join(dict.fromkeys(f"{tokens:,}" for _, tokens in plan.batches.phases))
    return f"{plan.steps:,} steps of {sizes} tokens = {plan.total_tokens:,} tokens"


def start_own_trackers(run: Run, console: Console, step: int) -> list[Tracker]:
    """Starts or resumes the run in W&B, TensorBoard and trackio, as configured; one that cannot start is left out."""
    settings = config_to_dict(run.config)
    repository = Path(__file__).resolve().parents[1]
    origin = provenance(repository, Path(run.config.data.path))
    opening = Opening(
        name=run.config.name,
        folder=run.folder,
        config=settings | {"version": __version__, "versions": versions()} | origin,
        step=step,
        decisive={key: value for key, value in flatten_settings(settings) if not key.startswith(NEUTRAL_SETTINGS)},
    )
    return [*start_trackers(run.config.logging, opening, console.print)]
