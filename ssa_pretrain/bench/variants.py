"""The variants: pieces of work that are timed, and the models and microbatches that they share.

One engine serves every attention method, since the method determines what a step computes but not which weights exist. A
view of the engine with another method takes no memory, so the methods can take turns.
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
    """A piece of work that is timed.

    Attributes:
        name: its name in the table.
        run: queues the work once.
        tokens: tokens per run over all ranks; 0 if it processes none.
        flops: model operations per run over all ranks, as MFU counts them.
        foreign_bytes: memory that the models of other variants hold meanwhile.
    """

    name: str
    run: Callable[[], object]
    tokens: int = 0
    flops: float = 0.0
    foreign_bytes: int = 0


def with_method(engine: MegatronEngine, method: Method) -> MegatronEngine:
    """Returns a view of an engine, on the same weights, that trains another method."""
    view = copy.copy(engine)
    view.config = replace(engine.config, attention=replace(engine.config.attention, method=method))
    view.microbatches = replace(engine.microbatches, config=view.config)
    return view


def batches(config: Config, placement: Placement, vocab_size: int, count: int, *, short: bool) -> list[Batch]:
    """Returns this rank's microbatches of random tokens, on its device.

    Args:
        config: rows per microbatch and their length.
        placement: this process.
        vocab_size: token ids are below it.
        count: number of microbatches.
        short: random document lengths with a mean of MEAN_DOCUMENT tokens; else one document per row.
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
    """Returns a run of forward and backward over microbatches. Each run draws the main stream again."""
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
    tokens, labels = batch.tokens.view(-1, length), batch.labels.view(-1, length)
    return lambda: model.forward_backward(tokens, labels)


def memory_in_use() -> int:
    """Returns the bytes that tensors hold on this device, 0 on a CPU."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
