"""The configuration tree: conversion of plain values, the problems of each section, saving and loading."""

import dataclasses
from enum import Enum
from pathlib import Path

import pytest
import yaml

from ssa_pretrain.config import Auto, Config, Method, WandbMode
from ssa_pretrain.settings.convert import config_from_dict, config_to_dict, known_keys, load_config, save_config
from ssa_pretrain.settings.problems import ConfigError


def nested(key: str, value: object) -> dict:
    """Returns a dictionary with one dotted key, and a data path so that nothing else is missing."""
    tree: dict = {"data": {"path": "somewhere"}}
    *sections, name = key.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
    node[name] = value
    return tree


def get(config: Config, key: str) -> object:
    value: object = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def test_defaults_survive_a_round_trip() -> None:
    tree = config_to_dict(Config())
    config, problems = config_from_dict(Config, tree)
    assert [str(p) for p in problems] == ["data.path is not set and has no default; give data.path=…"]
    assert config_to_dict(config) == tree
    assert set(tree["model"]) == {f.name for f in dataclasses.fields(type(config.model))}


@pytest.mark.parametrize(
    ("key", "given", "meant"),
    [
        ("optim.lr", "1e-3", 1e-3),  # a YAML 1.1 reader takes 1e-3 for text
        ("optim.lr", 1, 1.0),
        ("training.total_tokens", 100e9, 100_000_000_000),
        ("training.total_tokens", "1e9", 1_000_000_000),
        ("training.steps", "300", 300),
        ("parallel.sequence_parallel", "true", True),
        ("logging.wandb.mode", False, WandbMode.off),  # a YAML 1.1 reader takes off for false
        ("logging.wandb.tags", ["a", 7], ["a", "7"]),
        ("data.weights", {"english": 1, "python": "0.5"}, {"english": 1.0, "python": 0.5}),
        ("name", 7, "7"),
        ("attention.method", "moba", Method.moba),
    ],
)
def test_values_are_converted_to_their_type(key: str, given: object, meant: object) -> None:
    config, problems = config_from_dict(Config, nested(key, given))
    assert not problems
    assert get(config, key) == meant
    assert type(get(config, key)) is type(meant)


@pytest.mark.parametrize(
    ("key", "given", "message"),
    [
        ("optim.lr", "abc", "optim.lr=abc must be a number; try 0.001"),
        ("optim.lr", "", "optim.lr='' must be a number; try 0.001"),
        ("optim.lr", None, "optim.lr=null must be a number; try 0.001"),
        ("optim.lr", True, "optim.lr=true must be a number; try 0.001"),
        ("optim.lr", [1e-3], "optim.lr=[0.001] must be a number; try 0.001"),
        ("optim.lr", float("nan"), "optim.lr=nan must be a finite number; try 0.001"),
        ("optim.clip_grad", float("inf"), "optim.clip_grad=inf must be a finite number; try 1.0"),
        ("optim.clip_grad", "-inf", "optim.clip_grad=-inf must be a finite number; try 1.0"),
        ("training.steps", True, "training.steps=true must be a whole number; try 0"),
        ("training.steps", 2.5, "training.steps=2.5 must be a whole number; try 2 or 3"),
        ("training.steps", "many", "training.steps=many must be a whole number; try 0"),
        ("training.total_tokens", "100B", "training.total_tokens=100B must be a whole number; try 100e9"),
        ("training.total_tokens", "1.5 k", "training.total_tokens=1.5 k must be a whole number; try 1.5e3"),
        ("training.total_tokens", float("inf"), "training.total_tokens=inf must be a finite whole number; try 0"),
        ("attention.gate", 1, "attention.gate=1 must be true or false; try true"),
        ("attention.gate", "maybe", "attention.gate=maybe must be true or false; try true"),
        ("name", True, "name=true must be text; try run"),
        ("name", {"a": 1}, "name={...} must be text; try run"),
        ("logging.wandb.tags", "a", "logging.wandb.tags=a must be a list; try [a]"),
        ("data.stages", {"a": 1}, "data.stages={...} must be a list; try []"),
        ("data.packing", "bestfit", "data.packing=bestfit must be flow or best_fit; did you mean best_fit?"),
        ("data.weights", [1], "data.weights=[1] must be a mapping of names to values; try {name: 1.0}"),
        ("attention.method", "sas", "attention.method=sas must be ssa, full, moba or indexer; did you mean ssa?"),
        ("precision.name", "int4", "precision.name=int4 must be fp32, bf16 or fp8; try fp32"),
        ("optim", 5, "optim=5 is a section, not a value; it has the keys "),
        ("optim", None, "optim=null is a section, not a value; it has the keys "),
        ("optim.lrr", 1, "optim.lrr=1 is not a known key; did you mean optim.lr?"),
        ("model._target_", "os.system", "is not a key: nothing is instantiated from the configuration; remove it"),
        ("logging.wandb.api_key", "s3cret", "logging.wandb.api_key=<hidden> is a secret"),
        ("logging.wandb.key", "s3cret", "logging.wandb.key=<hidden> is a secret"),
        ("hf_token", "s3cret", "hf_token=<hidden> is a secret"),
    ],
)
def test_bad_value_names_key_value_rule_and_choice(key: str, given: object, message: str) -> None:
    config, problems = config_from_dict(Config, nested(key, given))
    assert len(problems) == 1
    assert message in str(problems[0])
    assert "s3cret" not in str(problems[0])
    if key in known_keys(Config):
        assert get(config, key) == get(Config(), key)  # the rest can still be checked


def test_all_problems_are_reported_together() -> None:
    tree = {"optim": {"lr": "abc", "lrr": 1}, "model": {"num_layers": 1.5}, "nothing": 1, "data": {"path": "x"}}
    _, problems = config_from_dict(Config, tree)
    assert sorted(p.key for p in problems) == ["model.num_layers", "nothing", "optim.lr", "optim.lrr"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.num_layers", 0, "model.num_layers=0 must be at least 1; try 1"),
        ("model.hidden_size", -8, "model.hidden_size=-8 must be at least 1; try 1"),
        ("model.vocab_size", -1, "model.vocab_size=-1 must be at least 0; try 0"),
        ("model.head_dim", 33, "model.head_dim=33 must be even: RoPE rotates pairs; try 32 or 34"),
        ("model.num_kv_heads", 3, "model.num_kv_heads=3 must divide model.num_attention_heads=4; try 2 or 4"),
        ("model.rope_theta", 0.0, "model.rope_theta=0.0 must be above 0; try 500000.0"),
        ("model.norm_eps", -1e-5, "model.norm_eps=-1e-05 must be above 0; try 1e-05"),
        ("attention.block_size", 24, "attention.block_size=24 must be 16, 32, 64 or 128 keys; try 16 or 32"),
        ("attention.block_size", 256, "attention.block_size=256 must be 16, 32, 64 or 128 keys; try 64 or 128"),
        ("attention.top_k", 0, "attention.top_k=0 must be at least 1; try 1"),
        ("attention.full_ratio", 1.5, "attention.full_ratio=1.5 must lie in 0 to 1; try 1"),
        ("attention.full_ratio", -0.5, "attention.full_ratio=-0.5 must lie in 0 to 1; try 0"),
        ("attention.alignment_weight", -1.0, "attention.alignment_weight=-1.0 must be at least 0"),
        ("data.sequence_length", 0, "data.sequence_length=0 must be at least 1; try 1"),
        ("data.weights", {"english": -1.0, "python": 2.0}, "data.weights.english=-1.0 must not be negative"),
        ("data.weights", {"english": 0.0}, "data.weights must have a positive sum; try data.weights={}"),
        ("parallel.tp", 0, "parallel.tp=0 must be at least 1; try 1"),
        ("parallel.world_size", -1, "parallel.world_size=-1 must be at least 0; try 0"),
        ("parallel.cp", 0, "parallel.cp=0 must be at least 1; try 1"),
        ("parallel.timeout_minutes", 0.0, "parallel.timeout_minutes=0.0 must lie in 0.1 to 1440; try 0.1"),
        ("parallel.hang_minutes", -1.0, "parallel.hang_minutes=-1.0 must be at least 0; try 0"),
        (
            "parallel.hang_minutes",
            10.0,
            "parallel.hang_minutes=10.0 must be less than parallel.timeout_minutes=10.0, or the collective times out first and "
            "names no rank; try 5, or 0 for 20 times a usual step",
        ),
        ("parallel.timeout_minutes", 2000.0, "parallel.timeout_minutes=2000.0 must lie in 0.1 to 1440; try 1440"),
        (
            "parallel.vpp",
            2,
            "parallel.vpp=2 interleaves pipeline stages, but parallel.pp=1 has only one; "
            "try parallel.vpp=1 or parallel.pp=2",
        ),
        (
            "parallel.sequence_parallel",
            True,
            "parallel.sequence_parallel=true shards the sequence over tensor-parallel ranks, but "
            "parallel.tp=1 has only one; try parallel.sequence_parallel=false or parallel.tp=2",
        ),
        ("deepspeed.zero_stage", 4, "deepspeed.zero_stage=4 must be 0, 1, 2 or 3; try 3"),
        ("deepspeed.reduce_bucket_size", 0, "deepspeed.reduce_bucket_size=0 must be above 0; try 500000000"),
        (
            "engine.overlap_param_gather",
            True,
            "engine.overlap_param_gather=true needs engine.overlap_grad_reduce=true; "
            "try engine.overlap_param_gather=false",
        ),
        ("optim.lr", 0.0, "optim.lr=0.0 must be above 0; try 0.001"),
        ("optim.lr", -1e-3, "optim.lr=-0.001 must be above 0; try 0.001"),
        ("optim.lr", 30.0, "optim.lr=30.0 must be at most 1; AdamW's usual peak is 1e-4 to 1e-2"),
        ("optim.min_lr", 0.01, "optim.min_lr=0.01 must not exceed optim.lr=0.001; try 0.0001 or 0"),
        ("optim.warmup_fraction", 2000.0, "optim.warmup_fraction=2000.0 must lie in 0 to 1; try 1"),
        ("optim.beta2", 1.0, "optim.beta2=1.0 must be at least 0 and below 1; try 0.95"),
        ("optim.clip_grad", -1.0, "optim.clip_grad=-1.0 must be at least 0; try 0"),
        ("training.micro_batch_size", 0, "training.micro_batch_size=0 must be at least 1; try 1"),
        ("training.stop_at_step", -1, "training.stop_at_step=-1 must be at least 0; try 0"),
        (
            "training.total_tokens",
            10_000,
            "training.steps=10 and training.total_tokens=10000 both set the length of the run; try training.steps=0 or training.total_tokens=0",
        ),
        (
            "training.steps",
            0,
            "training.steps=0 and training.total_tokens=0 leave the length of the run undefined; try training.steps=300, "
            "or start from an experiment: experiment=quickstart",
        ),
        (
            "training.global_batch_tokens",
            0,
            "training.global_batch_tokens=0 must be set to the tokens per optimizer step over all ranks; try 8192",
        ),
        ("evaluation.rows", -1, "evaluation.rows=-1 must be at least 0; try 0"),
        ("checkpoint.interval", -5, "checkpoint.interval=-5 must be at least 0; try 0"),
        ("checkpoint.keep", 0, "checkpoint.keep=0 must be at least 1; try 1"),
        (
            "checkpoint.mean_hours_between_failures",
            -1.0,
            "checkpoint.mean_hours_between_failures=-1.0 must be at least 0; try 0",
        ),
        (
            "checkpoint.mirror",
            "/backup",
            "checkpoint.mirror=/backup must be the address of a bucket; try s3://BUCKET/PREFIX",
        ),
        (
            "checkpoint.mirror",
            "s3://key:secret@bucket",
            "checkpoint.mirror=s3://key:secret@bucket must be the address of a bucket; try s3://BUCKET/PREFIX",
        ),
        ("logging.interval", 0, "logging.interval=0 must be at least 1; try 1"),
        ("name", " ", "name=  must not be empty; try run"),
        ("output_dir", "", "output_dir='' must not be empty; try run"),
        ("seed", -1, "seed=-1 must lie in 0 to 4294967295; try 1234"),
    ],
)
def test_section_reports_its_problems(key: str, value: object, message: str) -> None:
    tree = nested(key, value)
    training = {"steps": 10, "global_batch_tokens": 512} | tree.get("training", {})
    config, problems = config_from_dict(Config, tree | {"training": training})
    assert not problems
    found = [str(p) for p in config.problems()]
    assert len(found) == 1
    assert message in found[0]


def test_rules_over_two_fields_of_a_section() -> None:
    base = {"data": {"path": "x"}, "training": {"steps": 10, "global_batch_tokens": 512}}
    for section, message in (
        (
            {"attention": {"score": "official_compat", "top_k": 32}},
            "attention.top_k=32 must lie in 2 to attention.block_size=16 under attention.score=official_compat; try 16",
        ),
        (
            {"model": {"rope_scaling": {"enabled": True, "factor": 0.5}}},
            "model.rope_scaling.factor=0.5 must lie in 1 to 64; try 1",
        ),
        (
            {"logging": {"wandb": {"mode": "online", "project": ""}}},
            "logging.wandb.project='' must name a project; try ssa_pretrain",
        ),
    ):
        config, problems = config_from_dict(Config, base | section)
        assert not problems
        assert [str(p) for p in config.problems()] == [message]
    quiet = {"parallel": {"pp": 2, "vpp": 2}, "model": {"rope_scaling": {"enabled": False, "factor": 0.5}}}
    assert config_from_dict(Config, base | quiet)[0].problems() == []


def test_saving_and_loading_returns_the_same_configuration(tmp_path: Path) -> None:
    config, _ = config_from_dict(
        Config,
        {
            "name": "yes",  # texts that YAML would take for something else
            "output_dir": "1e5",
            "data": {"path": "null", "weights": {"on": 0.1}},
            "optim": {"lr": 3e-5, "eps": 1e-15},
            "logging": {"wandb": {"tags": ["01", "a: b"]}},
        },
    )
    save_config(config, tmp_path / "deep" / "config.yaml")
    assert load_config(Config, tmp_path / "deep" / "config.yaml") == config
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["config.yaml"]


def test_saved_yaml_is_plain(tmp_path: Path) -> None:
    config = Config()
    config.data.path = "x"
    save_config(config, tmp_path / "config.yaml")
    tree = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert tree == config_to_dict(config)

    def leaves(node: object) -> list[object]:
        if isinstance(node, dict):
            return [leaf for child in node.values() for leaf in leaves(child)]
        return [node]

    assert not any(isinstance(leaf, Enum) for leaf in leaves(config_to_dict(config)))


def test_loading_another_file_fails(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("- a list\n")
    with pytest.raises(ConfigError, match=r"config\.yaml does not hold a configuration"):
        load_config(Config, path)
    path.write_text("optim: {lrr: 1}\ndata: {path: x}\n")
    with pytest.raises(ConfigError, match=r"optim\.lrr=1 is not a known key; did you mean optim\.lr\?"):
        load_config(Config, path)


@pytest.mark.parametrize(("given", "kept"), [("auto", Auto.auto), (25, 25), ("25", 25), ("1e2", 100)])
def test_interval_is_a_number_or_auto(given: object, kept: object) -> None:
    config, problems = config_from_dict(Config, {"checkpoint": {"interval": given}})
    assert not problems and config.checkpoint.interval == kept and type(config.checkpoint.interval) is type(kept)
    assert config_to_dict(config)["checkpoint"]["interval"] == (kept if isinstance(kept, int) else "auto")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("automatic", "checkpoint.interval=automatic must be a whole number or auto; try auto"),
        (None, "checkpoint.interval=null must be a whole number or auto; try auto"),
        ("3k", "checkpoint.interval=3k must be a whole number or auto; try 3e3"),
    ],
)
def test_interval_that_is_neither_is_reported(given: object, message: str) -> None:
    _, problems = config_from_dict(Config, {"checkpoint": {"interval": given}})
    assert [str(problem) for problem in problems] == [message]
