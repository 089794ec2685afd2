"""Decides where a run starts: after its newest intact checkpoint, as a branch of another run (branch.py), from given weights or from new ones, or not at all if it is finished."""

from pathlib import Path

import torch.distributed as dist

from ssa_pretrain.branch import branch_text, open_branch
from ssa_pretrain.checkpoint import mirror
from ssa_pretrain.checkpoint.facts import AVERAGED, HISTORY, refused_changes
from ssa_pretrain.checkpoint.find import Checkpoint, newest, require_same_model
from ssa_pretrain.checkpoint.weights import WeightsReader, find_weights
from ssa_pretrain.config import Score
from ssa_pretrain.errors import CheckpointError
from ssa_pretrain.evaluation import MODES
from ssa_pretrain.evaluation.held_out import Evaluated, is_evaluation_missing
from ssa_pretrain.model.sharding import is_scorer
from ssa_pretrain.monitor.metrics_file import FILE_NAME, evaluations
from ssa_pretrain.monitor.tracking import lacks_records
from ssa_pretrain.run import Run, training_rows
from ssa_pretrain.run_folder import named_folder
from ssa_pretrain.schedule import needs_equal_microbatches


def find_checkpoint(run: Run) -> Checkpoint | None:
    """Returns the newest intact checkpoint of the run; None if it has no checkpoint yet. If its folder has none, the mirror is asked.

    If the checkpoint was written under an older row order, the run keeps that order.

    Raises:
        CheckpointError: no checkpoint is intact, or this configuration cannot resume from it.
    """
    if address := run.config.checkpoint.mirror:
        mirror.restore(address, run.folder, is_rank_0=run.placement.is_rank_0, report=run.print)
    checkpoint = newest_checkpoint(run)
    if checkpoint is None:
        return None
    if AVERAGED in checkpoint.facts:
        raise CheckpointError(
            f"{checkpoint.folder} holds averaged weights without an optimizer; choose another output_dir and start with checkpoint.init_from={run.folder}"
        )
    run.history = checkpoint.facts.get(HISTORY, [])
    if "data.order" not in checkpoint.facts:
        run.rows = training_rows(run.config, run.manifest, order=1)
        run.print(f"{checkpoint.folder} was written under row order 1: the run keeps it to its end")
    if changed := refused_changes(
        checkpoint.facts, run.contract(checkpoint.step), needs_equal_microbatches(run.config)
    ):
        listed = "\n  ".join(changed)
        raise CheckpointError(
            f"{checkpoint.folder} cannot be continued with this configuration; restore these settings or choose another output_dir:\n  {listed}"
        )
    return checkpoint


def newest_checkpoint(run: Run, folder: Path | None = None) -> Checkpoint | None:
    """Returns the newest intact checkpoint of this run, or of the run or checkpoint in `folder`."""
    return newest(
        folder or run.folder,
        is_rank_0=run.placement.is_rank_0,
        device=run.placement.device,
        report=run.print,
        verdicts=run.verdicts,
    )


def restore(run: Run, checkpoint: Checkpoint | None) -> int:
    """Loads a checkpoint, or the weights that a new run starts from. Returns the steps done."""
    if checkpoint is not None:
        run.engine.load(checkpoint.folder)
        run.health.load(checkpoint.folder)
        run.print(f"resuming after step {checkpoint.step} from {checkpoint.folder}")
        return checkpoint.step
    if run.config.checkpoint.branch_from:
        branched = open_branch(run)
        run.engine.load(branched.folder)
        run.health.load(branched.folder)
        run.print(branch_text(run, branched))
        return branched.step
    if run.config.checkpoint.init_from:
        source = initial_weights(run, named_folder(run.config.checkpoint.init_from))
        run.engine.load_weights(source)
        run.print(f"starting from the weights of {source}{_begins_scorer(run, source)}")
    return 0


def _begins_scorer(run: Run, source: Path) -> str:
    """Returns what to say if the run trains a scorer of blocks that these weights do not hold."""
    found = find_weights(source)
    if run.config.attention.score is not Score.indexer or found is None:
        return ""
    held = any(map(is_scorer, WeightsReader(found).tensors))
    return "" if held else ", which hold no trained scorer: it begins with its initial weights"


def initial_weights(run: Run, named: Path) -> Path:
    """Returns the folder with the weights that a new run starts from: the newest checkpoint of a run, a checkpoint itself, or common weights.

    Raises:
        CheckpointError: `named` has none of these, or those of another model.
    """
    checkpoint = newest_checkpoint(run, named)
    if checkpoint is not None:
        require_same_model(checkpoint, run.contract(), shapes_only=True)
        warn_of_another_tokenizer(run, checkpoint)
        return checkpoint.folder
    if weights := find_weights(named):
        return weights
    raise CheckpointError(
        f"checkpoint.init_from={named} holds no checkpoint and no weights; name a run's folder, a checkpoint's or one of common weights"
    )


def warn_of_another_tokenizer(run: Run, checkpoint: Checkpoint) -> None:
    """Prints a warning if the checkpoint was trained with a different tokenizer than this dataset's."""
    theirs, ours = (facts.get("vocabulary.tokenizer_sha256") for facts in (checkpoint.facts, run.contract()))
    if theirs not in (None, ours):
        run.print(
            f"warning: {checkpoint.folder} was trained with a different tokenizer than that of {run.config.data.path}: "
            "the same token ids stand for different text"
        )


def why_finished(run: Run, step: int) -> str | None:
    """Returns, on every rank, why a run that has done `step` steps is finished. None if steps, an evaluation or W&B rows are still missing."""
    if step < run.last_step:
        return None
    evaluated = evaluations(run.folder / FILE_NAME) if run.placement.is_rank_0 else set()
    if step == run.last_step and (
        is_evaluation_missing(run, evaluated, step) or lacks_wandb_rows(run, evaluated, step)
    ):
        return None
    training, where = run.config.training, "finished at step" if step >= run.plan.steps else "at step"
    if run.last_step < run.plan.steps:
        limit = f"training.stop_at_step={run.last_step}"
    elif training.steps:
        limit = f"training.steps={training.steps}"
    else:
        limit = f"training.total_tokens={training.total_tokens} ({run.last_step} steps)"
    return (
        f"{run.folder} is {where} {step}, and {limit} is reached: nothing was changed; a larger value continues the run"
    )


def lacks_wandb_rows(run: Run, evaluated: Evaluated, step: int) -> bool:
    """Returns, on every rank, whether the W&B run ended before it received all rows of the run's last step."""
    newest_rows = {"train": step} | {f"heldout/{mode}": step for mode in MODES if (step, mode) in evaluated}
    newest_rows |= {name: at for at, name in evaluated if at == step and name.startswith("task/")}
    missing = [run.placement.is_rank_0 and lacks_records(run.config.logging.wandb, run.folder, newest_rows)]
    dist.broadcast_object_list(missing, src=0)
    return missing[0]
