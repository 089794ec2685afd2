"""The code that both engines share around a library's forward and backward: microbatches, normalisation of the loss, reduction of the results.

How the loss is normalised. A step's total is

    sum of masked cross entropies / labels that count in the global batch  +  alpha * mean over layers of the alignment,

where the alignment is a mean over all tokens of the global batch except padding. megatron-core and DeepSpeed both divide a microbatch's loss by
the number of microbatches and average gradients over data ranks. So the cross entropy enters as sum * (microbatches * dp / labels), with the
labels counted over the global batch before the forward, and a layer's local alignment enters with scale
alpha / (layers * microbatches * tp). Both terms are then independent of accumulation, dp, tp and pp. Neither library scales what `attach_loss`
adds.

Padding (data/batches.py) has alignment 0 and captured mass 1. A mean without padding is therefore the mean with padding times `dilution`, the
number of all tokens of the global batch over those that are not padding; the same holds for the mass that is not captured. Without padding the
dilution is 1 and changes no bit.

Under context parallelism (parallel/context.py) a rank has 1 / cp of each microbatch's tokens. Core then averages gradients over dp * cp ranks and
multiplies the loss by cp, but not what `attach_loss` adds. The cross entropy's scale stays the same. So does the alignment's: its local mean is
over 1 / cp of the tokens, and the average over ranks makes it the mean over all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ssa_kernels import build_layout, sample_queries
from ssa_pretrain.config import Config
from ssa_pretrain.data.batches import Batch
from ssa_pretrain.engine.interface import EvaluationResult, PendingStep, StepResult
from ssa_pretrain.model.attention import PackedTokens
from ssa_pretrain.parallel.context import ContextParallel
from ssa_pretrain.parallel.state import Placement
from ssa_pretrain.schedule import counterpart_factor, counterpart_spans, main_stream


@dataclass(frozen=True, slots=True)
class Route:
    """The streams that a microbatch computes.

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


@dataclass(frozen=True, slots=True)
class Counts:
    """Counts over the global batch, float64 scalars on the device.

    Attributes:
        labels: labels that count.
        tokens: tokens other than padding.
        dilution: all tokens over those.
    """

    labels: Tensor
    tokens: Tensor
    dilution: Tensor


@dataclass(slots=True)
class StepSums:
    """The sums and packings of one pass over this rank's microbatches.

    Attributes:
        counts: of the global batch.
        loss_scale: factor of a microbatch's sum of cross entropies in its loss.
        packed: every microbatch's packing, with its layers' diagnostics.
        cross_entropies: every microbatch's sum; on the last stage only.
    """

    counts: Counts
    loss_scale: float | Tensor = 1.0
    packed: list[PackedTokens] = field(default_factory=list)
    cross_entropies: list[Tensor] = field(default_factory=list)

    def loss(self, losses: Tensor, mask: Tensor) -> Tensor:
        """Returns a microbatch's loss from its tokens' cross entropies, and keeps their sum."""
        total = (losses.float() * mask).sum()
        self.cross_entropies.append(total.detach())
        return total * self.loss_scale


@dataclass(frozen=True, slots=True)
class _Means:
    """The reduced results by name; layers are empty if no microbatch computed both streams."""

    cross_entropy_sum: float
    alignment_by_layer: list[float]
    captured_mass_by_layer: list[float]
    full_share: float


@dataclass(frozen=True, slots=True)
class Microbatches:
    """An engine's microbatches on this rank: from batches to the model's inputs, and from the model's diagnostics to results."""

    config: Config
    placement: Placement
    context: ContextParallel

    def localise(self, batches: Sequence[Batch]) -> list[Batch]:
        """Returns this context rank's part of each microbatch, on the device."""
        return [self.context.split(b).to(self.placement.device) for b in batches]

    def count(self, batches: Sequence[Batch]) -> Counts:
        """Returns the counts over the global batch; every rank calls it with its localised microbatches."""
        total = torch.zeros(3, dtype=torch.float64, device=self.placement.device)
        for batch in batches:
            total[0] += batch.loss_mask.sum(dtype=torch.float64)
        tokens = sum(self.context.num_tokens(batch) for batch in batches)
        total[1].fill_((tokens - sum(batch.num_padding for batch in batches)) / self.context.size)
        total[2].fill_(tokens / self.context.size)  # every context rank counts whole microbatches
        dist.all_reduce(total, group=self.placement.groups.dp_cp)
        labels, tokens_without_padding, all_tokens = total
        return Counts(labels, tokens_without_padding, all_tokens / tokens_without_padding)

    def training_sums(self, batches: Sequence[Batch]) -> StepSums:
        """Returns empty sums for a training step, whose loss is normalised over the global batch."""
        counts = self.count(batches)
        return StepSums(counts, len(batches) * self.placement.dp / counts.labels)

    def routes(self, batches: Sequence[Batch], step: int, dilution: Tensor) -> list[Route]:
        """Returns the route of each of this rank's microbatches in a training step."""
        attention, data = self.config.attention, self.config.data
        rows = self.config.training.micro_batch_size
        tokens = rows * data.sequence_length
        scale = attention.alignment_weight / (self.config.model.num_layers * len(batches) * self.config.parallel.tp)
        routes = []
        for batch in batches:
            draw = {"seed": self.config.seed, "step": step, "microbatch": batch.index}
            main = main_stream(attention, **draw)
            spans = counterpart_spans(attention, **draw, rows=rows, row_length=data.sequence_length)
            if not spans:
                routes.append(Route(main))
                continue
            factor = counterpart_factor(attention, rows=rows)
            spans = None if spans == [(0, tokens)] else spans
            routes.append(Route(main, True, spans, (scale * factor * dilution).float()))
        return routes

    def pack(self, batch: Batch, route: Route) -> PackedTokens:
        """Returns a localised microbatch's packing for the layers."""
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
            sample=sample_queries(layout, route.spans) if route.spans else None,
            alignment_scale=route.alignment_scale,
        )

    def step_result(self, sums: StepSums, grad_norm: Tensor) -> PendingStep:
        """Returns a training step's results, reduced over all ranks; every rank calls it."""
        labels = sums.counts.labels
        values = torch.cat([self._reduce(sums), torch.stack([labels, grad_norm.to(labels)])])

        def interpret(values: list[float]) -> StepResult:
            means = self._means(values)
            return StepResult(
                cross_entropy=means.cross_entropy_sum / values[-2],
                alignment_by_layer=means.alignment_by_layer,
                captured_mass_by_layer=means.captured_mass_by_layer,
                grad_norm=values[-1],
                full_share=means.full_share,
            )

        return PendingStep(values, interpret)

    def evaluation_result(self, sums: StepSums) -> EvaluationResult:
        """Returns an evaluation's results, reduced over all ranks; every rank calls it."""
        means = self._means(self._reduce(sums).tolist())
        labels, tokens = float(sums.counts.labels), int(sums.counts.tokens)
        cross_entropy = means.cross_entropy_sum / max(1.0, labels)
        return EvaluationResult(
            cross_entropy, means.alignment_by_layer, means.captured_mass_by_layer, int(labels), tokens
        )

    def _reduce(self, sums: StepSums) -> Tensor:
        """Returns the sums over all ranks, on the device: tensor ranks are averaged, stages and data ranks added.

        By layer: the alignments, the captured masses, and the number of microbatches that have them. Then the cross entropies, the number of
        microbatches whose main stream was full, and the number of all microbatches.
        """
        num_layers, packed, dilution = self.config.model.num_layers, sums.packed, sums.counts.dilution
        vector = torch.zeros(3 * num_layers + 3, dtype=torch.float64, device=self.placement.device)
        for number in sorted({n for p in packed for n in p.diagnostics}):
            seen = [p.diagnostics[number] for p in packed if number in p.diagnostics]
            alignment = torch.stack([s.alignment_loss for s in seen]).double().sum()
            mass = torch.stack([s.captured_mass for s in seen]).double().sum()
            vector[number - 1] = alignment * dilution
            vector[num_layers + number - 1] = mass * dilution + len(seen) * (1.0 - dilution)
            vector[2 * num_layers + number - 1].fill_(len(seen))  # an assignment would copy from the host and wait
        if sums.cross_entropies:
            vector[3 * num_layers] = torch.stack(sums.cross_entropies).double().sum()
        vector[3 * num_layers + 1].fill_(sum(p.main == "full" for p in packed))
        vector[3 * num_layers + 2].fill_(len(packed))
        dist.all_reduce(vector)
        return vector / self.config.parallel.tp

    def _means(self, values: list[float]) -> _Means:
        """Returns the values of `_reduce` by name."""
        n = self.config.model.num_layers
        alignments, masses, counts = values[:n], values[n : 2 * n], values[2 * n : 3 * n]
        seen = all(counts)
        return _Means(
            cross_entropy_sum=values[3 * n],
            alignment_by_layer=[v / c for v, c in zip(alignments, counts, strict=True)] if seen else [],
            captured_mass_by_layer=[v / c for v, c in zip(masses, counts, strict=True)] if seen else [],
            full_share=values[3 * n + 1] / values[3 * n + 2],
        )
