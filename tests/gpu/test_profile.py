"""A profiled step on a GPU: every category is found by its kernels' names, and little time is unassigned."""

import pytest

from ssa_pretrain.config import Config, KernelImpl, LayerSpec, Method
from ssa_pretrain.monitor.profiling import breakdown, profiled, read_trace
from support.small_model import VOCAB, random_batches, small_config

pytestmark = pytest.mark.gpu
CATEGORIES = (
    "attention, full",
    "selection",
    "attention, sparse",
    "gate and alignment",
    "projection split and RoPE",
    "SwiGLU",
    "norms",
    "cross entropy",
    "matrix products",
    "optimizer",
)


@pytest.fixture(scope="module")
def placement():
    """One process on one GPU."""
    from ssa_pretrain.parallel.state import start, stop

    yield start(Config().parallel, seed=1)
    stop()


def test_profile_assigns_the_time_of_a_step(placement, tmp_path):
    pytest.importorskip("transformer_engine")
    from ssa_pretrain.engine import build_engine

    config = small_config(Method.ssa, LayerSpec.transformer_engine, KernelImpl.auto)
    engine = build_engine(config, placement, VOCAB)
    for step in range(2):
        engine.train_step(random_batches(2), step=step, learning_rate=1e-3)
    with profiled(tmp_path, step=3, rank=0, memory=True):
        engine.train_step(random_batches(2), step=2, learning_rate=1e-3)
    found = breakdown(read_trace(tmp_path / "step_3.rank_0.trace.json.gz"))
    assert not [name for name in CATEGORIES if found.categories.get(name, 0.0) <= 0.0], found.categories
    assert found.categories.get("other", 0.0) < 0.35 * sum(found.categories.values()), found.categories
    assert (tmp_path / "step_3.rank_0.memory.pickle").stat().st_size > 0
