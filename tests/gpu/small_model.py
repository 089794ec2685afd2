"""A small model and its microbatches for the tests on GPUs."""

import numpy as np

from ssa_pretrain.config import Config, KernelImpl, LayerSpec, Method, PrecisionName
from ssa_pretrain.data.batches import Batch, collate
from ssa_pretrain.data.rows import Row

VOCAB, LENGTH = 1024, 1024


def small_config(method: Method, spec: LayerSpec, impl: KernelImpl) -> Config:
    """Return a four-layer model of the 1B model's head shape."""
    config = Config()
    model = config.model
    model.num_layers, model.hidden_size, model.ffn_hidden_size = 4, 512, 1024
    model.num_attention_heads, model.num_kv_heads, model.head_dim = 16, 1, 64
    config.attention.method, config.attention.impl = method, impl
    config.data.sequence_length = LENGTH
    config.engine.layer_spec = spec
    config.precision.name = PrecisionName.bf16
    return config


def random_batches(count: int) -> list[Batch]:
    """Return microbatches of two rows with uneven documents."""
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
