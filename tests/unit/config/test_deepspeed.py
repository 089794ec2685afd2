"""DeepSpeed's configuration: what is generated, what `deepspeed.extra` may set, and what is rejected before anything is built."""

import pytest

from ssa_pretrain.cli import resolve_config
from ssa_pretrain.config import Config
from ssa_pretrain.config.deepspeed import ds_config
from ssa_pretrain.config.machine import Machine
from ssa_pretrain.settings.problems import ConfigError

MACHINE = Machine(world_size=2, has_gpu=True, has_transformer_engine=True, has_deepspeed=True, has_files=False)
PAPER = ("experiment=ssa_1b_8k", "engine=deepspeed", "model.vocab_size=128256")


def resolve(*overrides: str, machine: Machine = MACHINE) -> Config:
    return resolve_config("train", [*PAPER, *overrides], machine)


def problems(*overrides: str, machine: Machine = MACHINE) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(*overrides, machine=machine)
    return [str(problem) for problem in caught.value.problems]


def test_batch_clipping_precision_and_stage_follow_the_configuration() -> None:
    settings = ds_config(
        resolve("deepspeed.zero_stage=2", "deepspeed.offload_optimizer=true", "optim.clip_grad=0.5"), dp=2
    )
    assert (settings["train_batch_size"], settings["train_micro_batch_size_per_gpu"]) == (384, 2)
    assert settings["gradient_accumulation_steps"] == 384 // 2 // 2
    assert settings["gradient_clipping"] == 0.5
    assert settings["bf16"] == {"enabled": True}
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
    zero = settings["zero_optimization"]
    assert (zero["stage"], zero["overlap_comm"], zero["contiguous_gradients"]) == (2, True, True)
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert not any(settings[monitor]["enabled"] for monitor in ("tensorboard", "wandb", "csv_monitor"))


def test_gradients_in_bf16_and_a_run_in_fp32() -> None:
    low = ds_config(resolve("precision.grad_reduce_in_fp32=false"), dp=1)
    assert low["communication_data_type"] == low["data_types"]["grad_accum_dtype"] == "bf16"
    full = ds_config(resolve("precision=fp32", "attention.impl=reference", "precision.grad_reduce_in_fp32=false"), dp=1)
    assert full["bf16"] == {"enabled": False} and full["communication_data_type"] == "fp32"


def test_extra_adds_nested_keys_and_may_repeat_generated_ones() -> None:
    extra = (
        "deepspeed.extra.zero_optimization.stage3_prefetch_bucket_size=7",
        "+deepspeed.extra.comms_logger={enabled: true}",
    )
    settings = ds_config(
        resolve(*extra, "deepspeed.extra.zero_optimization.stage=1", "deepspeed.extra.gradient_clipping=1.0"), dp=1
    )
    assert settings["zero_optimization"]["stage3_prefetch_bucket_size"] == 7
    assert settings["zero_optimization"]["reduce_scatter"] is True
    assert settings["comms_logger"] == {"enabled": True}


@pytest.mark.parametrize(
    ("extra", "line"),
    [
        (
            "zero_optimization.stage=3",
            "deepspeed.extra.zero_optimization.stage=3 contradicts this run's 1; leave it out, or set deepspeed.zero_stage",
        ),
        (
            "zero_optimization={stage: 2}",
            "deepspeed.extra.zero_optimization.stage=2 contradicts this run's 1; leave it out, or set deepspeed.zero_stage",
        ),
        (
            "gradient_clipping=2",
            "deepspeed.extra.gradient_clipping=2 contradicts this run's 1.0; leave it out, or set optim.clip_grad",
        ),
        (
            "train_batch_size=8",
            "deepspeed.extra.train_batch_size=8 is computed from the batch; "
            "set training.global_batch_tokens and training.micro_batch_size",
        ),
        ("fp16.enabled=true", "deepspeed.extra.fp16.enabled=true is set elsewhere; set precision"),
        ("wandb.enabled=true", "deepspeed.extra.wandb.enabled=true is set elsewhere; set logging=wandb"),
        (
            "optimizer.type=Adam",
            "deepspeed.extra.optimizer.type=Adam is set elsewhere; set optim.lr and the rest of optim",
        ),
        (
            "zero_optimisation.stage=1",
            "deepspeed.extra.zero_optimisation.stage=1 is not a key that is passed on to DeepSpeed; did you mean zero_optimization?",
        ),
    ],
)
def test_extra_may_not_contradict_generated_keys(extra: str, line: str) -> None:
    assert problems(f"deepspeed.extra.{extra}") == [line]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ("parallel=pp2",),
            "parallel.pp=2 is not supported under engine=deepspeed: its pipelines need a model built from its own pipeline classes; "
            "try engine=megatron",
        ),
        (
            ("precision=fp8",),
            "precision.name=fp8 is not supported under engine=deepspeed, which runs bf16 and fp32; try engine=megatron",
        ),
        (
            ("deepspeed.zero_stage=0",),
            "deepspeed.zero_stage=0 keeps gradients in bf16 under precision=bf16, but precision.grad_reduce_in_fp32=true asks for "
            "fp32; try 1",
        ),
        (
            ("deepspeed.zero_stage=0", "deepspeed.offload_optimizer=true", "precision.grad_reduce_in_fp32=false"),
            "deepspeed.offload_optimizer=true needs sharded optimizer states, but deepspeed.zero_stage=0 shards nothing; "
            "try deepspeed.zero_stage=2",
        ),
        (
            ("engine=megatron", "deepspeed.zero_stage=2"),
            "deepspeed.zero_stage=2 has no effect under engine=megatron; add engine=deepspeed",
        ),
    ],
)
def test_unsupported_settings_name_the_alternative(overrides: tuple[str, ...], line: str) -> None:
    assert problems(*overrides) == [line]


def test_without_deepspeed_the_engine_is_rejected() -> None:
    without = Machine(world_size=2, has_gpu=True, has_transformer_engine=True, has_deepspeed=False, has_files=False)
    (line,) = problems(machine=without)
    rule = "engine.name=deepspeed needs DeepSpeed, which is not installed"
    assert line == rule + '; try pip install --no-build-isolation -e ".[deepspeed]", or engine=megatron'


def test_context_parallelism_names_the_engine_that_has_it() -> None:
    line = "parallel.cp=2 needs engine.name=megatron; try engine=megatron or parallel.cp=1"
    assert problems("parallel.cp=2") == [line]
    assert problems("parallel=tp2_sp", "engine.overlap_tp=true") == [
        "engine.overlap_tp=true is not supported under engine=deepspeed: it cannot share Transformer Engine's user buffers; "
        "try engine=megatron or engine.overlap_tp=false"
    ]
