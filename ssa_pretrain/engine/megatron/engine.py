"""The megatron-core engine: GPTModel under core's DistributedDataParallel, pipeline schedules, optimizers and dist_checkpointing.

Losses and results are step.py's. Core's schedules run forward and backward, and its gradient buffers do the reduction over data ranks.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from ssa_pretrain.checkpoint import sharded_weights
from ssa_pretrain.checkpoint.weights import find_weights
from ssa_pretrain.config import Config, PrecisionName
from ssa_pretrain.data.batches import Batch
from ssa_pretrain.engine.finite import first_not_finite, optimizer_tensors
from ssa_pretrain.engine.interface import EvaluationResult, PendingStep
from ssa_pretrain.engine.megatron import checkpoint
from ssa_pretrain.engine.megatron.optimizer import build_optimizer
from ssa_pretrain.engine.step import Microbatches, Route, StepSums
from ssa_pretrain.model.spec import build_model
from ssa_pretrain.monitor.profiling import OPTIMIZER_RANGE
from ssa_pretrain.parallel.context import ContextParallel
from ssa_pretrain.parallel.state import Placement, limit_waiting


class MegatronEngine:
    """The Llama of one rank under megatron-core."""

    def __init__(self, config: Config, placement: Placement, vocab_size: int) -> None:
        self.config = config
        self.placement = placement
        if config.engine.overlap_tp:
            start_user_buffers(config)
        self.context = ContextParallel(placement.groups.cp)
        self.microbatches = Microbatches(config, placement, self.context)
        self.chunks = _build_chunks(config, placement, vocab_size)
        self.core = self.chunks[0].config
        self.optimizer = build_optimizer(config, self.chunks)
        self._install_hooks()
        self._schedule = get_forward_backward_func()
        limit_waiting(config.parallel)

    def train_step(self, batches: Sequence[Batch], *, step: int, learning_rate: float) -> PendingStep:
        """See `Engine.train_step`; on a GPU the step is only queued when this returns."""
        sums = self.forward_backward(batches, step=step)
        grad_norm = self.update(learning_rate)
        return self.microbatches.step_result(sums, grad_norm)

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
            group["lr"] = learning_rate
            group["weight_decay"] = self.config.optim.weight_decay * group.get("wd_mult", 1.0)
        with torch.profiler.record_function(OPTIMIZER_RANGE):
            _, norm, _ = self.optimizer.step()
        return norm

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], *, mode: str) -> EvaluationResult:
        """See `Engine.evaluate`."""
        self._start_evaluating()
        batches = self.microbatches.localise(batches)
        sums = StepSums(self.microbatches.count(batches))
        if batches:
            routes = [Route(mode, counterpart=True)] * len(batches)
            self._run_schedule(batches, routes, sums, forward_only=True)
        return self.microbatches.evaluation_result(sums)

    @torch.no_grad()
    def last_logits(self, batch: Batch, *, mode: str) -> Tensor:
        """See `Engine.last_logits`."""
        self._start_evaluating()
        (batch,) = self.microbatches.localise([batch])
        ends = batch.cu_seqlens[1:].long() - 1

        def forward_step(iterator: Iterator[Batch], chunk: torch.nn.Module) -> tuple[Tensor, Callable]:
            packed = self.microbatches.pack(next(iterator), Route(mode))
            out = chunk(
                batch.tokens, batch.positions.unsqueeze(0), None, packed_seq_params=packed, runtime_gather_output=True
            )
            tokens = self.context.num_tokens(batch)
            return out, lambda logits, non_loss_data: self.context.values_at(logits[0], ends, tokens).float()

        count = self.config.parallel.pp if len(self.chunks) > 1 else 1  # interleaving needs whole rounds of the stages
        outputs = self._schedule(
            forward_step_func=forward_step,
            data_iterator=[iter([batch] * count) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=count,
            seq_length=self.context.num_tokens(batch),
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
        return self._broadcast_from_last_stage(outputs[0] if outputs else None, len(ends))

    def first_not_finite(self) -> str | None:
        """See `Engine.first_not_finite`."""
        self._gather_parameters()
        weights = (named for model in self._models for named in model.named_parameters())
        return first_not_finite([*weights, *optimizer_tensors(checkpoint.inner_optimizers(self.optimizer))])

    def save(self, folder: Path) -> None:
        """See `Engine.save`."""
        self._gather_parameters()
        self.optimizer.count_skipped_steps()
        checkpoint.save(folder, self.chunks, self.optimizer)

    def load(self, folder: Path) -> None:
        """See `Engine.load`."""
        self.optimizer.count_skipped_steps()
        checkpoint.load(folder, self.chunks, self.optimizer)
        self.optimizer.prepare_skipping()

    def load_weights(self, folder: Path) -> None:
        """See `Engine.load_weights`."""
        if checkpoint.is_core_checkpoint(folder):
            checkpoint.load(folder, self.chunks, None)
        else:
            source = find_weights(folder) or folder
            sharded_weights.load_weights(source, self._models, self.config, self.placement)
        self.optimizer.reload_model_params()

    def save_weights(self, folder: Path) -> None:
        """See `Engine.save_weights`."""
        self._gather_parameters()
        sharded_weights.save_weights(folder, self._models, self.config, self.placement)

    @property
    def _models(self) -> list[torch.nn.Module]:
        """This rank's GPTModels, one per virtual stage."""
        return [checkpoint.unwrap(chunk) for chunk in self.chunks]

    def _start_evaluating(self) -> None:
        """Updates the weights and sets the model to evaluation."""
        self._gather_parameters()
        for chunk in self.chunks:
            chunk.eval()

    def _gather_parameters(self) -> None:
        """Updates every data rank's weights, which `overlap_param_gather` defers to the next training forward."""
        if self.chunks[0].ddp_config.overlap_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    def _install_hooks(self) -> None:
        """Sets the functions that core's schedules call to synchronise gradients and parameters."""
        self.core.finalize_model_grads_func = finalize_model_grads
        ddp = self.chunks[0].ddp_config
        if ddp.overlap_grad_reduce:
            self.core.no_sync_func = (
                [c.no_sync for c in self.chunks] if len(self.chunks) > 1 else self.chunks[0].no_sync
            )
            if len(self.chunks) > 1:
                self.core.grad_sync_func = [c.start_grad_sync for c in self.chunks]
        if ddp.overlap_param_gather and len(self.chunks) > 1:
            self.core.param_sync_func = [c.start_param_sync for c in self.chunks]

    def _run_schedule(
        self, batches: Sequence[Batch], routes: Sequence[Route], sums: StepSums, *, forward_only: bool
    ) -> None:
        """Runs core's schedule over the localised microbatches; results are added to `sums`."""

        def forward_step(iterator: Iterator[tuple[Batch, Route]], chunk: torch.nn.Module) -> tuple[Tensor, Callable]:
            batch, route = next(iterator)
            packed = self.microbatches.pack(batch, route)
            sums.packed.append(packed)
            out = chunk(batch.tokens, batch.positions.unsqueeze(0), None, labels=batch.labels, packed_seq_params=packed)
            return out, lambda losses: (
                sums.loss(losses, batch.loss_mask, route.main),
                {},
            )  # called on the last stage only

        iterators = [iter(list(zip(batches, routes, strict=True))) for _ in self.chunks]
        self._schedule(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(batches),
            seq_length=self.context.num_tokens(batches[0]),
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _broadcast_from_last_stage(self, logits: Tensor | None, num_rows: int) -> Tensor:
        """Returns the last stage's logits [num_rows, padded V] on every stage; `logits` is None on the others."""
        pp, device = self.placement.groups.pp, self.placement.device
        if pp.size() == 1:
            assert logits is not None
            return logits
        width = torch.tensor(logits.shape[1] if logits is not None else 0, device=device)
        last = dist.get_global_rank(pp, pp.size() - 1)
        dist.broadcast(width, src=last, group=pp)
        out = logits if logits is not None else torch.empty(num_rows, int(width), device=device)
        dist.broadcast(out, src=last, group=pp)
        return out


def start_user_buffers(config: Config) -> None:
    """Creates Transformer Engine's user buffers: tensor-parallel gathers and scatters are split up and overlap the matrix products that need them.

    The buffers belong to the process and have the shape of one microbatch's hidden states. An engine replaces an earlier engine's buffers before
    its first layer runs. Every rank calls it, after the process groups exist. If the GPUs cannot reach each other's memory, Transformer Engine
    raises and names the setting.
    """
    from transformer_engine.pytorch import UserBufferQuantizationMode, destroy_ub, initialize_ub

    tokens = config.training.micro_batch_size * config.data.sequence_length
    fp8 = config.precision.name is PrecisionName.fp8
    destroy_ub()
    initialize_ub(
        [tokens, config.model.hidden_size],
        config.parallel.tp,
        quantization_modes=[UserBufferQuantizationMode.FP8 if fp8 else UserBufferQuantizationMode.NONE],
        bootstrap_backend="nccl",
    )


def _build_chunks(config: Config, placement: Placement, vocab_size: int) -> list[DistributedDataParallel]:
    """Returns this rank's model chunks (one, or one per virtual stage) under core's data parallelism."""
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.precision.grad_reduce_in_fp32,
        overlap_grad_reduce=config.engine.overlap_grad_reduce,
        overlap_param_gather=config.engine.overlap_param_gather,
        use_distributed_optimizer=config.engine.distributed_optimizer,
    )
    stages = range(config.parallel.vpp) if config.parallel.vpp > 1 else [None]
    chunks = []
    for i, stage in enumerate(stages):
        model: GPTModel | Float16Module = build_model(config, vocab_size, placement.groups, stage).to(placement.device)
        core = model.config
        if config.precision.name is not PrecisionName.fp32:
            model = Float16Module(core, model)
        chunks.append(DistributedDataParallel(config=core, ddp_config=ddp, module=model, disable_bucketing=i > 0))
    for chunk in chunks:  # all chunks share one configuration object, so the schedules' hooks are set once
        chunk.config = chunks[0].config
    return chunks
