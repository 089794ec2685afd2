"""The pieces of work that are timed, and the models and microbatches that they share.

One engine serves every attention method: the method decides what a step computes, never which weights there are. A view of the engine with another
method costs no memory, so that methods can take turns.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from ssa_pretrain.bench.plain_megatron import PlainModel
from ssa_pretrain.config import Config, Method
from ssa_pretrain.data.batches import Batch, collate
from ssa_pretrain.data.rows import Row
from ssa_pretrain.engine.megatron.engine import MegatronEngine
from ssa_pretrain.parallel.state import Placement

MEAN_DOCUMENT = 1024
LEARNING_RATE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One thing that is timed.

    Attributes:
        name: as in the table.
        run: queues it once.
        tokens: that one run processes, over all ranks; 0 for what processes none.
        flops: model operations of one run over all ranks, what MFU counts.
        foreign_bytes: memory that other variants' models hold while it runs.
    """

    name: str
    run: Callable[[], object]
    tokens: int = 0
    flops: float = 0.0
    foreign_bytes: int = 0


def with_method(engine: MegatronEngine, method: Method) -> MegatronEngine:
    """Return a view of an engine, on the same weights, that trains another method."""
    view = copy.copy(engine)
    view.config = replace(engine.config, attention=replace(engine.config.attention, method=method))
    view.microbatches = replace(engine.microbatches, config=view.config)
    return view


def batches(config: Config, placement: Placement, vocab_size: int, count: int, *, short: bool) -> list[Batch]:
    """Return this rank's microbatches of random tokens, on its device.

    Args:
        config: rows and their length.
        placement: this process.
        vocab_size: ids are below it.
        count: microbatches.
        short: documents of MEAN_DOCUMENT tokens on average, in another number in every row; else one document a row.
    """
    length = config.data.sequence_length
    generator = np.random.default_rng([config.seed, placement.dp_rank, int(short)])
    found = []
    for index in range(count):
        rows = []
        for _ in range(config.training.micro_batch_size):
            starts = generator.random(length + 1) < 1.0 / MEAN_DOCUMENT if short else np.zeros(length + 1, dtype=bool)
            rows.append(Row(generator.integers(0, vocab_size, length + 1), starts))
        found.append(collate(rows, index=index * placement.dp + placement.dp_rank).to(placement.device))
    return found


def pass_over(engine: MegatronEngine, batches: list[Batch]) -> Callable[[], object]:
    """Return a run of forward and backward over microbatches; the main stream is drawn anew each time."""
    step = iter(range(1 << 30))
    return lambda: engine.forward_backward(batches, step=next(step))


def whole_step(engine: MegatronEngine, batches: list[Batch]) -> Callable[[], object]:
    """Return a run of a whole step: forward and backward over microbatches and the optimizer."""
    step = iter(range(1 << 30))

    def run() -> None:
        engine.train_step(batches, step=next(step), learning_rate=LEARNING_RATE)

    return run


def plain_pass(model: PlainModel, batch: Batch, length: int) -> Callable[[], object]:
    """Return a run of forward and backward of core's own model."""
    tokens, labels = batch.tokens.view(-1, length), batch.labels.view(-1, length)
    return lambda: model.forward_backward(tokens, labels)


def memory_in_use() -> int:
    """Return the bytes that tensors hold on this device, 0 on a CPU."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
