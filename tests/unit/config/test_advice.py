"""Advice works: applied to the command, it removes the problem and causes no other one."""

import copy
import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ssa_pretrain.cli import CONF, resolve_config
from ssa_pretrain.config import Config
from ssa_pretrain.config.advice import GROUP_KEYS, in_keys_only, settings_advised, with_tried_advice
from ssa_pretrain.config.machine import Machine
from ssa_pretrain.config.rules import check
from ssa_pretrain.settings.compose import Source, check_overrides, compose, hydra_on
from ssa_pretrain.settings.convert import config_from_dict, known_keys
from ssa_pretrain.settings.problems import ConfigError, Problem

MACHINES = (
    Machine(world_size=8, has_files=False),
    Machine(world_size=8, has_gpu=False, has_transformer_engine=False, has_deepspeed=False, has_files=False),
    Machine(world_size=8, has_gpu=True, has_transformer_engine=True, has_deepspeed=True, has_files=False),
)
RUNS = (
    ("experiment=ssa_1b_8k",),
    ("experiment=quickstart", "training.global_batch_tokens=16384"),
    ("experiment=ssa_1b_32k", "parallel=tp2_sp_cp2"),
    ("experiment=ssa_1b_8k", "engine=deepspeed", "parallel=tp2"),
    ("experiment=ssa_1b_8k", "parallel.pp=4", "parallel.vpp=2"),
    ("experiment=ssa_1b_8k", "precision=fp8"),
    ("experiment=moba_1b_8k", "attention.score=official_compat", "attention.top_k=8"),
)
VALUES = ("-5", "0", "1", "3", "7", "24", "1000", "-0.5", "1.5", "true", "abc", "null", "1e12", "''")
FREE = (
    "data.path",
    "name",
    "output_dir",
    "deepspeed.extra",
    "dry_run",
    "data.weights",
    "data.stages",
    "data.index_path",
    "logging.wandb.tags",
    "profile.at",
    "training.skip_steps",
    "training.batch_steps",
    "optim.pieces",
    "evaluation.tasks",
    "evaluation.lm_eval.tasks",
)


def problems(arguments: Sequence[str], machine: Machine, entry: str = "train") -> list[Problem]:
    try:
        resolve_config(entry, arguments, machine)
    except ConfigError as error:
        return list(error.problems)
    return []


def composed(arguments: Sequence[str]) -> dict[str, Any]:
    source = Source(Config, CONF)
    with hydra_on(source):
        overrides, found = check_overrides(arguments, source)
        assert not found
        return compose(overrides, source)[0]


def checked(tree: dict[str, Any], machine: Machine) -> list[Problem]:
    """Returns the problems of a composed configuration, as the command line reports them."""
    config, found = config_from_dict(Config, tree)
    found += check(config, machine, {problem.key for problem in found})
    return with_tried_advice(found, config, machine)


def with_setting(tree: dict[str, Any], key: str, value: str) -> dict[str, Any]:
    changed = copy.deepcopy(tree)
    *sections, name = GROUP_KEYS.get(key, key).split(".")
    node = changed
    for section in sections:
        node = node[section]
    node[name] = value
    return changed


def test_advised_settings_are_accepted() -> None:
    """Invalid values of many keys, in several runs on several machines: a sample of 20,000 cases."""
    draw, tried, strict = random.Random(13), 0, 0
    keys = [key for key in known_keys(Config) if key not in FREE]
    for run in RUNS:
        tree = composed([*run, "data.path=somewhere"])
        for machine, key, value in draw.sample(list(itertools.product(MACHINES, keys, VALUES)), 200):
            typed = with_setting(tree, key, value)
            found = checked(typed, machine)
            for problem, setting in ((each, setting) for each in found for setting in settings_advised(each)):
                name, _, advised = setting.partition("=")
                if GROUP_KEYS.get(name, name) not in known_keys(Config):
                    continue
                tried += 1
                left = {other.key for other in checked(with_setting(typed, name, advised), machine)}
                allowed = {other.key for other in found} - {problem.key, name}
                strict += left <= allowed
                assert problem.key not in left, (run, machine, f"{key}={value}", str(problem), setting, left)
    assert tried > 500
    assert strict > 0.9 * tried  # the rest are first steps, where no value of the key will do by itself


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (("training.steps=-5",), "training.steps=-5 must be at least 0; try 5"),
        (("training.steps=-5", "training.total_tokens=1e6"), "training.steps=-5 must be at least 0; try 0"),
        (("training.steps=0", "training.total_tokens=-7"), "training.total_tokens=-7 must be at least 0; try 7"),
        (("training.total_tokens=1e6",), "and training.total_tokens=1000000 both set the length of the run; try training.steps=0 or training.total_tokens=0"),
        (("training.global_batch_tokens=0",), "over all ranks; try 8192"),
        (("deepspeed.zero_stage=7",), "deepspeed.zero_stage=7 must be 0, 1, 2 or 3; try 1"),
        (("deepspeed.zero_stage=2", "parallel.cp=2"), "deepspeed.zero_stage=2 has no effect under engine=megatron; try 1"),
        (("data.sequence_length=1000",), "data.sequence_length=1000 must be a multiple of attention.block_size=16; try 512 or 1024"),
        (("engine.overlap_tp=1",), "engine.overlap_tp=1 must be true or false; try false"),
        (("model.num_layers=-0.5",), "model.num_layers=-0.5 must be a whole number; try 1"),
    ],
)  # fmt: skip
def test_advice_breaks_no_other_rule(typed: tuple[str, ...], message: str) -> None:
    world = 2 if "parallel.cp=2" in typed else 1
    found = [
        str(problem)
        for problem in problems(["experiment=quickstart", *typed], Machine(world_size=world, has_files=False))
    ]
    assert any(message in line for line in found), found


@pytest.mark.parametrize("entry", ["train", "evaluate"])
def test_advice_names_the_entry_point(entry: str) -> None:
    (found,) = problems(
        ["experiment=quickstart", "parallel=tp2"], Machine(world_size=1, has_files=False, entry=entry), entry
    )
    assert {"train": "evaluate", "evaluate": ".train"}[entry] not in str(found)
    if entry == "evaluate":
        assert found.advice.startswith(
            "try parallel=dp, since a checkpoint loads on any layout, or launchers/torchrun.sh "
        )
        assert found.advice.endswith("--nproc-per-node 2 --module ssa_pretrain.evaluate …")
    (found,) = problems(
        ["experiment=quickstart", "parallel.world_size=2"], Machine(world_size=1, entry=entry, splits=()), entry
    )[:1]
    assert f"leave it at 0 to {entry}" in str(found)


def test_advice_for_a_configuration_without_groups_uses_keys() -> None:
    assert in_keys_only("try engine=megatron or parallel.cp=1") == "try engine.name=megatron or parallel.cp=1"
    assert (
        in_keys_only("try precision=bf16 or attention.impl=reference")
        == "try precision.name=bf16 or attention.impl=reference"
    )
    in_keys = in_keys_only("try parallel=dp").removeprefix("try ").split()
    parallel = composed(["experiment=quickstart", "parallel=tp2_sp_cp2", *in_keys])["parallel"]
    assert {name: parallel[name] for name in ("tp", "pp", "vpp", "cp")} == dict.fromkeys(("tp", "pp", "vpp", "cp"), 1)
    assert parallel["sequence_parallel"] is False


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "conf/experiment/quickstart.yaml",
            "conf/experiment/quickstart.yaml is a file, not key=value; did you mean experiment=quickstart?",
        ),
        (
            "experiment=conf/experiment/quickstart.yaml",
            "is not an option of the group experiment; did you mean experiment=quickstart?",
        ),
        ("experiment=quickstart.yaml", "is not an option of the group experiment; did you mean experiment=quickstart?"),
        (
            "experiment=/tmp/nowhere/quikstart.yaml",
            "is not an option of the group experiment; did you mean experiment=quickstart?",
        ),
        (
            "experiments/quikstart.yaml",
            "experiments/quikstart.yaml is not key=value; did you mean experiment=quickstart?",
        ),
        ("outputs/nowhere", "outputs/nowhere is not key=value; see --explain experiment for all experiments"),
        ("docs/results", "docs/results is a folder, not key=value; see --help"),
    ],
)
def test_path_as_an_argument_gets_advice(word: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONF.parent)
    found = problems([word, "model.vocab_size=512"], Machine(world_size=1, has_files=False))[0]
    assert message in str(found)


def test_path_as_an_argument_is_the_only_problem(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: mine\n")
    found = [str(problem) for problem in problems([str(tmp_path)], Machine(world_size=1, has_files=False))]
    assert found == [
        f"{tmp_path} is a folder, not key=value; try -cp {tmp_path} output_dir={tmp_path} to continue that run"
    ]
