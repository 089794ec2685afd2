"""A small model and its microbatches for the tests on GPUs."""

from dataclasses import dataclass

import numpy as np
import torch

from ssa_pretrain.config import Config, KernelImpl, LayerSpec, Method, PrecisionName, Score
from ssa_pretrain.data.batches import Batch, collate
from ssa_pretrain.data.rows import Row
from ssa_pretrain.parallel.state import Placement
from support.errors import require_as_near, require_means_as_near

VOCAB, LENGTH = 1024, 1024


def small_config(method: Method, spec: LayerSpec, impl: KernelImpl) -> Config:
    """Returns a four-layer model of the 1B model's head shape."""
    config = Config()
    model = config.model
    model.num_layers, model.hidden_size, model.ffn_hidden_size = 4, 512, 1024
    model.num_attention_heads, model.num_kv_heads, model.head_dim = 16, 1, 64
    config.attention.method, config.attention.impl = method, impl
    if method is Method.indexer:  # a step of warm-up, then sparse attention
        config.attention.score, config.attention.full_ratio = Score.indexer, 0.0
        config.attention.indexer.warmup_steps = 1
    config.data.sequence_length = LENGTH
    config.engine.layer_spec = spec
    config.precision.name = PrecisionName.bf16
    return config


@dataclass(frozen=True, slots=True)
class Trained:
    """A run of a few steps: cross entropy, gradient norm, alignment and captured mass by step, and logits of the trained model."""

    means: torch.Tensor
    logits: torch.Tensor

    def require_as_near(self, baseline: "Trained", exact: "Trained") -> None:
        """Fail unless this run is about as far from the exact one as the baseline, in its means and its logits."""
        require_means_as_near(self.means, baseline.means, exact.means)
        require_as_near(self.logits, baseline.logits, exact.logits, factor=1.5, name="logits")


def train(placement: Placement, config: Config, *, steps: int) -> Trained:
    """Returns what a new engine gives in some steps on the same two microbatches."""
    from ssa_pretrain.engine import build_engine

    engine, means = build_engine(config, placement, VOCAB), []
    for step in range(steps):
        result = engine.train_step(random_batches(2), step=step, learning_rate=1e-3).result()
        by_layer = (*result.alignment_by_layer, *result.captured_mass_by_layer, *result.index_loss_by_layer)
        means.append([result.cross_entropy, result.grad_norm, *by_layer])
    mode = "full" if config.attention.method is Method.full else "sparse"
    logits = engine.last_logits(random_batches(1)[0], mode=mode).float().cpu()
    return Trained(torch.tensor(means, dtype=torch.float64), logits)


def random_batches(count: int) -> list[Batch]:
    """Returns microbatches of two rows with uneven documents."""
    generator = np.random.default_rng(0)
    found = []
    for index in range(count):
        rows = []
        for _ in range(2):
            starts = np.zeros(LENGTH + 1, dtype=bool)
            starts[generator.choice(np.arange(1, LENGTH), size=3, replace=False)] = True
            rows.append(Row(generator.integers(0, VOCAB, LENGTH + 1), starts))
        found.append(collate(rows, index=index))
    return found
