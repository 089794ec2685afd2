"""The megatron-core engine: the model (model.py) under core's DistributedDataParallel, with core's optimizers and dist_checkpointing.

Losses and results are step.py's. Core's schedules run forward and backward, and its gradient buffers do the reduction over data ranks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from torch import Tensor

from ssa_pretrain.checkpoint import sharded_weights
from ssa_pretrain.checkpoint.staging import HostCopies
from ssa_pretrain.checkpoint.weights import EMA, WEIGHTS
from ssa_pretrain.config import Config, OptimizerName
from ssa_pretrain.data.batches import Batch
from ssa_pretrain.engine.finite import first_not_finite, optimizer_tensors
from ssa_pretrain.engine.interface import PendingStep, Snapshot
from ssa_pretrain.engine.megatron import checkpoint
from ssa_pretrain.engine.megatron.mean import build_mean
from ssa_pretrain.engine.megatron.model import MegatronModel
from ssa_pretrain.engine.megatron.muon import build_muon
from ssa_pretrain.engine.megatron.optimizer import build_adamw
from ssa_pretrain.engine.replicas import ReplicaCheck
from ssa_pretrain.engine.step_sums import StepSums
from ssa_pretrain.monitor.profiling import OPTIMIZER_RANGE
from ssa_pretrain.parallel.state import Placement


class MegatronEngine(MegatronModel):
    """The Llama of one rank under megatron-core, with its optimizer."""

    may_begin_scorer = True

    def __init__(self, config: Config, placement: Placement, vocab_size: int) -> None:
        super().__init__(config, placement, vocab_size)
        self.replicas = ReplicaCheck(config.training.replica_check_interval, placement)
        is_muon = config.optim.name is OptimizerName.muon
        self.optimizer = (
            build_muon(config, self.chunks, placement.groups) if is_muon else build_adamw(config, self.chunks)
        )
        self.mean = build_mean(config, self.optimizer, self.models, placement)
        self.copies = HostCopies(placement.device)
        self._are_gathered = False  # whether every data rank has the weights after the last update
        self._install_hooks()

    def wrap(self, chunk: torch.nn.Module, stage: int) -> DistributedDataParallel:
        """Returns a chunk under core's data parallelism, with its gradient buffers."""
        config = self.config
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=config.precision.grad_reduce_in_fp32,
            overlap_grad_reduce=config.engine.overlap_grad_reduce,
            overlap_param_gather=config.engine.overlap_param_gather,
            use_distributed_optimizer=config.engine.distributed_optimizer and config.optim.name is OptimizerName.adamw,
        )
        return DistributedDataParallel(config=chunk.config, ddp_config=ddp, module=chunk, disable_bucketing=stage > 0)

    def train_step(self, batches: Sequence[Batch], *, step: int, learning_rate: float) -> PendingStep:
        """See `Engine.train_step`; on a GPU the step is only queued when this returns."""
        sums = self.forward_backward(batches, step=step)
        # After the forward, which gathers the weights if `overlap_param_gather` defers that.
        differing = self.replicas.compare(self._named_weights(), step)
        grad_norm = self.update(learning_rate)
        if self.mean is not None:
            self.mean.update(step + 1, grad_norm)
        return self.microbatches.step_result(sums, grad_norm, differing)

    def forward_backward(self, batches: Sequence[Batch], *, step: int) -> StepSums:
        """Computes the global batch's gradients into their buffers. Returns the sums of the passes."""
        batches, routes, sums = self.microbatches.begin_step(batches, step)
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._run_schedule(batches, routes, sums, forward_only=False)
        return sums

    def update(self, learning_rate: float) -> Tensor:
        """Takes the optimizer step over the gradients in the buffers; returns their norm before clipping, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_mult", 1.0)
            group["weight_decay"] = self.config.optim.weight_decay * group.get("wd_mult", 1.0)
        self._are_gathered = False
        with torch.profiler.record_function(OPTIMIZER_RANGE):
            _, norm, _ = self.optimizer.step()
        return norm

    def require_equal_replicas(self, step: int) -> None:
        """See `Engine.require_equal_replicas`."""
        self._gather_parameters()
        self.replicas.require_equal_to_save(self._named_weights(), step)

    def first_not_finite(self) -> str | None:
        """See `Engine.first_not_finite`."""
        self._gather_parameters()
        weights = (named for model in self.models for named in model.named_parameters())
        return first_not_finite([*weights, *optimizer_tensors(checkpoint.inner_optimizers(self.optimizer))])

    def save(self, folder: Path) -> None:
        """See `Engine.save`."""
        self._gather_parameters()
        self.optimizer.count_skipped_steps()
        checkpoint.save(folder, self.chunks, self.optimizer)
        if self.mean is not None:
            self.mean.save(folder, self.models, self.placement)

    def snapshot(self, *, weights: bool) -> Snapshot:
        """See `Engine.snapshot`."""
        self._gather_parameters()
        self.optimizer.count_skipped_steps()
        with self.copies.taking():
            write_state = checkpoint.copy_state(self.chunks, self.optimizer, self.copies)
            parts = (self.models, self.config, self.placement)
            copied = {WEIGHTS: sharded_weights.copy_weights(self.copies, *parts)} if weights else {}
            if self.mean is not None:
                copied[EMA] = self.mean.copy(self.copies, self.models, self.placement)

        def write(folder: Path, group: dist.ProcessGroup) -> None:
            self.copies.wait()
            write_state(folder, group)
            for name, tensors in copied.items():
                sharded_weights.write_copies(folder / name, tensors, self.placement, group)

        return Snapshot(write, self.copies.device_seconds)

    def load(self, folder: Path) -> None:
        """See `Engine.load`."""
        self._are_gathered = False
        self.optimizer.count_skipped_steps()
        checkpoint.load(folder, self.chunks, self.optimizer)
        self.optimizer.prepare_skipping()
        if self.mean is not None:
            self.mean.load(folder, self.models, self.placement)

    def load_weights(self, folder: Path) -> None:
        """See `Evaluator.load_weights`."""
        self._are_gathered = False
        super().load_weights(folder)
        self.optimizer.reload_model_params()
        if self.mean is not None:
            self.mean.restart()

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """See `Engine.ema_weights`."""
        assert self.mean is not None
        self._gather_parameters()
        with self.mean.in_model(self.models):
            yield

    def save_weights(self, folder: Path) -> None:
        """See `Engine.save_weights`."""
        self._gather_parameters()
        sharded_weights.save_weights(folder, self.models, self.config, self.placement)

    def _named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Returns this rank's weights with their canonical names."""
        return sharded_weights.named_weights(self.models, self.config, tied_copies=True)

    def start_evaluating(self) -> None:
        """Updates the weights and sets the model to evaluation."""
        self._gather_parameters()
        super().start_evaluating()

    def _gather_parameters(self) -> None:
        """Updates every data rank's weights, which `overlap_param_gather` defers to the next training forward; once after each update."""
        if self.chunks[0].ddp_config.overlap_param_gather and not self._are_gathered:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)
            self._are_gathered = True

    def _install_hooks(self) -> None:
        """Sets the functions that core's schedules call to synchronise gradients and parameters."""
        own_time, device = self.microbatches.own_time, self.placement.device

        def finalize(*arguments: Any, **options: Any) -> None:  # knows no more of the engine, because core keeps it
            own_time.end(device)  # so far this rank has waited for no other
            finalize_model_grads(*arguments, **options)

        self.core.finalize_model_grads_func = finalize
        ddp = self.chunks[0].ddp_config
        if ddp.overlap_grad_reduce:
            self.core.no_sync_func = (
                [c.no_sync for c in self.chunks] if len(self.chunks) > 1 else self.chunks[0].no_sync
            )
            if len(self.chunks) > 1:
                self.core.grad_sync_func = [c.start_grad_sync for c in self.chunks]
        if ddp.overlap_param_gather and len(self.chunks) > 1:
            self.core.param_sync_func = [c.start_param_sync for c in self.chunks]
