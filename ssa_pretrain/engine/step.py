"""The code that both engines share around a library's forward and backward: microbatches, normalisation of the loss, reduction of the results.

How the loss is normalised. A step's total is

    sum of masked cross entropies and z-losses / labels that count in the global batch  +  alpha * mean over layers of the alignment,

where the alignment is a mean over all tokens of the global batch except padding. With counterpart_share below 1 it is estimated: each query of a
microbatch is drawn with probability r (schedule.py; r depends on the main stream), and the sum over the drawn queries divided by r has the sum over
all queries as its expectation (Horvitz-Thompson, docs/counterpart.md). This is exact for any batch: the divisor is r times the number of tokens, not
the number of drawn queries, and a step that draws none has no alignment gradient.

megatron-core and DeepSpeed both divide a microbatch's loss by the number of microbatches and average gradients over data ranks. So the cross entropy
enters as sum * (microbatches * dp / labels), with the labels counted over the global batch before the forward. Under context parallelism
(parallel/context.py) a rank has 1 / cp of each microbatch's tokens. Core then averages gradients over dp * cp ranks and multiplies the loss by cp,
but not what `attach_loss` adds, and neither library scales that otherwise. A layer's local alignment is the mean over the N_c queries that this rank
computes, and a tensor rank's mean over its heads. So it enters with scale

    alpha * dp * cp * N_c / (layers * tp * r * tokens).

The index loss of a trained scorer (model/indexer.py) is a mean over the same queries, and enters with the same scale, its own weight for alpha.

Both terms are then independent of accumulation, dp, cp, tp and pp.

Padding (data/batches.py) and queries that the chosen blocks cover (counterpart.py) have alignment 0 and captured mass 1, whether they are computed
or not. The results are means over the drawn queries except padding, in which a query counts for 1 / r.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssa_kernels import DocumentLayout, build_layout, sample_queries
from ssa_pretrain.config import Config, Method, Score
from ssa_pretrain.data.batches import Batch
from ssa_pretrain.data.spans import Span, total
from ssa_pretrain.engine.counterpart import CounterpartQueries, counterpart_queries
from ssa_pretrain.engine.interface import EvaluationResult, PendingStep, StepResult
from ssa_pretrain.engine.own_time import OwnTime
from ssa_pretrain.engine.part_sums import PartSums
from ssa_pretrain.engine.step_sums import Counts, StepSums
from ssa_pretrain.model.attention import PackedTokens
from ssa_pretrain.model.text_cache import TextCache
from ssa_pretrain.parallel.context import ContextParallel
from ssa_pretrain.parallel.state import Placement
from ssa_pretrain.schedule import Place, counterpart_spans, main_stream, share_drawn

NOT_COMPARED = -1.0


@dataclass(frozen=True, slots=True)
class Route:
    """The streams that a microbatch computes on this rank.

    Attributes:
        main: the stream that becomes the layers' output, "full" or "sparse".
        counterpart: whether the other stream is computed too.
        spans: (first, length) of the queries that compute it, among this rank's; None: all.
        weight: what a drawn query counts for in the means.
        alignment_scale: d(total loss) / d(one layer's local alignment), on the device; None: no gradient.
        index_scale: the same of one layer's local index loss; None: it is not computed.
        observe: receives each layer's queries, keys and values, with `mask_T` of the queries whose label counts; None: nobody does.
        keep: receives each layer's keys and values of the first documents; None: nobody does.
    """

    main: str
    counterpart: bool = False
    spans: list[Span] | None = None
    weight: float = 1.0
    alignment_scale: Tensor | None = None
    index_scale: Tensor | None = None
    observe: Callable[..., None] | None = None
    keep: TextCache | None = None


@dataclass(frozen=True, slots=True)
class _Means:
    """The reduced results by name; layers are empty if no query was drawn."""

    cross_entropy_sum: float
    alignment_by_layer: list[float]
    captured_mass_by_layer: list[float]
    index_loss_by_layer: list[float]
    full_share: float
    full_sum: float
    full_labels: float
    z_sum: float

    def cross_entropy_by_stream(self, labels: float) -> dict[str, float]:
        """Returns the mean cross entropy of the microbatches of each main stream; `labels` are those of all of them."""
        sums = {
            "full": (self.full_sum, self.full_labels),
            "sparse": (self.cross_entropy_sum - self.full_sum, labels - self.full_labels),
        }
        return {stream: total / count for stream, (total, count) in sums.items() if count > 0}


@dataclass(frozen=True, slots=True)
class Microbatches:
    """An engine's microbatches on this rank: from batches to the model's inputs, and from the model's diagnostics to results."""

    config: Config
    placement: Placement
    context: ContextParallel
    own_time: OwnTime = field(default_factory=OwnTime)

    def localise(self, batches: Sequence[Batch]) -> list[Batch]:
        """Returns this context rank's part of each microbatch, on the device."""
        return [self.context.split(b).to(self.placement.device) for b in batches]

    def count(self, batches: Sequence[Batch], drawn: float | None = None) -> Counts:
        """Returns the counts over the global batch; every rank calls it.

        Args:
            batches: this rank's, localised.
            drawn: drawn queries of these whole microbatches, except padding, by weight; None: all, with weight 1.
        """
        total = torch.zeros(3, dtype=torch.float64, device=self.placement.device)
        for batch in batches:
            total[0] += batch.loss_mask.sum(dtype=torch.float64)
        tokens = sum(self.context.num_tokens(batch) - batch.num_padding for batch in batches)
        total[1].fill_(tokens / self.context.size)  # every context rank counts whole microbatches
        total[2].fill_((tokens if drawn is None else drawn) / self.context.size)
        dist.all_reduce(total, group=self.placement.groups.dp_cp)
        return Counts(*total)

    def begin_step(self, batches: Sequence[Batch], step: int) -> tuple[list[Batch], list[Route], StepSums]:
        """Returns a training step's localised microbatches, their routes, and empty sums; every rank calls it.

        Args:
            batches: this data rank's microbatches, whole.
            step: the optimizer step, from 0.
        """
        attention, length = self.config.attention, self.config.data.sequence_length
        common = {"seed": self.config.seed, "step": step, "num_microbatches": len(batches) * self.placement.dp}
        drawn = []
        for batch in batches:
            place = Place(**common, microbatch=batch.index)
            spans = counterpart_spans(attention, place, rows=len(batch.positions) // length, row_length=length)
            main = main_stream(attention, place)
            drawn.append((main, share_drawn(attention, main), counterpart_queries(attention, batch, spans)))
        localised = self.localise(batches)
        counts = self.count(
            localised, sum(queries.num_drawn / share for _, share, queries in drawn if queries.num_drawn)
        )
        self.own_time.begin(self.placement.device)  # the count has brought all ranks together
        routes = [self._route(*each, batch, counts.tokens) for each, batch in zip(drawn, localised, strict=True)]
        scale, parts = common["num_microbatches"] / counts.labels, PartSums(batches[0].num_parts)
        return localised, routes, StepSums(counts, scale, parts=parts)

    def _route(self, main: str, share: float, queries: CounterpartQueries, batch: Batch, tokens: Tensor) -> Route:
        """Returns the route of a localised microbatch in a training step over `tokens` tokens; `share` is its queries' probability to be drawn."""
        spans, computed = None, len(batch.positions)
        if queries.spans is not None:
            spans = self.context.own_spans(queries.spans, self.context.num_tokens(batch))
            computed = total(spans)
        if computed == 0:
            return Route(main)
        attention = self.config.attention
        weights = {"alignment_scale": attention.alignment_weight}
        if attention.score is Score.indexer:
            weights["index_scale"] = attention.indexer.loss_weight
        scales = {}
        for name, weight in weights.items():
            scale = weight * self.placement.dp * self.context.size * computed
            scale /= self.config.model.num_layers * self.config.parallel.tp * share
            scales[name] = (scale / tokens).float()
        return Route(main, True, spans, 1.0 / share, **scales)

    def pack(self, batch: Batch, route: Route) -> PackedTokens:
        """Returns a localised microbatch's packing for the layers."""
        layout = build_layout(
            batch.cu_seqlens,
            num_tokens=self.context.num_tokens(batch),
            block_size=self.config.attention.block_size,
            max_length=self.config.data.sequence_length,
        )
        documents = self.context.queries(layout)
        return self._packed(
            batch,
            documents,
            key_positions=layout.query_position if self.context.size > 1 else None,
            gather=self.context.gather if self.context.size > 1 else None,
            num_rows=batch.num_rows,
            main=route.main,
            counterpart=route.counterpart,
            sample=sample_queries(documents, route.spans) if route.spans else None,
            weight=route.weight,
            alignment_scale=route.alignment_scale,
            index_scale=route.index_scale,
            observe=partial(route.observe, mask_T=batch.loss_mask[0]) if route.observe else None,
            keep=route.keep,
        )

    def pack_newest(self, batch: Batch, mode: str, texts: TextCache) -> PackedTokens:
        """Returns the packing of the newest tokens of texts, documents of one token each; the same on every context rank."""
        sizes = {"num_tokens": len(batch.positions), "block_size": self.config.attention.block_size, "max_length": 1}
        return self._packed(batch, build_layout(batch.cu_seqlens, **sizes), main=mode, continues=texts)

    def _packed(self, batch: Batch, documents: DocumentLayout, **more: Any) -> PackedTokens:
        """Returns a packing with the fields that megatron-core reads."""
        length = self.config.data.sequence_length
        return PackedTokens(
            qkv_format="thd",
            cu_seqlens_q=batch.cu_seqlens,
            cu_seqlens_kv=batch.cu_seqlens,
            max_seqlen_q=length,
            max_seqlen_kv=length,
            positions=batch.positions,
            documents=documents,
            **more,
        )

    def begin_evaluation(self, batches: Sequence[Batch]) -> StepSums:
        """Returns empty sums for an evaluation of localised microbatches; every rank calls it."""
        buckets = self.config.data.sequence_length.bit_length() + 1
        by_position = torch.zeros(2, buckets, dtype=torch.float64, device=self.placement.device)
        return StepSums(self.count(batches), by_position=by_position)

    def step_result(self, sums: StepSums, grad_norm: Tensor, differing: Tensor | None = None) -> PendingStep:
        """Returns a training step's results, reduced over all ranks; every rank calls it.

        Args:
            sums: of the step.
            grad_norm: before clipping.
            differing: weights whose copies differ, reduced already; None if they were not compared.
        """
        counts = sums.counts
        compared = counts.labels.new_full((), NOT_COMPARED) if differing is None else differing.to(counts.labels)
        last = torch.stack([counts.labels, counts.drawn, counts.tokens, grad_norm.to(counts.labels), compared])
        by_part = sums.parts.reduce(self.placement.device, tp=self.config.parallel.tp)
        values, parts = torch.cat([by_part, self._reduce(sums), last]), PartSums(sums.parts.num_parts)

        def interpret(values: list[float]) -> StepResult:
            by_part, rest = parts.split(values)
            *sums, labels, drawn, tokens, grad_norm, compared = rest
            means = self._means(sums, drawn)
            return StepResult(
                cross_entropy=means.cross_entropy_sum / labels,
                alignment_by_layer=[] if self.config.attention.method is Method.indexer else means.alignment_by_layer,
                captured_mass_by_layer=means.captured_mass_by_layer,
                index_loss_by_layer=means.index_loss_by_layer,
                grad_norm=grad_norm,
                full_share=means.full_share,
                differing_weights=None if compared == NOT_COMPARED else int(compared),
                cross_entropy_by_stream=means.cross_entropy_by_stream(labels),
                z_loss=means.z_sum / labels if self.config.training.z_loss else None,
                num_tokens=round(tokens),
                by_part=by_part,
            )

        return PendingStep(values, interpret, self.own_time.reader())

    def evaluation_result(self, sums: StepSums) -> EvaluationResult:
        """Returns an evaluation's results, reduced over all ranks; every rank calls it."""
        means = self._means(self._reduce(sums).tolist(), float(sums.counts.drawn))
        labels, tokens = float(sums.counts.labels), int(sums.counts.tokens)
        assert sums.by_position is not None
        dist.all_reduce(sums.by_position)
        by_position, counts = (sums.by_position / self.config.parallel.tp).tolist()
        return EvaluationResult(
            cross_entropy=means.cross_entropy_sum / max(1.0, labels),
            alignment_by_layer=means.alignment_by_layer,
            captured_mass_by_layer=means.captured_mass_by_layer,
            num_labels=int(labels),
            num_tokens=tokens,
            cross_entropy_by_position=by_position,
            labels_by_position=[round(count) for count in counts],
        )

    def _reduce(self, sums: StepSums) -> Tensor:
        """Returns the sums over all ranks, on the device: tensor ranks are averaged, stages, context and data ranks added.

        By layer, over the computed queries by weight: the alignments, and the masses that are not captured. Queries that are not computed have 0 of both.
        Then the cross entropies, the number of microbatches whose main stream was full, and the number of all microbatches. Then, of the full
        ones, the cross entropies and the labels. Then the z-losses. Last, by layer, the index losses.
        """
        num_layers = self.config.model.num_layers
        vector = torch.zeros(3 * num_layers + 6, dtype=torch.float64, device=self.placement.device)
        numbers = sorted({number for packed in sums.packed for number in packed.diagnostics})
        if numbers:
            seen = [[p for p in sums.packed if number in p.diagnostics] for number in numbers]
            queries = self._copy_to_device([[p.weight * _num_computed(p) for p in packed] for packed in seen])
            layers = [p.diagnostics[number] for number, packed in zip(numbers, seen, strict=True) for p in packed]
            alignment = torch.stack([layer.alignment_loss for layer in layers]).double().view(queries.shape)
            mass = torch.stack([layer.captured_mass for layer in layers]).double().view(queries.shape)
            for number, *values in zip(
                numbers, (alignment * queries).sum(1), ((1.0 - mass) * queries).sum(1), strict=True
            ):
                vector[number - 1], vector[num_layers + number - 1] = values
            if index := [
                layer.index_loss for layer in layers if layer.index_loss is not None
            ]:  # of every layer or of none
                losses = (torch.stack(index).double().view(queries.shape) * queries).sum(1)
                for number, loss in zip(numbers, losses, strict=True):
                    vector[2 * num_layers + 5 + number] = loss
        if sums.cross_entropies:
            vector[2 * num_layers] = torch.stack(sums.cross_entropies).double().sum()
        vector[2 * num_layers + 1].fill_(sum(p.main == "full" for p in sums.packed))
        vector[2 * num_layers + 2].fill_(len(sums.packed))
        if sums.full:
            totals, labels = zip(*sums.full, strict=True)
            vector[2 * num_layers + 3] = torch.stack(totals).double().sum()
            vector[2 * num_layers + 4] = torch.stack(labels).double().sum()
        if sums.z_losses:
            vector[2 * num_layers + 5] = torch.stack(sums.z_losses).double().sum()
        dist.all_reduce(vector)
        return vector / self.config.parallel.tp

    def _copy_to_device(self, values: list[list[float]]) -> Tensor:
        """Returns numbers of the host on the device, without waiting for it."""
        tensor = torch.tensor(values, dtype=torch.float64)
        if self.placement.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.placement.device, non_blocking=True)

    def _means(self, sums: list[float], drawn: float) -> _Means:
        """Returns the values of `_reduce` by name; `drawn` is the queries that the layers' means are over, by weight."""
        n = self.config.model.num_layers
        alignments, uncaptured, (cross_entropy_sum, full, every, *of_full) = sums[:n], sums[n : 2 * n], sums[2 * n :]
        index = sums[2 * n + 6 :] if self.config.attention.score is Score.indexer else []
        return _Means(
            cross_entropy_sum=cross_entropy_sum,
            alignment_by_layer=[value / drawn for value in alignments] if drawn else [],
            captured_mass_by_layer=[1.0 - value / drawn for value in uncaptured] if drawn else [],
            index_loss_by_layer=[value / drawn for value in index] if drawn else [],
            full_share=full / every,
            full_sum=of_full[0],
            full_labels=of_full[1],
            z_sum=of_full[2],
        )


def _num_computed(packed: PackedTokens) -> int:
    """Returns the number of queries that compute the counterpart."""
    return (packed.documents if packed.sample is None else packed.sample.layout).num_queries
