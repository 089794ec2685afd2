"""A training run: built in one place, then a loop of verbs.

`step` counts the optimizer steps done and is the only clock: rows, main streams and learning rates are functions of (seed, step), so a checkpoint
holds weights and optimizer alone, and rerunning the command goes on as if it had never stopped. The trainer does not know which engine runs.
"""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from tqdm import tqdm

from ssa_pretrain import __version__
from ssa_pretrain.checkpoint import Checkpoint, CheckpointError, newest, publish, require_same_model
from ssa_pretrain.checkpoint_facts import refused_changes, run_facts
from ssa_pretrain.checkpoint_integrity import Verdicts
from ssa_pretrain.config import Config
from ssa_pretrain.config.rules import warning
from ssa_pretrain.data.batches import Batch, collate
from ssa_pretrain.data.errors import DataError
from ssa_pretrain.data.indexed_format import Manifest, load_manifest
from ssa_pretrain.data.rows import ORDER, HeldOutRows, TrainingRows
from ssa_pretrain.engine import Engine, EvaluationResult, StepResult, build_engine
from ssa_pretrain.environment import add_start, versions
from ssa_pretrain.log import Console, banner, end_line, save_line, stamped
from ssa_pretrain.metrics import FILE_NAME, MetricsLogger, evaluations
from ssa_pretrain.parallel.agreement import on_first, ranks_without, unlike_first
from ssa_pretrain.parallel.interruption import Interrupted, Interruption
from ssa_pretrain.parallel.routing import needs_equal_microbatches
from ssa_pretrain.parallel.state import Placement, joined
from ssa_pretrain.planning.flops import peak_flops, row_flops
from ssa_pretrain.planning.plan import Plan, make_plan
from ssa_pretrain.profiling import profiled
from ssa_pretrain.run_folder import claim, leave_sign, release, sees, shortage
from ssa_pretrain.schedule import learning_rate
from ssa_pretrain.settings.convert import config_to_dict, save_config
from ssa_pretrain.settings.problems import ConfigError, Problem
from ssa_pretrain.tracking import Tracker, lacks, provenance, start_tracking
from ssa_pretrain.weights import find_weights

MODES = ("full", "sparse")
# Beginnings of keys: what may be spelled otherwise on each node, and what changes no step's figures.
OF_A_NODE = ("data.path", "output_dir", "logging.", "checkpoint.init_from", "dry_run")
NO_FIGURES = (
    *OF_A_NODE,
    "name",
    "checkpoint.",
    "evaluation.",
    "profile.",
    "training.stop_at_step",
    "parallel.timeout_minutes",
)
MOST_SHOWN = 8


class DivergedError(RuntimeError):
    """A step's loss or gradient norm is not a finite number."""


@dataclass(slots=True)
class Run:
    """Everything a run consists of, on one rank."""

    config: Config
    plan: Plan
    placement: Placement
    manifest: Manifest
    engine: Engine
    rows: TrainingRows | None  # None: the run only evaluates
    held_out: HeldOutRows
    folder: Path
    verdicts: Verdicts = field(default_factory=Verdicts)  # of its checkpoints; used on rank 0


def train(config: Config) -> None:
    """Train to the configured step, from the newest intact checkpoint if there is one; a run that has reached it is left as it is.

    Raises:
        DivergedError: a loss or gradient norm is not finite.
        Interrupted: the run was asked to stop; a checkpoint of the last step is published.
    """
    with joined(config.parallel, seed=config.seed) as placement, claimed(config, placement):
        run = build_run(config, placement)
        found = continued(run)
        if found is not None and (reason := finished(run, found.step)):
            say(run, reason)
            return
        if placement.is_first and (lacking := shortage(run.folder, run.plan.checkpoint_bytes)):
            say(run, lacking)
        first_step, begin = restore(run, found), time.monotonic()
        with Interruption(placement) as interruption, open_log(run, first_step) as log:
            loop(run, log, first_step, interruption)
        step, seconds = max(first_step, last_step(run)), time.monotonic() - begin
        tokens = step * run.plan.tokens_per_step
        log.console.say(end_line(step, first_step, run.plan.steps, tokens, seconds))


@contextmanager
def claimed(config: Config, placement: Placement) -> Iterator[None]:
    """Hold a run's folder against other runs.

    Raises:
        ConfigError: on every rank, where another run has the folder, it cannot be written, or not all ranks see the same one.
    """
    folder, timestamps = Path(config.output_dir), config.logging.timestamps

    def take() -> TextIO | None:
        return claim(folder, lambda text: print(stamped(text, timestamps), flush=True))

    lock = on_first(take, is_first=placement.is_first, errors=(ConfigError,))
    try:
        if placement.world_size > 1:
            require_shared(folder, placement)
        yield
    finally:
        if lock is not None:
            release(lock)


def require_shared(folder: Path, placement: Placement) -> None:
    """Raise ConfigError on every rank unless all see the first one's folder: else each node would keep a part of every checkpoint."""
    sign: list[str | None] = [leave_sign(folder) if placement.is_first else None]
    dist.broadcast_object_list(sign, src=0)
    blind = ranks_without(lambda: sees(folder, str(sign[0])))
    if placement.is_first:
        (folder / str(sign[0])).unlink(missing_ok=True)
    if blind:
        more = f" and {len(blind) - 1} more" if len(blind) > 1 else ""
        rule = f"is not one folder for all processes: {blind[0]}{more} does not see what rank 0 wrote there"
        raise ConfigError([Problem("output_dir", str(folder), rule, "try a folder on storage that all nodes share")])


def require_same_run(config: Config, manifest: Manifest) -> None:
    """Raise ConfigError on every rank where one was started with other settings, other data or other libraries than the first."""
    values = {name: value for name, value in flattened(config_to_dict(config)) if not name.startswith(OF_A_NODE)}
    values["data"] = manifest.fingerprint
    values |= {f"version of {name}": version for name, version in versions().items() if name != "python"}
    if unlike := unlike_first(values):
        advice = "give the same command, data and environment on every node"
        raise ConfigError([Problem(name, value, f"on {where}", advice) for name, value, where in unlike[:MOST_SHOWN]])


def flattened(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield a tree's leaves with their keys, such as "optim.lr"."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def build_run(config: Config, placement: Placement, *, trains: bool = True) -> Run:
    """Return the run's parts, nothing restored yet.

    Args:
        config: the checked configuration.
        placement: this process's place.
        trains: False reads the held-out split alone.

    Raises:
        DataError: the data is missing, damaged or too small.
        ConfigError: not all ranks have the same settings, data and libraries.
    """
    length = config.data.sequence_length
    try:
        manifest = load_manifest(Path(config.data.path))
        rows = None
        if trains:
            rows = training_rows(config, manifest)
        held_out = HeldOutRows(manifest, sequence_length=length, rows=config.evaluation.rows)
    except ValueError as error:
        raise DataError(str(error)) from error
    vocab_size = config.model.vocab_size or manifest.tokenizer.vocab_size
    plan = make_plan(config, placement.world_size, vocab_size)
    if placement.world_size > 1:
        require_same_run(config, manifest)
    engine = build_engine(config, placement, vocab_size)
    return Run(config, plan, placement, manifest, engine, rows, held_out, Path(config.output_dir))


def training_rows(config: Config, manifest: Manifest, order: int = ORDER) -> TrainingRows:
    """Return the rows of a run in a version of their order."""
    length, weights = config.data.sequence_length, config.data.weights
    return TrainingRows(manifest, sequence_length=length, seed=config.seed, weights=weights, order=order)


def continued(run: Run) -> Checkpoint | None:
    """Return the newest intact checkpoint of a run that this configuration continues, None where there is none yet.

    Raises:
        CheckpointError: it belongs to a run that this configuration would not continue, or none is intact.
    """
    found = newest_checkpoint(run)
    if found is not None and "data.order" not in found.facts:
        run.rows = training_rows(run.config, run.manifest, order=1)
        say(run, f"{found.folder} was written under row order 1: the run keeps it to its end")
    if found is not None and (
        changed := refused_changes(found.facts, facts(run), needs_equal_microbatches(run.config))
    ):
        raise CheckpointError(
            f"{found.folder} cannot be continued with this configuration; set these back or choose another output_dir:\n  "
            + "\n  ".join(changed)
        )
    return found


def finished(run: Run, step: int) -> str | None:
    """Return why a run that resumes after a step has nothing left to do, the same on every rank; None where it has."""
    last, training = last_step(run), run.config.training
    if step < last:
        return None
    evaluated = evaluations(run.folder / FILE_NAME) if run.placement.is_first else set()
    if step == last and (owes_evaluation(run, evaluated, step) or owes_tracker(run, evaluated, step)):
        return None
    where = f"{run.folder} is " + (f"finished at step {step}" if step >= run.plan.steps else f"at step {step}")
    if last < run.plan.steps:
        asked = f"training.stop_at_step={last}"
    elif training.steps:
        asked = f"training.steps={training.steps}"
    else:
        asked = f"training.total_tokens={training.total_tokens} ({last} steps)"
    return f"{where}, and {asked} asks for no more: nothing was changed; a larger value continues the run"


def restore(run: Run, found: Checkpoint | None) -> int:
    """Load a checkpoint, or the weights that a new run starts from; return the steps done."""
    if found is not None:
        run.engine.load(found.folder)
        say(run, f"resuming after step {found.step} from {found.folder}")
        return found.step
    if run.config.checkpoint.init_from:
        source = initial_weights(run, Path(run.config.checkpoint.init_from))
        run.engine.load_weights(source)
        say(run, f"starting from the weights of {source}")
    return 0


def initial_weights(run: Run, named: Path) -> Path:
    """Return the folder whose weights a new run starts from: the newest checkpoint of a run, a checkpoint itself, or common weights.

    Raises:
        CheckpointError: there is none in `named`, or it is of another model.
    """
    source = newest_checkpoint(run, named)
    if source is not None:
        require_same_model(source, facts(run), shapes_alone=True)
        warn_of_another_tokenizer(run, source)
        return source.folder
    if weights := find_weights(named):
        return weights
    raise CheckpointError(
        f"checkpoint.init_from={named} holds no checkpoint and no weights; name a run's folder, a checkpoint's or one of common weights"
    )


def warn_of_another_tokenizer(run: Run, found: Checkpoint) -> None:
    """Say so where a checkpoint's weights were trained on ids of another tokenizer than the data's: they mean other words."""
    theirs, ours = (facts_of.get("vocabulary.tokenizer_sha256") for facts_of in (found.facts, facts(run)))
    if theirs not in (None, ours):
        say(
            run,
            f"warning: {found.folder} was trained with another tokenizer than the one of {run.config.data.path}: its ids mean other words",
        )


def loop(run: Run, log: MetricsLogger, step: int, interruption: Interruption) -> None:
    """Step until done; evaluate and save when due, and where an interruption asks for it.

    On a GPU a step's figures are read when the next one has been queued, so that the device never waits for the host to write a line. A CPU has
    nothing to queue: read late, a step would be timed with its successor.
    """
    config, last = run.config, last_step(run)
    ahead = 1 if run.placement.device.type == "cuda" else 0
    if config.evaluation.at_start if step == 0 else owes_evaluation(run, log.evaluated, step):
        evaluate(run, log, step)
    saved, unread = step, []  # (record's step, result, FLOPs a token) of the step that is still under way
    while step < last:
        rate = learning_rate(step, config.optim, run.plan)
        batches = training_batches(run, step)
        with profiling(run, step + 1):
            result = run.engine.train_step(batches, step=step, learning_rate=rate)
        step += 1
        evaluating, saving = (
            due(step, config.evaluation.interval, run.plan.steps),
            due(step, config.checkpoint.interval, last),
        )
        unread.append((step, result, flops_per_token(run, batches)))
        interrupted = interruption.ends(step)
        saving = saving or interrupted
        while len(unread) > (0 if evaluating or saving else ahead):
            number, earlier, flops = unread.pop(0)
            log.log_step(training_record(run, earlier, number), flops)
            refuse_what_is_not_finite(run, earlier, number)
        if evaluating and not interrupted:
            evaluate(run, log, step)
        if saving:
            save(run, log, step)
            saved = step
        if interrupted:
            raise Interrupted(
                f"{interruption.reason}: stopped after step {step}; its checkpoint is published, and the same command goes on from it"
            )
    if saved != step:
        save(run, log, step)


def refuse_what_is_not_finite(run: Run, result: StepResult, step: int) -> None:
    """Raise DivergedError for figures that are no numbers: the weights are lost by then, and no checkpoint may hold them.

    Every rank reads the same figures, so all leave at the same step.
    """
    if math.isfinite(result.cross_entropy) and math.isfinite(result.grad_norm):
        return
    raise DivergedError(
        f"step {step} has cross entropy {result.cross_entropy:g} and gradient norm {result.grad_norm:g}: training has diverged, and nothing "
        f"was saved since. The same command repeats it from the newest checkpoint in {run.folder}; lower optim.lr, lengthen the warm-up "
        "(optim.warmup_fraction), or start from an earlier checkpoint with checkpoint.init_from"
    )


def profiling(run: Run, step: int) -> AbstractContextManager[None]:
    """Return what profiles a step if the configuration asks for it."""
    if step not in run.config.profile.at:
        return nullcontext()
    rank, memory = run.placement.rank, run.config.profile.memory
    return profiled(run.folder / "profile", step=step, rank=rank, memory=memory)


def flops_per_token(run: Run, batches: list[Batch]) -> float:
    """Return the model FLOPs of a token of a step, causal attention counted by document; over data ranks, the first one's share stands for all."""
    lengths = [int(n) for batch in batches for n in batch.cu_seqlens.diff()]
    row = row_flops(run.config.model, run.config.attention, lengths, run.plan.vocab_size)
    return row.model / sum(lengths)


def last_step(run: Run) -> int:
    """Return the step after which this process leaves."""
    return min(run.plan.steps, run.config.training.stop_at_step or run.plan.steps)


def due(step: int, interval: int, last: int) -> bool:
    """Return whether something done every `interval` steps (0: never) and at the last step is due."""
    return step == last or bool(interval and step % interval == 0)


def training_batches(run: Run, step: int) -> list[Batch]:
    """Return this rank's microbatches of a step: every dp-th of the global batch."""
    assert run.rows is not None
    per_step = run.plan.num_microbatches * run.plan.dp
    return [
        microbatch(run, run.rows, step * per_step + index, index)
        for index in range(run.placement.dp_rank, per_step, run.plan.dp)
    ]


def microbatch(run: Run, rows: TrainingRows | HeldOutRows, number: int, index: int) -> Batch:
    """Return microbatch `number` of a source of rows."""
    size = run.config.training.micro_batch_size
    chosen = (rows.row(number * size + i) for i in range(size))
    covered = run.config.attention.block_size * run.config.attention.top_k
    isolate = run.config.data.isolate_documents
    return collate(chosen, index=index, isolate_documents=isolate, padding_document=covered)


def owes_evaluation(run: Run, evaluated: set[tuple[int, str]], step: int) -> bool:
    """Return whether the step that a run goes on from should have been evaluated and was not: a signal stopped it there.

    Args:
        run: the run.
        evaluated: step and mode of its evaluations so far; read on rank 0.
        step: steps done.
    """
    if not due(step, run.config.evaluation.interval, run.plan.steps):
        return False
    owed = [run.placement.is_first and any((step, mode) not in evaluated for mode in MODES)]
    dist.broadcast_object_list(owed, src=0)
    return owed[0]


def owes_tracker(run: Run, evaluated: set[tuple[int, str]], step: int) -> bool:
    """Return whether W&B was ended without records of the run's last step; arguments as of `owes_evaluation`."""
    newest = {"train": step} | {f"heldout/{mode}": step for mode in MODES if (step, mode) in evaluated}
    owed = [run.placement.is_first and lacks(run.config.logging.wandb, run.folder, newest)]
    dist.broadcast_object_list(owed, src=0)
    return owed[0]


def evaluate(run: Run, log: MetricsLogger, step: int) -> None:
    """Evaluate the held-out rows in both modes."""
    for mode in MODES:
        result = judge(run, mode)
        log.log_evaluation(evaluation_record(run, result, step, mode))


def count_held_out(size: int, plan: Plan, num_rows: int) -> int:
    """Return how many microbatches of `size` rows hold the held-out rows: as many on every data rank, whole rounds of an interleaved pipeline.

    What the rows do not fill is padding, which counts in no mean.
    """
    unit = plan.dp * (plan.pp if plan.vpp > 1 else 1)
    return -(-num_rows // (size * unit)) * unit


def judge(run: Run, mode: str) -> EvaluationResult:
    """Return the held-out metrics in a mode, slice by slice under a progress bar."""
    plan = run.plan
    total = count_held_out(run.config.training.micro_batch_size, plan, run.held_out.num_rows)
    size = 2 * plan.dp * plan.pp
    parts = []
    hidden = not (run.placement.is_first and sys.stderr.isatty())
    with tqdm(total=total, desc=f"held-out, {mode}", unit="microbatch", disable=hidden, leave=False) as bar:
        for begin in range(0, total, size):
            numbers = range(begin, min(begin + size, total))
            mine = [microbatch(run, run.held_out, i, i) for i in numbers if i % plan.dp == run.placement.dp_rank]
            parts.append(run.engine.evaluate(mine, mode=mode))
            bar.update(len(numbers))
    return combine(parts)


def combine(parts: list[EvaluationResult]) -> EvaluationResult:
    """Return the metrics of slices together: cross entropy weighed by labels (NaN without any), layers' means by tokens."""
    labels, tokens = sum(r.num_labels for r in parts), sum(r.num_tokens for r in parts)
    return EvaluationResult(
        cross_entropy=sum(r.cross_entropy * r.num_labels for r in parts) / labels if labels else math.nan,
        alignment_by_layer=[
            sum(v) / tokens
            for v in zip(*([r.num_tokens * x for x in r.alignment_by_layer] for r in parts), strict=True)
        ],
        captured_mass_by_layer=[
            sum(v) / tokens
            for v in zip(*([r.num_tokens * x for x in r.captured_mass_by_layer] for r in parts), strict=True)
        ],
        num_labels=labels,
        num_tokens=tokens,
    )


def save(run: Run, log: MetricsLogger, step: int) -> None:
    """Publish a checkpoint; its time does not count in the speed of the steps."""
    begin = time.monotonic()

    def write(folder: Path) -> None:
        run.engine.save(folder)
        if run.config.checkpoint.weights:
            run.engine.save_weights(folder)

    folder = publish(
        run.folder,
        step,
        facts(run),
        write,
        keep=run.config.checkpoint.keep,
        is_first=run.placement.is_first,
        say=log.console.say,
        verdicts=run.verdicts,
    )
    log.console.say(save_line(step, time.monotonic() - begin, folder))
    log.pause()


def newest_checkpoint(run: Run, folder: Path | None = None) -> Checkpoint | None:
    """Return the newest intact checkpoint of this run, or of the one in `folder`."""
    return newest(
        folder or run.folder,
        is_first=run.placement.is_first,
        device=run.placement.device,
        say=lambda text: say(run, text),
        verdicts=run.verdicts,
    )


def facts(run: Run) -> dict[str, Any]:
    """Return what a resumed run must share with the one that wrote the checkpoint: all that decides the losses but layout and schedule."""
    kept = run_facts(
        run.config,
        fingerprint=run.manifest.fingerprint,
        padded_vocab_size=run.plan.padded_vocab_size,
        tokenizer_sha256=run.manifest.tokenizer.sha256,
    )
    if run.rows and run.rows.order > 1:  # a checkpoint without this fact was written under the first order
        kept["data.order"] = run.rows.order
    return kept


def training_record(run: Run, result: StepResult, step: int) -> dict[str, Any]:
    """Return a step's metrics; times and speeds are the logger's."""
    alignment = mean(result.alignment_by_layer)
    return {
        "step": step,
        "tokens": step * run.plan.tokens_per_step,
        "loss": result.cross_entropy + run.config.attention.alignment_weight * (alignment or 0.0),
        "cross_entropy": result.cross_entropy,
        "alignment_loss": alignment,
        "alignment_loss_by_layer": result.alignment_by_layer,
        "captured_mass": mean(result.captured_mass_by_layer),
        "captured_mass_by_layer": result.captured_mass_by_layer,
        "grad_norm": result.grad_norm,
        "learning_rate": learning_rate(step - 1, run.config.optim, run.plan),
        "stream": {1.0: "full", 0.0: "sparse"}.get(result.full_share, "mixed"),
        "full_share": result.full_share,
    }


def evaluation_record(run: Run, result: EvaluationResult, step: int, mode: str) -> dict[str, Any]:
    """Return an evaluation's metrics."""
    return {
        "step": step,
        "tokens": step * run.plan.tokens_per_step,
        "split": "heldout",
        "mode": mode,
        "cross_entropy": result.cross_entropy,
        "alignment_loss": mean(result.alignment_by_layer),
        "captured_mass": mean(result.captured_mass_by_layer),
        "captured_mass_by_layer": result.captured_mass_by_layer,
        "rows": run.held_out.num_rows,
    }


def mean(values: list[float]) -> float | None:
    """Return the mean, None of nothing."""
    return sum(values) / len(values) if values else None


def open_log(run: Run, step: int) -> MetricsLogger:
    """Return the run's logger after saying what is about to happen; only the first rank writes."""
    console = Console(
        total_steps=run.plan.steps,
        first_step=step,
        enabled=run.placement.is_first,
        timestamps=run.config.logging.timestamps,
    )
    peak = peak_flops(device_name(run.placement), run.config.precision.name)
    tracker = start_reporting(run, console, step) if run.placement.is_first else None
    return MetricsLogger(
        run.folder,
        total_steps=run.plan.steps,
        tokens_per_step=run.plan.tokens_per_step,
        resume_step=step,
        interval=run.config.logging.interval,
        flops_per_token=run.plan.flops_per_token,
        peak_flops=peak * run.placement.world_size if peak else None,
        console=console,
        tracker=tracker,
        enabled=run.placement.is_first,
    )


def start_reporting(run: Run, console: Console, step: int) -> Tracker | None:
    """Say what runs where, keep the configuration beside the results and start W&B if wanted."""
    config, plan = run.config, run.plan
    run.folder.mkdir(parents=True, exist_ok=True)
    save_config(config, run.folder / "config.yaml")
    add_start(run.folder, step=step, device=device_name(run.placement), processes=plan.world_size)
    console.say(
        banner(
            {
                "run": f"{config.name} -> {run.folder}",
                "model": f"{config.model.name}, {plan.parameters:,} parameters, attention {config.attention.method.value}",
                "layout": f"{plan.world_size} x {device_name(run.placement)}: tp {plan.tp}, pp {plan.pp}, {f'cp {plan.cp}, ' if plan.cp > 1 else ''}dp {plan.dp}, {config.precision.name.value}",
                "data": f"{config.data.path}, rows of {config.data.sequence_length} tokens, vocabulary {plan.vocab_size:,}",
                "length": f"{plan.steps:,} steps of {plan.tokens_per_step:,} tokens = {plan.total_tokens:,} tokens",
            }
            | ({"warning": said} if (said := warning(config)) else {})
        )
    )
    source = Path(__file__).resolve().parents[1]
    described = (
        config_to_dict(config)
        | {"version": __version__, "versions": versions()}
        | provenance(source, Path(config.data.path))
    )
    return start_tracking(
        config.logging.wandb,
        name=config.name,
        folder=run.folder,
        config=described,
        say=console.say,
        step=step,
        decisive={name: value for name, value in flattened(config_to_dict(config)) if not name.startswith(NO_FIGURES)},
    )


def device_name(placement: Placement) -> str:
    """Return the device's name, such as "NVIDIA H200" or "CPU"."""
    return torch.cuda.get_device_name(placement.device) if placement.device.type == "cuda" else "CPU"


def say(run: Run, text: str) -> None:
    """Print text, once."""
    if run.placement.is_first:
        print(stamped(text, run.config.logging.timestamps), flush=True)
