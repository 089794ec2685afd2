"""The megatron-core engine: GPTModel under core's DistributedDataParallel, pipeline schedules, optimizers and dist_checkpointing.

How the loss is normalised. A step's total is

    sum of masked cross entropies / labels that count in the global batch  +  alpha * mean over layers of the alignment,

the alignment being a mean over all tokens of the global batch. Core divides a microbatch's loss by the number of microbatches, and its
gradient buffers average over data ranks; so the cross entropy enters as sum * (microbatches * dp / labels), with the labels counted over the
global batch before the forward, and a layer's local alignment enters with scale alpha / (layers * microbatches * tp). Both are then
independent of accumulation, dp, tp and pp. Core does not scale what `attach_loss` adds.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from ssa_kernels import build_layout
from ssa_pretrain.config import Config, Method, PrecisionName
from ssa_pretrain.data.batches import Batch
from ssa_pretrain.engine import common_weights, megatron_checkpoint
from ssa_pretrain.engine.interface import EvaluationResult, StepResult
from ssa_pretrain.model.attention import PackedTokens
from ssa_pretrain.model.llama import build_model
from ssa_pretrain.parallel.routing import main_stream
from ssa_pretrain.parallel.state import Placement
from ssa_pretrain.weights import find_weights


class MegatronEngine:
    """The Llama of one rank under megatron-core."""

    def __init__(self, config: Config, placement: Placement, vocab_size: int) -> None:
        self.config = config
        self.placement = placement
        self.chunks = _build_chunks(config, placement, vocab_size)
        self.core = self.chunks[0].config
        self.optimizer = _build_optimizer(config, self.chunks)
        self._install_hooks()
        self._schedule = get_forward_backward_func()

    def train_step(self, batches: Sequence[Batch], *, step: int, learning_rate: float) -> StepResult:
        """See `Engine.train_step`."""
        batches = [b.to(self.placement.device) for b in batches]
        count, labels = len(batches), self._count_labels(batches)
        streams = [
            main_stream(self.config.attention, seed=self.config.seed, step=step, microbatch=b.index) for b in batches
        ]
        both = self.config.attention.method is Method.ssa
        scale = (
            self.config.attention.alignment_weight / (self.config.model.num_layers * count * self.config.parallel.tp)
            if both
            else 0.0
        )
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        run = _Run(count * self.placement.dp / labels)
        self._forward_backward(batches, streams, run, counterpart=both, alignment_scale=scale, forward_only=False)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
            group["weight_decay"] = self.config.optim.weight_decay * group.get("wd_mult", 1.0)
        _, grad_norm, _ = self.optimizer.step()
        full = [float(s == "full") for s in streams]
        sums = self._reduce(run, [sum(full), float(count)])
        return StepResult(
            cross_entropy=sums.loss / float(labels),
            alignment_by_layer=sums.alignment,
            captured_mass_by_layer=sums.mass,
            grad_norm=float(grad_norm),
            full_share=sums.extra[0] / sums.extra[1],
        )

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], *, mode: str) -> EvaluationResult:
        """See `Engine.evaluate`."""
        batches = [b.to(self.placement.device) for b in batches]
        labels = self._count_labels(batches)
        self._gather_parameters()
        for chunk in self.chunks:
            chunk.eval()
        run = _Run(1.0)
        if batches:
            self._forward_backward(
                batches, [mode] * len(batches), run, counterpart=True, alignment_scale=0.0, forward_only=True
            )
        sums = self._reduce(run, [])
        return EvaluationResult(sums.loss / float(labels), sums.alignment, sums.mass, int(labels))

    @torch.no_grad()
    def last_logits(self, batch: Batch, *, mode: str) -> Tensor:
        """See `Engine.last_logits`."""
        self._gather_parameters()
        for chunk in self.chunks:
            chunk.eval()
        batch = batch.to(self.placement.device)
        ends = batch.cu_seqlens[1:].long() - 1

        def forward_step(iterator: Iterator[Batch], chunk: torch.nn.Module):
            packed = self._packed(next(iterator), mode, counterpart=False, alignment_scale=0.0)
            out = chunk(
                batch.tokens, batch.positions.unsqueeze(0), None, packed_seq_params=packed, runtime_gather_output=True
            )
            return out, lambda logits, non_loss_data: logits[0, ends].float()

        count = self.config.parallel.pp if len(self.chunks) > 1 else 1  # interleaving wants whole rounds of the stages
        outputs = self._schedule(
            forward_step_func=forward_step,
            data_iterator=[iter([batch] * count) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=count,
            seq_length=batch.tokens.shape[1],
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
        return self._from_last_stage(outputs[0] if outputs else None, len(ends))

    def save(self, folder: Path) -> None:
        """See `Engine.save`."""
        self._gather_parameters()
        megatron_checkpoint.save(folder, self.chunks, self.optimizer)

    def load(self, folder: Path) -> None:
        """See `Engine.load`."""
        megatron_checkpoint.load(folder, self.chunks, self.optimizer)

    def load_weights(self, folder: Path) -> None:
        """See `Engine.load_weights`."""
        if megatron_checkpoint.wrote(folder):
            megatron_checkpoint.load(folder, self.chunks, None)
        else:
            models = [megatron_checkpoint.unwrap(chunk) for chunk in self.chunks]
            common_weights.load_weights(find_weights(folder) or folder, models, self.config, self.placement)
        self.optimizer.reload_model_params()

    def save_weights(self, folder: Path) -> None:
        """See `Engine.save_weights`."""
        self._gather_parameters()
        models = [megatron_checkpoint.unwrap(chunk) for chunk in self.chunks]
        common_weights.save_weights(folder, models, self.config, self.placement)

    def _gather_parameters(self) -> None:
        """Bring every data rank's weights up to date, which `overlap_param_gather` leaves to the next training forward."""
        if self.chunks[0].ddp_config.overlap_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    def _install_hooks(self) -> None:
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

    def _count_labels(self, batches: Sequence[Batch]) -> Tensor:
        """Return the labels that count in the global batch."""
        total = torch.zeros((), dtype=torch.float64, device=self.placement.device)
        for batch in batches:
            total += batch.loss_mask.sum(dtype=torch.float64)
        dist.all_reduce(total, group=self.placement.groups.dp_cp)
        return total

    def _packed(self, batch: Batch, main: str, *, counterpart: bool, alignment_scale: float) -> PackedTokens:
        length = self.config.data.sequence_length
        layout = build_layout(
            batch.cu_seqlens,
            num_tokens=len(batch.positions),
            block_size=self.config.attention.block_size,
            max_length=length,
        )
        return PackedTokens(
            qkv_format="thd",
            cu_seqlens_q=batch.cu_seqlens,
            cu_seqlens_kv=batch.cu_seqlens,
            max_seqlen_q=length,
            max_seqlen_kv=length,
            positions=batch.positions,
            documents=layout,
            num_rows=batch.num_rows,
            main=main,
            counterpart=counterpart,
            alignment_scale=alignment_scale,
        )

    def _forward_backward(
        self,
        batches: Sequence[Batch],
        streams: Sequence[str],
        run: "_Run",
        *,
        counterpart: bool,
        alignment_scale: float,
        forward_only: bool,
    ) -> None:
        """Run core's schedule over the microbatches; what it finds goes into `run`."""

        def forward_step(iterator: Iterator[tuple[Batch, str]], chunk: torch.nn.Module):
            batch, main = next(iterator)
            packed = self._packed(batch, main, counterpart=counterpart, alignment_scale=alignment_scale)
            run.packed.append(packed)
            out = chunk(batch.tokens, batch.positions.unsqueeze(0), None, labels=batch.labels, packed_seq_params=packed)
            return out, lambda losses: run.loss(losses, batch.loss_mask)

        iterators = [iter(list(zip(batches, streams, strict=True))) for _ in self.chunks]
        self._schedule(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.shape[1],
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _reduce(self, run: "_Run", extra: list[float]) -> "_Sums":
        """Return the step's sums and layer means over all ranks: tensor ranks average, stages and data ranks add up."""
        layers = self.config.model.num_layers
        vector = torch.zeros(3 * layers + 1 + len(extra), dtype=torch.float64, device=self.placement.device)
        for packed in run.packed:
            for number, seen in packed.diagnostics.items():
                vector[number - 1] += seen.alignment_loss
                vector[layers + number - 1] += seen.captured_mass
                vector[2 * layers + number - 1] += 1
        vector[3 * layers] = sum((s.double() for s in run.sums), start=vector.new_zeros(()))
        vector[3 * layers + 1 :] = torch.tensor(extra, dtype=torch.float64)
        dist.all_reduce(vector)
        vector /= self.config.parallel.tp
        values = vector.tolist()
        counts = values[2 * layers : 3 * layers]
        seen = all(counts)
        return _Sums(
            loss=values[3 * layers],
            alignment=[v / n for v, n in zip(values[:layers], counts, strict=True)] if seen else [],
            mass=[v / n for v, n in zip(values[layers : 2 * layers], counts, strict=True)] if seen else [],
            extra=values[3 * layers + 1 :],
        )

    def _from_last_stage(self, logits: Tensor | None, rows: int) -> Tensor:
        pp = self.placement.groups.pp
        if pp.size() == 1:
            return logits
        width = torch.tensor(logits.shape[1] if logits is not None else 0, device=self.placement.device)
        last = dist.get_global_rank(pp, pp.size() - 1)
        dist.broadcast(width, src=last, group=pp)
        out = logits if logits is not None else torch.empty(rows, int(width), device=self.placement.device)
        dist.broadcast(out, src=last, group=pp)
        return out


class _Run:
    """What one pass over the microbatches leaves behind."""

    def __init__(self, scale: float | Tensor) -> None:
        self.scale = scale
        self.packed: list[PackedTokens] = []
        self.sums: list[Tensor] = []

    def loss(self, losses: Tensor, mask: Tensor) -> tuple[Tensor, dict]:
        """Return a microbatch's loss as core's schedules want it; called on the last stage alone."""
        total = (losses.float() * mask).sum()
        self.sums.append(total.detach())
        return total * self.scale, {}


class _Sums:
    """Reduced over all ranks."""

    __slots__ = ("alignment", "extra", "loss", "mass")

    def __init__(self, loss: float, alignment: list[float], mass: list[float], extra: list[float]) -> None:
        self.loss, self.alignment, self.mass, self.extra = loss, alignment, mass, extra


def _build_chunks(config: Config, placement: Placement, vocab_size: int) -> list[DistributedDataParallel]:
    """Return this rank's model chunks (one, or one a virtual stage) under core's data parallelism."""
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
    for chunk in chunks:  # one configuration object, so that the schedules' hooks are set once
        chunk.config = chunks[0].config
    return chunks


def _build_optimizer(config: Config, chunks: list[DistributedDataParallel]):
    low = config.precision.name is not PrecisionName.fp32
    optim = config.optim
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            min_lr=optim.min_lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            adam_eps=optim.eps,
            clip_grad=optim.clip_grad,
            bf16=low,
            params_dtype=torch.bfloat16 if low else torch.float32,
            use_distributed_optimizer=config.engine.distributed_optimizer,
            overlap_param_gather=config.engine.overlap_param_gather,
        ),
        chunks,
    )
