"""Weights whose gathering is deferred: gathered once after an update, however many readers a save has, and before a module's call reads them."""

import pytest
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


MODELS = {
    "tied": {},
    "untied": {"model.tie_embeddings": False},
    "norms_of_heads": {"model.qk_norm": True, "attention.key_convolution": 3},
    "nsa": {"attention.method": "nsa", "attention.score": "compressed"},
    "scorer": {"attention.score": "indexer"},
    "indexer": {"attention.method": "indexer", "attention.score": "indexer", "attention.full_ratio": 0.0},
}


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_is_read_by_a_call_of_its_module(name):
    """Core waits for a weight that is still being gathered before a call of the module that holds it, and nowhere else."""
    config = configure(OVERLAP | MODELS[name])
    placement = start(Config().parallel, seed=1)
    try:
        engine, called = build_engine(config, placement, VOCAB), set()
        owners = {
            path: module
            for model in engine.models
            for path, module in model.named_modules()
            if any(True for _ in module.parameters(recurse=False))
        }
        for path, module in owners.items():
            module.register_forward_pre_hook(lambda *_, path=path: called.add(path))
        engine.train_step(batches(config, 0, 1, 0), step=0, learning_rate=0.1).result()
        assert called == set(owners)
    finally:
        stop()
