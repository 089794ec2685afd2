"""The variants: pieces of work that are timed, and the models and microbatches that they share.

One engine serves the methods ssa, full and moba, every main stream and counterpart share, since these settings determine
what a step computes but not which weights exist. nsa has gates of its own, and so an engine of its own. A view of the engine with other settings takes no memory, so the variants can take
turns.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch

from ssa_pretrain.bench.documents import Documents, document_starts
from ssa_pretrain.bench.plain_megatron import PlainModel
from ssa_pretrain.config import Config, Method
from ssa_pretrain.data.batches import Batch, collate
from ssa_pretrain.data.rows import Row
from ssa_pretrain.engine.megatron.engine import MegatronEngine
from ssa_pretrain.parallel.state import Placement
from ssa_pretrain.planning.flops import row_flops

LEARNING_RATE = 1e-6
Built = TypeVar("Built")
ONE_MODEL = (Method.ssa, Method.full, Method.moba)  # methods that one engine serves; the others have more weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A piece of work that is timed, or the mean of others.

    Attributes:
        name: its name in the table.
        run: queues the work once; None: the variant is a mean.
        mean_of: weights by name of the variants that it is the mean of; they come first and process as many tokens.
        model: what of the model is measured, "" for all of it.
        tokens: tokens per run over all ranks; 0 if it processes none.
        flops: model operations per run over all ranks, as MFU counts them.
        foreign_bytes: memory that the models of other variants hold meanwhile.
    """

    name: str
    run: Callable[[], object] | None = None
    mean_of: Mapping[str, float] = field(default_factory=dict)
    model: str = ""
    tokens: int = 0
    flops: float = 0.0
    foreign_bytes: int = 0


def with_attention(engine: MegatronEngine, **settings: Any) -> MegatronEngine:
    """Returns a view of an engine, on the same weights, that trains with other settings of the group `attention`."""
    view = copy.copy(engine)
    view.config = replace(engine.config, attention=replace(engine.config.attention, **settings))
    view.microbatches = replace(engine.microbatches, config=view.config)
    return view


def batches(
    config: Config, placement: Placement, vocab_size: int, count: int, documents: Documents = Documents.whole
) -> list[Batch]:
    """Returns this rank's microbatches of random tokens, on the host.

    Args:
        config: rows per microbatch and their length.
        placement: this process.
        vocab_size: token ids are below it.
        count: number of microbatches.
        documents: their lengths.
    """
    size, length = config.training.micro_batch_size, config.data.sequence_length
    generator = np.random.default_rng([config.seed, placement.dp_rank, list(Documents).index(documents)])
    starts = document_starts(documents, generator, count * size * (length + 1)).reshape(count, size, length + 1)
    found = []
    for index in range(count):
        rows = [Row(generator.integers(0, vocab_size, length + 1), starts[index, row]) for row in range(size)]
        found.append(collate(rows, index=index * placement.dp + placement.dp_rank))
    return found


def long_rows(config: Config, factor: int) -> Config:
    """Returns the configuration with one row per microbatch, `factor` times as long, and with RoPE scaling."""
    return replace(
        config,
        data=replace(config.data, sequence_length=factor * config.data.sequence_length),
        training=replace(config.training, micro_batch_size=1),
        model=replace(config.model, rope_scaling=replace(config.model.rope_scaling, enabled=True)),
    )


def counted(config: Config, placement: Placement, microbatches: int) -> dict[Method, dict[str, Any]]:
    """Returns tokens and model operations of one run over all ranks, by method, with one document per row."""

    def work(method: Method) -> dict[str, Any]:
        return work_of(replace(config, attention=replace(config.attention, method=method)), placement, microbatches)

    return {method: work(method) for method in ONE_MODEL}


def work_of(config: Config, placement: Placement, microbatches: int) -> dict[str, Any]:
    """Returns the same for the configuration's own method."""
    rows, length = microbatches * config.training.micro_batch_size * placement.dp, config.data.sequence_length
    return {"tokens": rows * length, "flops": rows * row_flops(config.model, config.attention, [length]).model}


def pass_over(engine: MegatronEngine, batches: list[Batch]) -> Callable[[], object]:
    """Returns a run of forward and backward over microbatches. Each run draws the streams again, as the next step does."""
    step = iter(range(1 << 30))
    return lambda: engine.forward_backward(batches, step=next(step))


def whole_step(engine: MegatronEngine, batches: list[Batch]) -> Callable[[], object]:
    """Returns a run of a whole step: forward and backward over microbatches, and the optimizer."""
    step = iter(range(1 << 30))

    def run() -> None:
        engine.train_step(batches, step=next(step), learning_rate=LEARNING_RATE)

    return run


def plain_pass(model: PlainModel, batch: Batch, length: int) -> Callable[[], object]:
    """Returns a run of forward and backward of core's own model."""
    batch = batch.to(model.device)
    tokens, labels = batch.tokens.view(-1, length), batch.labels.view(-1, length)
    return lambda: model.forward_backward(tokens, labels)


def memory_in_use() -> int:
    """Returns the bytes that tensors hold on this device, 0 on a CPU."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def built(build: Callable[[], Built]) -> tuple[Built, int]:
    """Returns the result of `build` and the bytes that it holds."""
    before = memory_in_use()
    return build(), memory_in_use() - before
