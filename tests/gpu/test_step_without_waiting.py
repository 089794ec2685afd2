"""A training step on a GPU is only queued: nothing in it waits for the device, and new document lengths recompile no kernel."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ssa_pretrain.config import Config, KernelImpl, LayerSpec, Method
from ssa_pretrain.data.batches import Batch, collate
from ssa_pretrain.data.rows import Row
from support.small_model import LENGTH, VOCAB, small_config

pytestmark = pytest.mark.gpu

COVERED = 5


@pytest.fixture(scope="module")
def placement():
    """One process on one GPU."""
    from ssa_pretrain.parallel.state import start, stop

    yield start(Config().parallel, seed=1)
    stop()


def rows_with_documents(seed: int) -> list[Batch]:
    """Returns two microbatches of two rows: seeds below 3 have up to 20 documents per row, 3 and 4 one, COVERED documents of a block each.

    The chosen blocks cover such documents whole, so a microbatch of them computes one stream, which has kernels of its own.
    """
    generator = np.random.default_rng(seed)
    found = []
    for index in range(2):
        rows = []
        for _ in range(2):
            starts = np.zeros(LENGTH + 1, dtype=bool)
            if seed == COVERED:
                starts[::16] = True
            elif seed < 3:
                starts[generator.choice(np.arange(1, LENGTH), size=int(generator.integers(1, 20)), replace=False)] = (
                    True
                )
            rows.append(Row(generator.integers(0, VOCAB, LENGTH + 1), starts, part=len(rows)))
        found.append(replace(collate(rows, index=index), num_parts=2))
    return found


@pytest.mark.parametrize("spec", [LayerSpec.local, LayerSpec.transformer_engine])
@pytest.mark.parametrize("method", list(Method))
def test_step_neither_waits_nor_recompiles(placement, method, spec):
    import triton

    from ssa_pretrain.engine import build_engine

    if spec is LayerSpec.transformer_engine:
        pytest.importorskip("transformer_engine")
    config = small_config(method, spec, KernelImpl.auto)
    config.optim.ema_decay = (
        0.99 if method is Method.ssa else 0.0
    )  # the running mean of the weights does not wait either
    engine = build_engine(config, placement, VOCAB)
    step = 0
    # Both streams and all kinds of rows are met before: each has kernels of its own.
    for seed in (0, 0, 0, 0, 3, 3, 3, 3, COVERED, COVERED, COVERED, COVERED):
        engine.train_step(rows_with_documents(seed), step=step, learning_rate=1e-3)
        step += 1
    torch.cuda.synchronize()
    compiled = []
    earlier = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda **kwargs: compiled.append(kwargs.get("repr"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = []
        for seed in (0, 1, 2, 3, 4, COVERED):
            pending.append(engine.train_step(rows_with_documents(seed), step=step, learning_rate=1e-3))
            step += 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
        triton.knobs.runtime.jit_post_compile_hook = earlier
    assert compiled == []
    results = [step.result() for step in pending]
    assert all(np.isfinite([r.cross_entropy, r.grad_norm]).all() for r in results)
