"""Settings of Muon, muP and the z-loss: their rules, what a resume may change, and the plan."""

import pytest

from ssa_pretrain.checkpoint.facts import differences, run_facts
from ssa_pretrain.cli import resolve_config
from ssa_pretrain.config import Config, OptimizerName
from ssa_pretrain.config.deepspeed import ds_config
from ssa_pretrain.config.machine import Machine
from ssa_pretrain.planning.plan import make_plan
from ssa_pretrain.settings.problems import ConfigError

BASE = ("model.vocab_size=4096", "training.steps=300", "training.global_batch_tokens=8192")
FP32 = ("precision=fp32", "attention.impl=reference")
MACHINE = Machine(world_size=1, has_gpu=False, has_files=False)


def resolved(*overrides: str) -> Config:
    return resolve_config("train", [*BASE, *overrides], MACHINE)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("optim=muon", "engine=deepspeed", "deepspeed.adam=deepspeed"),
            "deepspeed.adam=deepspeed is not supported under optim.name=muon, beside which torch's AdamW steps; "
            "try deepspeed.adam=torch",
        ),
        (
            ("optim=muon", "engine=deepspeed", "deepspeed.extra.zero_optimization.zenflow.topk_ratio=0.1"),
            "deepspeed.extra.zero_optimization.zenflow.topk_ratio=0.1 is not supported under optim.name=muon: "
            "DeepSpeed would step weights with an AdamW of its own; leave it out",
        ),
        (
            ("optim=muon", "engine.overlap_param_gather=true", "engine.overlap_grad_reduce=true"),
            "engine.overlap_param_gather=true is not supported under optim.name=muon, which sends whole matrices after the "
            "step; try engine.overlap_param_gather=false",
        ),
        (
            ("optim.muon.momentum=0.9",),
            "optim.muon.momentum=0.9 has no effect under optim.name=adamw; add optim.name=muon",
        ),
        (("optim=muon", "optim.muon.momentum=1"), "optim.muon.momentum=1.0 must be at least 0 and below 1; try 0.95"),
        (("optim=muon", "optim.muon.ns_steps=0"), "optim.muon.ns_steps=0 must lie in 1 to 20; try 1"),
        (("optim=muon", "optim.muon.lr_multiplier=0"), "optim.muon.lr_multiplier=0.0 must be above 0; try 1.0"),
        (("model.mup.base_width=-1",), "model.mup.base_width=-1 must be at least 0; try 0"),
        (
            ("model.mup.base_head_dim=16",),
            "model.mup.base_head_dim=16 has no effect without muP, and model.mup.base_width=0; "
            "set model.mup.base_width to the width at which optim.lr was tuned",
        ),
        (
            ("model.mup.base_width=64", "model.mup.output_multiplier=0"),
            "model.mup.output_multiplier=0.0 must be above 0; try 1.0",
        ),
        (("training.z_loss=-1e-4",), "training.z_loss=-0.0001 must be at least 0; try 0"),
    ],
)
def test_wrong_setting_is_one_line(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(*overrides)
    assert [str(problem) for problem in caught.value.problems] == [message]


def test_group_sets_what_a_resume_must_keep() -> None:
    adamw, muon = resolved(), resolved("optim=muon", "training.z_loss=1e-4", "model.mup.base_width=64")
    assert (adamw.optim.name, muon.optim.name) == (OptimizerName.adamw, OptimizerName.muon)
    facts = {"fingerprint": "f", "padded_vocab_size": 1, "tokenizer_sha256": "t"}
    found = [line.partition(":")[0] for line in differences(run_facts(adamw, **facts), run_facts(muon, **facts))]
    assert found == ["model.mup", "optim.name", "training.z_loss"]
    older = {k: v for k, v in run_facts(adamw, **facts).items() if k not in ("model.mup", "optim.name", "optim.muon")}
    older.pop("training.z_loss")
    assert differences(older, run_facts(adamw, **facts)) == []


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_muon_is_accepted_under_every_zero_stage(stage: int) -> None:
    settings = ds_config(resolved("optim=muon", "engine=deepspeed", f"deepspeed.zero_stage={stage}", *FP32), 1)
    assert settings["zero_allow_untested_optimizer"]  # else DeepSpeed takes only its own list
    assert not ds_config(resolved("engine=deepspeed"), 1)["zero_allow_untested_optimizer"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_plan_cuts_muons_states_evenly_under_zero(stage: int) -> None:
    """bf16 keeps fp32 weights and one moment of the layers' matrices, two of all others; the mean of the weights comes on top."""
    settings = ("experiment=ssa_1b_8k", "optim=muon", "engine=deepspeed", "precision.grad_reduce_in_fp32=false")
    machine = Machine(world_size=64, has_files=False)
    plan, averaged = (
        make_plan(
            resolve_config("plan", [*settings, f"deepspeed.zero_stage={stage}", f"optim.ema_decay={decay}"], machine),
            64,
        )
        for decay in (0, 0.5 if stage < 3 else 0)
    )
    matrices = 16 * 2048 * (2048 + 2 * 128 + 32 + 2048 + 3 * 8192)
    all_of_them = 12 * plan.parameters - 4 * matrices
    shards = 64 if stage else 1
    assert plan.optimizer_bytes == -(-all_of_them // shards)
    if stage < 3:
        assert averaged.optimizer_bytes == -(-(all_of_them + 4 * plan.parameters) // shards)


def test_plan_shards_muons_states_by_parameter() -> None:
    """At 64 data ranks the embedding's owner holds most: all of it, with AdamW's states."""
    settings = ("experiment=ssa_1b_8k", "engine.overlap_param_gather=false", "parallel.world_size=64")
    machine = Machine(world_size=64, has_files=False)
    plans = [make_plan(resolve_config("plan", [*settings, *more], machine), 64) for more in ((), ("optim=muon",))]
    embedding = 128_256 * 2048 * 12
    assert plans[0].optimizer_bytes < embedding <= plans[1].optimizer_bytes < 1.1 * embedding
    whole = [
        make_plan(
            resolve_config("plan", ["experiment=ssa_1b_8k", "engine.overlap_param_gather=false", *more], MACHINE), 1
        )
        for more in ((), ("optim=muon",))
    ]
    matrices = 16 * 2048 * (2048 + 2 * 128 + 32 + 2048 + 3 * 8192)
    assert whole[0].optimizer_bytes - whole[1].optimizer_bytes == 4 * matrices
    assert whole[0].checkpoint_bytes - whole[1].checkpoint_bytes == 4 * matrices
