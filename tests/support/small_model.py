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
    if method is Method.nsa:
        config.attention.score = Score.compressed
    config.data.sequence_length = LENGTH
    config.engine.layer_spec = spec
    config.precision.name = PrecisionName.bf16
    return config


@dataclass(frozen=True, slots=True)
class Trained:
    """A run of a few steps: the means of each step, and logits of the trained model.

    The means are cross entropy, gradient norm, and alignment and captured mass by layer; of the first step also the index losses, otherwise 0. They are
    divergences of 1e-3 nats between masses that are nearly equal, so they magnify what moves the weights. In Adam's first steps that is lr times the
    sign of a gradient: bf16 leaves half a percent of the signs to rounding. Between bf16 runs whose projections differ in one last bit of 20 the
    later index losses of deep layers vary by 1 to 3%, so they judge nobody. `scorer_gradients` are exact to about 1%.
    """

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
        index_losses = result.index_loss_by_layer if step == 0 else [0.0] * len(result.index_loss_by_layer)
        by_layer = (*result.alignment_by_layer, *result.captured_mass_by_layer, *index_losses)
        means.append([result.cross_entropy, result.grad_norm, *by_layer])
    mode = "full" if config.attention.method is Method.full else "sparse"
    logits = engine.last_logits(random_batches(1)[0], mode=mode).float().cpu()
    return Trained(torch.tensor(means, dtype=torch.float64), logits)


def scorer_gradients(placement: Placement, config: Config) -> list[torch.Tensor]:
    """Returns the gradients of the scorer's weights by layer, of the same two microbatches and the initial weights."""
    from ssa_pretrain.engine import build_engine
    from ssa_pretrain.engine.megatron.checkpoint import unwrap

    engine = build_engine(config, placement, VOCAB)
    engine.forward_backward(random_batches(2), step=0)
    weights = unwrap(engine.chunks[0]).named_parameters()
    return [weight.main_grad.clone() for name, weight in weights if "linear_index" in name]


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
