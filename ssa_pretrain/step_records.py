"""What metrics.jsonl has on a training step, before the logger adds times and speeds, and the operations that MFU counts."""

from dataclasses import replace
from typing import Any

import torch

from ssa_pretrain.data.batches import Batch
from ssa_pretrain.engine import StepResult
from ssa_pretrain.evaluation.held_out import mean
from ssa_pretrain.monitor.by_source import step_values
from ssa_pretrain.planning.flops import row_flops
from ssa_pretrain.rates import learning_rate
from ssa_pretrain.run import Run
from ssa_pretrain.run_folder import GIB
from ssa_pretrain.schedule import is_warm_up
from ssa_pretrain.step_ranges import contains


def flops_per_token(run: Run, batches: list[Batch], step: int) -> float:
    """Returns the model FLOPs per token of the step after `step` steps.

    Causal attention is counted per document, over this data rank's microbatches without padding.
    """
    lengths = [length for batch in batches for length in batch.document_lengths]
    row = row_flops(run.config.model, run.config.attention, lengths, run.plan.vocab_size)
    if is_warm_up(run.config.attention, step):
        row = replace(row, full_ratio=1.0)
    return row.model / max(1, sum(lengths))


def training_record(run: Run, result: StepResult, step: int) -> dict[str, Any]:
    """Returns the record of a step for metrics.jsonl; the logger adds times and speeds."""
    alignment = mean(result.alignment_by_layer)
    z_loss = {} if result.z_loss is None else {"z_loss": result.z_loss}
    return {
        "step": step,
        "tokens": run.plan.tokens_before(step),
        **batch_size(run, step),
        "loss": result.cross_entropy
        + (result.z_loss or 0.0)
        + run.config.attention.alignment_weight * (alignment or 0.0),
        "cross_entropy": result.cross_entropy,
        **z_loss,
        "alignment_loss": alignment,
        "alignment_loss_by_layer": result.alignment_by_layer,
        "captured_mass": mean(result.captured_mass_by_layer),
        "captured_mass_by_layer": result.captured_mass_by_layer,
        **index_loss_record(result),
        "grad_norm": result.grad_norm,
        "learning_rate": learning_rate(step - 1, run.config.optim, run.plan),
        "stream": {1.0: "full", 0.0: "sparse"}.get(result.full_share, "mixed"),
        "full_share": result.full_share,
        **memory_record(run.placement.device),
    } | data_values(run, result, step)


def memory_record(device: torch.device) -> dict[str, float]:
    """Returns the most memory that tensors have held on this rank's GPU since the start of the process; nothing on a CPU."""
    return {"peak_memory_gib": torch.cuda.max_memory_allocated(device) / GIB} if device.type == "cuda" else {}


def data_values(run: Run, result: StepResult, step: int) -> dict[str, Any]:
    """Returns what a step's record has on its data: padding and, on the rank that writes it, the values by source."""
    batch = run.plan.batches.tokens_at(step - 1)
    padding = {"padding_share": 1.0 - result.num_tokens / batch} if result.num_tokens < batch else {}
    if run.rows is None or not run.placement.is_rank_0:
        return padding
    return padding | step_values(run.rows.part_names, result.by_part, run.rows.read_so_far(run.plan.rows_before(step)))


def batch_size(run: Run, step: int) -> dict[str, int]:
    """Returns the tokens of a step, counted from 1, if the batch changes over the run."""
    sizes = run.plan.batches
    return {} if sizes.is_constant else {"batch_tokens": sizes.tokens_at(step - 1)}


def index_loss_record(result: StepResult) -> dict[str, Any]:
    """Returns what a trained scorer adds to a step's record."""
    losses = result.index_loss_by_layer
    return {"index_loss": mean(losses), "index_loss_by_layer": losses} if losses else {}


def left_out_record(run: Run, step: int) -> dict[str, Any]:
    """Returns the record of a step whose data is left out: it has no results."""
    by_hand = contains(run.config.training.skip_steps, step)
    return {
        "step": step,
        "tokens": run.plan.tokens_before(step),
        **batch_size(run, step),
        "loss": None,
        "cross_entropy": None,
        "learning_rate": learning_rate(step - 1, run.config.optim, run.plan),
        "skipped": True,
        "skip_reason": "training.skip_steps" if by_hand else "rollback",
    }
