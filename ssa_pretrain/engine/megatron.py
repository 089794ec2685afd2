"""The megatron-core engine: GPTModel under core's DistributedDataParallel, pipeline schedules, optimizers and dist_checkpointing.

How the loss is normalised. A step's total is

    sum of masked cross entropies / labels that count in the global batch  +  alpha * mean over layers of the alignment,

the alignment being a mean over all tokens of the global batch but its padding. Core divides a microbatch's loss by the number of microbatches, and its
gradient buffers average over data ranks; so the cross entropy enters as sum * (microbatches * dp / labels), with the labels counted over the
global batch before the forward, and a layer's local alignment enters with scale alpha / (layers * microbatches * tp). Both are then
independent of accumulation, dp, tp and pp. Core does not scale what `attach_loss` adds.

Padding (data/batches.py) has alignment 0 and captured mass 1, so a mean without it is the mean with it times `dilution`, all tokens of the global
batch over those that are no padding, and likewise for the mass that is not captured. Without padding the dilution is 1 and changes no bit.

Under context parallelism (parallel/context.py) a rank has 1 / cp of each microbatch's tokens. Core then averages gradients over dp * cp ranks and
multiplies the loss, not what `attach_loss` adds, by cp. So the cross entropy's scale stays as it is, and so does the alignment's: its local
mean is over 1 / cp of the tokens, and the average over ranks makes it the mean over all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from ssa_kernels import build_layout, query_spans
from ssa_pretrain.config import Config, PrecisionName
from ssa_pretrain.data.batches import Batch
from ssa_pretrain.engine import common_weights, megatron_checkpoint
from ssa_pretrain.engine.interface import EvaluationResult, StepResult
from ssa_pretrain.engine.optimizer import build_optimizer
from ssa_pretrain.engine.pending import PendingStep
from ssa_pretrain.engine.user_buffers import start_user_buffers
from ssa_pretrain.model.attention import PackedTokens
from ssa_pretrain.model.llama import build_model
from ssa_pretrain.monitor.profiling import OPTIMIZER_RANGE
from ssa_pretrain.parallel.context import ContextParallel
from ssa_pretrain.parallel.routing import counterpart_factor, counterpart_spans, main_stream
from ssa_pretrain.parallel.state import Placement
from ssa_pretrain.weights import find_weights


class MegatronEngine:
    """The Llama of one rank under megatron-core."""

    def __init__(self, config: Config, placement: Placement, vocab_size: int) -> None:
        self.config = config
        self.placement = placement
        if config.engine.overlap_tp:
            start_user_buffers(config)
        self.context = ContextParallel(placement.groups.cp)
        self.chunks = _build_chunks(config, placement, vocab_size)
        self.core = self.chunks[0].config
        self.optimizer = build_optimizer(config, self.chunks)
        self._install_hooks()
        self._schedule = get_forward_backward_func()

    def train_step(self, batches: Sequence[Batch], *, step: int, learning_rate: float) -> PendingStep:
        """See `Engine.train_step`; on a GPU the step is queued when this returns, and reading its result waits for it."""
        run, labels = self.forward_backward(batches, step=step)
        norm = self.update(learning_rate)
        figures = torch.cat([self._reduce(run), torch.stack([labels, norm.double()])])

        def interpret(values: list[float]) -> StepResult:
            sums = self._sums(values)
            return StepResult(
                cross_entropy=sums.loss / values[-2],
                alignment_by_layer=sums.alignment,
                captured_mass_by_layer=sums.mass,
                grad_norm=values[-1],
                full_share=sums.full_share,
            )

        return PendingStep(figures, interpret)

    def forward_backward(self, batches: Sequence[Batch], *, step: int) -> tuple["_Run", Tensor]:
        """Leave the global batch's gradients in their buffers; return what the passes found and the labels that count, on the device."""
        batches = self._local(batches)
        count, (labels, _, dilution) = len(batches), self._count(batches)
        routes = self._routes(batches, step, dilution)
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        run = _Run(count * self.placement.dp / labels, dilution)
        self._forward_backward(batches, routes, run, forward_only=False)
        return run, labels

    def update(self, learning_rate: float) -> Tensor:
        """Take the optimizer's step over the gradients in the buffers; return their norm before clipping, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
            group["weight_decay"] = self.config.optim.weight_decay * group.get("wd_mult", 1.0)
        with torch.profiler.record_function(OPTIMIZER_RANGE):
            _, norm, _ = self.optimizer.step()
        return norm

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], *, mode: str) -> EvaluationResult:
        """See `Engine.evaluate`."""
        batches = self._local(batches)
        labels, tokens, dilution = self._count(batches)
        self._gather_parameters()
        for chunk in self.chunks:
            chunk.eval()
        run = _Run(1.0, dilution)
        if batches:
            self._forward_backward(batches, [Route(mode, counterpart=True)] * len(batches), run, forward_only=True)
        sums = self._sums(self._reduce(run).tolist())
        cross_entropy = sums.loss / max(1.0, float(labels))
        return EvaluationResult(cross_entropy, sums.alignment, sums.mass, int(labels), int(tokens))

    @torch.no_grad()
    def last_logits(self, batch: Batch, *, mode: str) -> Tensor:
        """See `Engine.last_logits`."""
        self._gather_parameters()
        for chunk in self.chunks:
            chunk.eval()
        (batch,) = self._local([batch])
        ends = batch.cu_seqlens[1:].long() - 1

        def forward_step(iterator: Iterator[Batch], chunk: torch.nn.Module):
            packed = self._packed(next(iterator), Route(mode))
            out = chunk(
                batch.tokens, batch.positions.unsqueeze(0), None, packed_seq_params=packed, runtime_gather_output=True
            )
            tokens = self.context.num_tokens(batch)
            return out, lambda logits, non_loss_data: self.context.rows_at(logits[0], ends, tokens).float()

        count = self.config.parallel.pp if len(self.chunks) > 1 else 1  # interleaving wants whole rounds of the stages
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

    def _local(self, batches: Sequence[Batch]) -> list[Batch]:
        """Return this context rank's part of each microbatch, on the device."""
        return [self.context.split(b).to(self.placement.device) for b in batches]

    def _count(self, batches: Sequence[Batch]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the global batch's labels that count, its tokens that are no padding, and all its tokens over those, on the device."""
        total = torch.zeros(3, dtype=torch.float64, device=self.placement.device)
        for batch in batches:
            total[0] += batch.loss_mask.sum(dtype=torch.float64)
        tokens = sum(self.context.num_tokens(batch) for batch in batches)
        total[1].fill_((tokens - sum(batch.num_padding for batch in batches)) / self.context.size)
        total[2].fill_(tokens / self.context.size)  # every context rank counts whole microbatches
        dist.all_reduce(total, group=self.placement.groups.dp_cp)
        labels, real, every = total
        return labels, real, every / real

    def _routes(self, batches: Sequence[Batch], step: int, dilution: Tensor) -> list["Route"]:
        """Return what each of this rank's microbatches computes in a training step."""
        attention, seed, data = self.config.attention, self.config.seed, self.config.data
        rows = self.config.training.micro_batch_size
        tokens = rows * data.sequence_length
        scale = attention.alignment_weight / (self.config.model.num_layers * len(batches) * self.config.parallel.tp)
        routes = []
        for batch in batches:
            draw = {"seed": seed, "step": step, "microbatch": batch.index}
            main = main_stream(attention, **draw)
            spans = counterpart_spans(attention, **draw, rows=rows, row_length=data.sequence_length)
            if not spans:
                routes.append(Route(main))
                continue
            factor = counterpart_factor(attention, rows=rows)
            spans = None if spans == [(0, tokens)] else spans
            routes.append(Route(main, True, spans, (scale * factor * dilution).float()))
        return routes

    def _packed(self, batch: Batch, route: "Route") -> PackedTokens:
        length = self.config.data.sequence_length
        layout = build_layout(
            batch.cu_seqlens,
            num_tokens=self.context.num_tokens(batch),
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
            documents=self.context.queries(layout),
            gather=self.context.gather if self.context.size > 1 else None,
            num_rows=batch.num_rows,
            main=route.main,
            counterpart=route.counterpart,
            sample=query_spans(layout, route.spans) if route.spans else None,
            alignment_scale=route.alignment_scale,
        )

    def _forward_backward(
        self,
        batches: Sequence[Batch],
        routes: Sequence["Route"],
        run: "_Run",
        *,
        forward_only: bool,
    ) -> None:
        """Run core's schedule over the microbatches; what it finds goes into `run`."""

        def forward_step(iterator: Iterator[tuple[Batch, Route]], chunk: torch.nn.Module):
            batch, route = next(iterator)
            packed = self._packed(batch, route)
            run.packed.append(packed)
            out = chunk(batch.tokens, batch.positions.unsqueeze(0), None, labels=batch.labels, packed_seq_params=packed)
            return out, lambda losses: run.loss(losses, batch.loss_mask)

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

    def _reduce(self, run: "_Run") -> Tensor:
        """Return the sums over all ranks, on the device: tensor ranks average, stages and data ranks add up.

        By layer the alignments, the captured masses and how many microbatches gave them; then the cross entropies, the microbatches whose main
        stream was full, and all microbatches.
        """
        layers = self.config.model.num_layers
        vector = torch.zeros(3 * layers + 3, dtype=torch.float64, device=self.placement.device)
        for number in sorted({n for packed in run.packed for n in packed.diagnostics}):
            seen = [packed.diagnostics[number] for packed in run.packed if number in packed.diagnostics]
            alignment = torch.stack([s.alignment_loss for s in seen]).double().sum()
            mass = torch.stack([s.captured_mass for s in seen]).double().sum()
            vector[number - 1] = alignment * run.dilution
            vector[layers + number - 1] = mass * run.dilution + len(seen) * (1.0 - run.dilution)
            vector[2 * layers + number - 1].fill_(len(seen))  # an assignment would copy from the host and wait
        if run.sums:
            vector[3 * layers] = torch.stack(run.sums).double().sum()
        vector[3 * layers + 1].fill_(sum(packed.main == "full" for packed in run.packed))
        vector[3 * layers + 2].fill_(len(run.packed))
        dist.all_reduce(vector)
        return vector / self.config.parallel.tp

    def _sums(self, values: list[float]) -> "_Sums":
        """Return what `_reduce` gave, by name."""
        layers = self.config.model.num_layers
        counts = values[2 * layers : 3 * layers]
        seen = all(counts)
        return _Sums(
            loss=values[3 * layers],
            alignment=[v / n for v, n in zip(values[:layers], counts, strict=True)] if seen else [],
            mass=[v / n for v, n in zip(values[layers : 2 * layers], counts, strict=True)] if seen else [],
            full_share=values[3 * layers + 1] / values[3 * layers + 2],
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


@dataclass(frozen=True, slots=True)
class Route:
    """What a microbatch computes.

    Attributes:
        main: the stream that becomes the layers' output, "full" or "sparse".
        counterpart: whether the other stream is computed too.
        spans: (first, length) of the queries that compute it; None: all.
        alignment_scale: d(total loss) / d(one layer's local alignment), on the device; None: no gradient.
    """

    main: str
    counterpart: bool = False
    spans: list[tuple[int, int]] | None = None
    alignment_scale: Tensor | None = None


class _Run:
    """What one pass over the microbatches leaves behind.

    Args:
        scale: of a microbatch's sum of cross entropies in its loss.
        dilution: all tokens of the global batch over those that are no padding.
    """

    def __init__(self, scale: float | Tensor, dilution: float | Tensor = 1.0) -> None:
        self.scale, self.dilution = scale, dilution
        self.packed: list[PackedTokens] = []
        self.sums: list[Tensor] = []

    def loss(self, losses: Tensor, mask: Tensor) -> tuple[Tensor, dict]:
        """Return a microbatch's loss as core's schedules want it; called on the last stage alone."""
        total = (losses.float() * mask).sum()
        self.sums.append(total.detach())
        return total * self.scale, {}


@dataclass(frozen=True, slots=True)
class _Sums:
    """Reduced over all ranks."""

    loss: float
    alignment: list[float]
    mass: list[float]
    full_share: float


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
