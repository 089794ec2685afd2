"""The Llama of one rank under megatron-core, without optimizer and gradients: evaluation, scores of labels, logits, and weights from checkpoints.

It holds the parameters only. Data ranks hold copies and do not communicate in a forward. engine.py adds training: core's data parallelism around
the same chunks, the optimizer and whole checkpoints. Forwards go through core's pipeline schedules. The last stage's results are broadcast to the
other stages, so that every rank of a model has them.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from ssa_pretrain.checkpoint import sharded_weights
from ssa_pretrain.checkpoint.weights import find_weights
from ssa_pretrain.config import Config, PrecisionName, Score
from ssa_pretrain.data.batches import Batch
from ssa_pretrain.engine.interface import EvaluationResult
from ssa_pretrain.engine.label_scores import label_scores
from ssa_pretrain.engine.megatron import checkpoint
from ssa_pretrain.engine.step import Microbatches, Route
from ssa_pretrain.engine.step_sums import StepSums
from ssa_pretrain.model.attention import PackedTokens
from ssa_pretrain.model.spec import build_model
from ssa_pretrain.model.text_cache import TextCache
from ssa_pretrain.parallel.context import ContextParallel
from ssa_pretrain.parallel.state import Placement, limit_waiting


class MegatronModel:
    """The Llama of one rank under megatron-core.

    Attributes:
        chunks: this rank's parts of the model, one per virtual stage.
        core: their configuration object, which core's schedules read.
        may_begin_scorer: whether `load_weights` takes weights without the trained scorer that the model has. Training does.
    """

    may_begin_scorer = False

    def __init__(self, config: Config, placement: Placement, vocab_size: int) -> None:
        self.config, self.placement, self.vocab_size = config, placement, vocab_size
        if config.engine.overlap_tp:
            start_user_buffers(config)
        self.context = ContextParallel(placement.groups.cp)
        self.microbatches = Microbatches(config, placement, self.context)
        stages = range(config.parallel.vpp) if config.parallel.vpp > 1 else [None]
        self.chunks = [self.wrap(_build_chunk(config, placement, vocab_size, stage), stage or 0) for stage in stages]
        for chunk in self.chunks:  # all chunks share one configuration object, so the schedules' hooks are set once
            chunk.config = self.chunks[0].config
        self.core = self.chunks[0].config
        self._schedule = get_forward_backward_func()
        limit_waiting(config.parallel)

    def wrap(self, chunk: torch.nn.Module, stage: int) -> torch.nn.Module:
        """Returns a chunk as it runs. Training overrides this."""
        return chunk.requires_grad_(False)

    def start_evaluating(self) -> None:
        """Sets the model to evaluation."""
        for chunk in self.chunks:
            chunk.eval()

    @torch.no_grad()
    def evaluate(
        self, batches: Sequence[Batch], *, mode: str, observe: Callable[..., None] | None = None
    ) -> EvaluationResult:
        """See `Evaluator.evaluate`."""
        self.start_evaluating()
        batches = self.microbatches.localise(batches)
        sums = self.microbatches.begin_evaluation(batches)
        if batches:
            routes = [Route(mode, counterpart=True, observe=observe)] * len(batches)
            self._run_schedule(batches, routes, sums, forward_only=True)
        return self.microbatches.evaluation_result(sums)

    def score_labels(self, batch: Batch, *, mode: str) -> Tensor:
        """See `Evaluator.score_labels`."""

        def read(batch: Batch, logits: Tensor) -> Tensor:
            tokens = self.context.num_tokens(batch)
            scores = label_scores(logits, batch.labels[0], self.vocab_size)
            return self.context.values_at(scores, torch.arange(tokens, device=scores.device), tokens)

        (batch,) = self.microbatches.localise([batch])
        pack = partial(self.microbatches.pack, batch, Route(mode))
        return self._read_logits(batch, pack, read, num_rows=batch.boundaries[-1])

    def last_logits(self, batch: Batch, *, mode: str, texts: TextCache | None = None) -> Tensor:
        """See `Evaluator.last_logits`."""

        def read(batch: Batch, logits: Tensor) -> Tensor:
            ends = batch.cu_seqlens[1:].long() - 1
            return self.context.values_at(logits, ends, self.context.num_tokens(batch)).float()

        (batch,) = self.microbatches.localise([batch])
        pack = partial(self.microbatches.pack, batch, Route(mode, keep=texts))
        return self._read_logits(batch, pack, read, num_rows=len(batch.boundaries) - 1)

    def next_logits(self, batch: Batch, *, mode: str, texts: TextCache) -> Tensor:
        """See `Evaluator.next_logits`. Context ranks hold whole caches and compute the same."""
        batch = batch.to(self.placement.device)
        pack = partial(self.microbatches.pack_newest, batch, mode, texts)
        return self._read_logits(batch, pack, lambda _, logits: logits[: len(texts)].float(), num_rows=len(texts))

    def load_weights(self, folder: Path) -> None:
        """See `Evaluator.load_weights`."""
        source = find_weights(folder)
        begins = self.may_begin_scorer and self.config.attention.score is Score.indexer and source is not None
        if source != folder and checkpoint.is_core_checkpoint(folder) and not begins:
            checkpoint.load(folder, self.chunks, None)
        else:  # a folder of common weights has no checked list of files, so nothing in it is unpickled
            parts = (self.models, self.config, self.placement)
            sharded_weights.load_weights(source or folder, *parts, new_scorer=self.may_begin_scorer)

    @property
    def models(self) -> list[torch.nn.Module]:
        """This rank's GPTModels, one per virtual stage."""
        return [checkpoint.unwrap(chunk) for chunk in self.chunks]

    def _run_schedule(
        self, batches: Sequence[Batch], routes: Sequence[Route], sums: StepSums, *, forward_only: bool
    ) -> None:
        """Runs core's schedule over the localised microbatches; results are added to `sums`."""

        def forward_step(iterator: Iterator[tuple[Batch, Route]], chunk: torch.nn.Module) -> tuple[Tensor, Callable]:
            batch, route = next(iterator)
            packed = self.microbatches.pack(batch, route)
            sums.packed.append(packed)
            out = chunk(batch.tokens, batch.positions.unsqueeze(0), None, labels=batch.labels, packed_seq_params=packed)
            return out, lambda losses: (sums.loss(losses, batch, route.main), {})  # called on the last stage only

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

    @torch.no_grad()
    def _read_logits(
        self,
        batch: Batch,
        pack: Callable[[], PackedTokens],
        read: Callable[[Batch, Tensor], Tensor],
        *,
        num_rows: int,
    ) -> Tensor:
        """Returns, on every stage, what `read` finds in a microbatch's logits.

        Args:
            batch: this rank's part of the microbatch, on the device.
            pack: returns its packing.
            read: (the batch, its logits [tokens, padded V]) -> [num_rows, any number] for the whole microbatch.
            num_rows: the result's first dim.
        """
        self.start_evaluating()

        def forward_step(iterator: Iterator[Batch], chunk: torch.nn.Module) -> tuple[Tensor, Callable]:
            next(iterator)
            positions = batch.positions.unsqueeze(0)
            out = chunk(batch.tokens, positions, None, packed_seq_params=pack(), runtime_gather_output=True)
            return out, lambda logits, non_loss_data: read(batch, logits[0])

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
        return self._broadcast_from_last_stage(outputs[0] if outputs else None, num_rows)

    def _broadcast_from_last_stage(self, found: Tensor | None, num_rows: int) -> Tensor:
        """Returns the last stage's result [num_rows, any number] on every stage; `found` is None on the others."""
        pp, device = self.placement.groups.pp, self.placement.device
        if pp.size() == 1:
            assert found is not None
            return found
        width = torch.tensor(found.shape[1] if found is not None else 0, device=device)
        last = dist.get_global_rank(pp, pp.size() - 1)
        dist.broadcast(width, src=last, group=pp)
        out = found if found is not None else torch.empty(num_rows, int(width), device=device)
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


def _build_chunk(config: Config, placement: Placement, vocab_size: int, stage: int | None) -> torch.nn.Module:
    """Returns one of this rank's model chunks (one, or one per virtual stage)."""
    model: GPTModel = build_model(config, vocab_size, placement.groups, stage).to(placement.device)
    return model if config.precision.name is PrecisionName.fp32 else Float16Module(model.config, model)
