"""Weights whose gathering is deferred are gathered once after an update, however many readers a save has."""

import torch
import torch.distributed as dist

from ssa_pretrain.config import Config
from ssa_pretrain.engine import build_engine
from ssa_pretrain.parallel.state import start, stop
from support.layout_worker import VOCAB, batches, configure

OVERLAP = {"engine.overlap_grad_reduce": True, "engine.overlap_param_gather": True}


def test_save_gathers_once_and_the_next_update_makes_it_due_again(tmp_path, monkeypatch):
    config = configure(OVERLAP)
    placement = start(Config().parallel, seed=1)
    try:
        engine, gathered = build_engine(config, placement, VOCAB), []
        for chunk in engine.chunks:
            plain = chunk.start_param_sync
            monkeypatch.setattr(chunk, "start_param_sync", lambda *a, p=plain, **o: gathered.append(o) or p(*a, **o))

        def train(step: int) -> None:
            engine.train_step(batches(config, 0, 1, step), step=step, learning_rate=0.1).result()

        def forced() -> int:
            return sum(bool(options.get("force_sync")) for options in gathered)

        train(0)
        gathered.clear()
        assert engine.first_not_finite() is None
        engine.require_equal_replicas(1)
        (tmp_path / "saved").mkdir()
        engine.save(tmp_path / "saved")
        engine.save_weights(tmp_path / "saved")
        assert forced() == 1
        train(1)
        assert forced() == 1
        engine.first_not_finite()
        assert forced() == 2
        engine.load(tmp_path / "saved")
        engine.first_not_finite()
        assert forced() == 3
    finally:
        stop()
    assert not dist.is_initialized() and not torch.cuda.is_initialized()
