"""Continues any checkpoint as a new run in its own folder: a branch (`checkpoint.branch_from`).

A branch takes weights, optimizer state, running mean and step from the checkpoint. Step is the only clock, so the branch has the rows that the old run
would have had, and its schedule is the new configuration's at that step: one stable phase serves many decays. `checkpoint.init_from` starts at step 0
with weights only.

What must agree is what the saved state depends on: the model's shapes, the vocabulary, the engine, the precision and the optimizer's kind. What is
listed in FREE may change: data, mixture, row length, RoPE, the attention's constants, optimizer's constants, seed, and the batch from here on. The
learning rate, its schedule and the length are never compared. Everything that changes is printed, and kept as the fact `history` of all the branch's
checkpoints, oldest branch first. The branch resumes from its own checkpoints like any run.
"""

from pathlib import Path
from typing import Any

from ssa_pretrain.checkpoint.facts import HISTORY, SHAPELESS, differing, tokens_trained_on
from ssa_pretrain.checkpoint.find import Checkpoint, newest, require_same_model
from ssa_pretrain.config import Config
from ssa_pretrain.errors import CheckpointError
from ssa_pretrain.run import Run, training_rows
from ssa_pretrain.run_folder import named_folder
from ssa_pretrain.settings.convert import config_to_dict, load_config
from ssa_pretrain.settings.problems import ConfigError, show
from ssa_pretrain.settings.tree import flatten_settings

ATTENTION = ("method", "block_size", "top_k", "score", "alignment_weight", "sparsity_weight", "commitment_weight")
ATTENTION += ("full_ratio", "stream_draw", "counterpart_share")
OPTIM = ("beta1", "beta2", "eps", "weight_decay", "clip_grad")
FREE = (  # facts that a branch may change, by the beginnings of their keys
    *SHAPELESS,
    *(f"attention.{name}" for name in ATTENTION),
    *(f"optim.{name}" for name in OPTIM),
    "data.",
    "training.",
    "precision.grad_reduce_in_fp32",
    "precision.fp8_recipe",
    "seed",
)
SHOWN = ("optim.", "training.")  # settings that are not facts, and are recorded in the history


def open_branch(run: Run) -> Checkpoint:
    """Returns the checkpoint that a new run continues; the run gets its history, and the row order of its data.

    Raises:
        CheckpointError: there is no intact checkpoint, the run differs in what must agree, or it ends before the checkpoint's step.
    """
    named = run.config.checkpoint.branch_from
    source = newest(
        named_folder(named), is_rank_0=run.placement.is_rank_0, device=run.placement.device, report=run.print
    )
    if source is None:
        raise CheckpointError(
            f"checkpoint.branch_from={named} holds no checkpoint; name a run's folder, RUN@STEP or a checkpoint"
        )
    wanted = run.contract(source.step)
    require_same_model(source, wanted, shapes_only=True)
    changed = differing(source.facts, wanted)
    if fixed := [key for key in changed if not key.startswith(FREE)]:
        listed = "; ".join(f"{key}: checkpoint {changed[key][0]!r}, run {changed[key][1]!r}" for key in fixed)
        raise CheckpointError(
            f"{source.folder} cannot be branched with this configuration ({listed}); restore these settings, "
            "or start from its weights only with checkpoint.init_from"
        )
    _require_same_place(run, source)
    if "data.order" not in source.facts and "data.fingerprint" not in changed:
        run.rows = training_rows(run.config, run.manifest, order=1)
    changed |= _changed_settings(source.folder, run.config)
    entry = {"from": str(source.folder), "step": source.step, "changed": {k: list(v) for k, v in changed.items()}}
    run.history = [*source.facts.get(HISTORY, []), entry]
    return source


def branch_text(run: Run, source: Checkpoint) -> str:
    """Returns what a branch continues and what it changes, as lines for the user."""
    changed: dict[str, Any] = run.history[-1]["changed"]
    lines = [f"branching from step {source.step} of {source.folder}"]
    return "\n  ".join([*lines, *(f"{key}: {show(old)} -> {show(new)}" for key, (old, new) in changed.items())])


def _require_same_place(run: Run, source: Checkpoint) -> None:
    """Raises CheckpointError unless the run has steps left after the checkpoint, and counts as many tokens up to it."""
    step = source.step
    if run.last_step <= step:
        raise CheckpointError(
            f"{source.folder} has done {step} steps, and this run ends after step {run.last_step}; "
            "set training.steps or training.total_tokens, which count from the start of the first run"
        )
    ours, theirs = run.plan.tokens_before(step), tokens_trained_on(source.facts, step)
    if ours != theirs:
        first = source.facts["training.global_batch_tokens"]
        new = run.config.training.global_batch_tokens
        raise CheckpointError(
            f"{source.folder} has trained on {theirs} tokens in {step} steps, and this run would count {ours}; keep the batch up to there "
            f"with training.global_batch_tokens={first}, and change it with 'training.batch_steps=[{{step:{step + 1},global_batch_tokens:{new}}}]'"
        )


def _changed_settings(folder: Path, config: Config) -> dict[str, tuple[Any, Any]]:
    """Returns the settings of schedule and length that differ from those of the run that wrote a checkpoint; empty if it lies outside a run."""
    try:
        old = load_config(Config, folder.parents[1] / "config.yaml")
    except (OSError, ConfigError, IndexError):
        return {}
    before, now = (dict(flatten_settings(config_to_dict(one))) for one in (old, config))
    return {key: (before[key], now[key]) for key in now if key.startswith(SHOWN) and before.get(key) != now[key]}
