"""A copy of the state taken between two steps holds that moment's values while the GPU goes on training, and stalls it only while it copies."""

import threading

import pytest
import torch
import torch.distributed as dist

from ssa_pretrain.checkpoint.background import BackgroundSave
from ssa_pretrain.checkpoint.staging import HostCopies
from ssa_pretrain.config import Config, KernelImpl, LayerSpec, Method
from support.small_model import VOCAB, random_batches, small_config

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def placement():
    """One process on one GPU."""
    from ssa_pretrain.parallel.state import start, stop

    yield start(Config().parallel, seed=1)
    stop()


def test_copies_hold_the_values_of_the_moment_although_the_device_goes_on():
    """The host queues the copies and what overwrites their sources; it waits for neither."""
    live = [torch.full((2**26,), 1.0, device="cuda"), torch.full((100,), 1.0, device="cuda")]
    copies = HostCopies(live[0].device)
    for value in (1.0, 2.0):
        with copies.taking():
            taken = [copies.tensor(str(i), tensor) for i, tensor in enumerate(live)]
        for tensor in live:
            tensor.fill_(value + 1)
        copies.wait()
        assert all(bool((tensor == value).all()) for tensor in taken)
        assert taken[0].is_pinned() and taken[1].is_pinned()
    assert 2**28 / copies.device_seconds() > 5e9, (
        "bytes per second: page-locked memory is filled at the speed of the link"
    )


@pytest.mark.parametrize("spec", [LayerSpec.local, LayerSpec.transformer_engine])
def test_written_copy_equals_a_synchronous_checkpoint(placement, spec, tmp_path):
    from ssa_pretrain.engine import build_engine

    if spec is LayerSpec.transformer_engine:
        pytest.importorskip("transformer_engine")
    engine = build_engine(small_config(Method.ssa, spec, KernelImpl.auto), placement, VOCAB)
    group, now, later = dist.new_group(backend="gloo"), tmp_path / "now", tmp_path / "later"
    now.mkdir()
    later.mkdir()
    engine.train_step(random_batches(2), step=0, learning_rate=1e-3)
    snapshot, trained = engine.snapshot(weights=True), threading.Event()
    engine.save(now)
    engine.save_weights(now)
    save = BackgroundSave(1, lambda: trained.wait() and snapshot.write(later, group))
    for step in range(1, 4):
        engine.train_step(random_batches(2), step=step, learning_rate=1e-3).result()
    trained.set()
    save.wait()
    names = sorted(str(p.relative_to(now)) for p in now.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(later)) for p in later.rglob("*") if p.is_file())
    for name in names:
        if name.endswith((".distcp", ".safetensors")):
            assert (now / name).read_bytes() == (later / name).read_bytes(), name
    assert snapshot.device_seconds() > 0.0
    engine.load(later)
