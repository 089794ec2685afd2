"""muP's coordinate check, the z-loss in a step and Muon's memory, on small models of one process."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from ssa_pretrain.config import Config, Method, OptimizerName, PrecisionName
from ssa_pretrain.planning.memory import count_parameters, state_bytes
from support.layout_worker import LENGTH, VOCAB, batches, configure

NARROW, WIDE, STEPS, RATE = 128, 256, 3, 2.0**-8


@pytest.fixture(scope="module")
def placement():
    """One process."""
    from ssa_pretrain.parallel.state import start, stop

    yield start(Config().parallel, seed=1)
    stop()


def new_engine(config: Config, placement) -> Any:
    """Returns a new engine of a run."""
    from ssa_pretrain.engine import build_engine

    return build_engine(config, placement, VOCAB)


def build(placement, width: int, optimizer: OptimizerName, *, mup: bool):
    """Returns an engine of a width."""
    config = configure({"model.num_layers": 2, "model.init_std": 0.1, "optim.eps": 1e-12, "attention.method": "full"})
    model, config.optim.name = config.model, optimizer
    model.hidden_size, model.ffn_hidden_size, model.num_attention_heads = width, 2 * width, width // model.head_dim
    model.num_kv_heads = model.num_attention_heads // 2
    model.mup.base_width = NARROW if mup else 0
    return new_engine(config, placement)


def moved(placement, width: int, optimizer: OptimizerName, *, mup: bool) -> float:
    """Returns how far the first steps move the logits, root mean square."""
    engine = build(placement, width, optimizer, mup=mup)
    (held_out, *_) = batches(engine.config, 0, 1, 99)
    before = engine.last_logits(held_out, mode="full")
    for step in range(STEPS):
        engine.train_step(batches(engine.config, 0, 1, step), step=step, learning_rate=RATE).result()
    return float((engine.last_logits(held_out, mode="full") - before).square().mean().sqrt())


@pytest.mark.parametrize("optimizer", OptimizerName)
def test_under_mup_steps_move_the_logits_equally_at_every_width(placement, optimizer):
    """Without muP a model twice as wide moves its logits more than twice as far. From 32 to 512 wide, muP's ratio falls towards 1."""
    ratios = [
        moved(placement, WIDE, optimizer, mup=mup) / moved(placement, NARROW, optimizer, mup=mup)
        for mup in (True, False)
    ]
    assert 0.7 < ratios[0] < 1.4 and ratios[1] > 1.8, ratios


def test_z_loss_is_reported_apart_and_only_in_training(placement):
    """At equal weights the cross entropy is that without a z-loss; the z-loss is c times the mean squared log-sum-exp."""
    from ssa_pretrain.engine.step import Route

    results, judged = [], []
    for factor in (0.0, 0.125):
        config = configure({"model.num_layers": 1, "attention.method": "full", "training.z_loss": factor})
        engine = new_engine(config, placement)
        mine = batches(config, 0, 1, 0)
        judged.append(engine.evaluate(mine, mode="full").cross_entropy)
        results.append(engine.train_step(mine, step=0, learning_rate=0.0).result())
    plain, with_z = results
    assert plain.z_loss is None and judged[0] == judged[1]
    assert math.isclose(plain.cross_entropy, with_z.cross_entropy, rel_tol=1e-6)
    assert with_z.z_loss > 0.125 * (math.log(VOCAB) - 1) ** 2
    assert abs(plain.grad_norm - with_z.grad_norm) > 1e-3
    wanted, labels = 0.0, 0.0
    for batch in mine:
        packed = engine.microbatches.pack(batch, Route("full"))
        out = engine.models[0].eval()(
            batch.tokens, batch.positions[None], None, packed_seq_params=packed, runtime_gather_output=True
        )
        lse = out[0].double().logsumexp(-1)
        wanted += float((lse.square() * batch.loss_mask[0]).sum())
        labels += float(batch.loss_mask.sum())
    assert math.isclose(with_z.z_loss, 0.125 * wanted / labels, rel_tol=1e-5)


def test_deepspeeds_muon_passes_over_missing_gradients_and_names_its_momentum_twice(placement):
    """DeepSpeed's stage 0 skips a step by a hook that takes the gradients away, and DeepSpeed's converter reads two moments."""
    from ssa_pretrain.engine.deepspeed.setup import build_optimizer
    from ssa_pretrain.model.matrices import is_hidden

    config = configure({"optim.name": "muon", "model.num_layers": 2})
    model = new_engine(config, placement).models[0]
    first, second = (build_optimizer(model, config, placement) for _ in range(2))
    for group in first.param_groups:
        group["lr"] = RATE
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = [p.detach().clone() for p in model.parameters()]
    first.step()
    after = [p.detach().clone() for p in model.parameters()]
    assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))
    first.register_step_pre_hook(lambda optimizer, *_: optimizer.zero_grad())
    first.step()
    assert all(torch.equal(*pair) for pair in zip(after, model.parameters(), strict=True))
    names = {p: name for name, p in model.named_parameters()}
    saved = first.state_dict()
    ordered = [names[p] for group in first.param_groups for p in group["params"]]
    for name, state in zip(ordered, (saved["state"][i] for i in range(len(ordered))), strict=True):
        assert (state["exp_avg"] is state["exp_avg_sq"]) == is_hidden(name)
        assert ("step" in state) != is_hidden(name)
    second.load_state_dict(saved)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    second.step()
    assert all(("exp_avg_sq" in second.state[p]) != is_hidden(name) for p, name in names.items())


@pytest.mark.parametrize("precision", [PrecisionName.fp32, PrecisionName.bf16])
def test_planned_memory_of_muon_is_what_it_holds(placement, precision):
    config = configure(
        {"optim.name": "muon", "precision.name": precision.value, "training.global_batch_tokens": LENGTH}
    )
    config.attention = replace(config.attention, method=Method.full)
    engine = new_engine(config, placement)
    engine.train_step(batches(config, 0, 1, 0), step=0, learning_rate=1e-3).result()
    held = 0
    for wrapper in engine.optimizer.chained_optimizers:
        for weight, state in wrapper.optimizer.state.items():
            held += sum(v.nbytes for name, v in state.items() if name != "step")
            held += weight.nbytes if precision is PrecisionName.bf16 else 0
    total, largest = count_parameters(config, config.model.padded_vocab_size(VOCAB))
    assert state_bytes(config, total, largest, 1)["optimizer_bytes"] == held
