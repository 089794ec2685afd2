"""Text settings are kept as typed, on the command line and in YAML; numbers stay numbers; text that cannot be kept is refused."""

from pathlib import Path

import pytest

from data_prep.cli import read_config
from ssa_pretrain.cli import resolve_config
from ssa_pretrain.config import Config, WandbMode
from ssa_pretrain.config.machine import Machine
from ssa_pretrain.settings.convert import load_config, save_config
from ssa_pretrain.settings.problems import ConfigError

RUN = ("experiment=quickstart",)
WORDS = (
    "2026_11_29",
    "12e3",
    "1.50",
    "007",
    "0x10",
    "0b1",
    "1_000.5",
    ".5",
    "+5",
    "-1",
    "1E5",
    "true",
    "FALSE",
    "null",
    "inf",
    "NaN",
)
WORDS += ("2026-11-29", "12:30:00", "yes", "off", "run_1", "1e3 b", "0.10")


def resolved(*arguments: str) -> Config:
    return resolve_config("train", (*RUN, *arguments), Machine(world_size=1, has_files=False))


def test_command_line_text_is_kept_as_typed() -> None:
    for word in ("2026_11_29", "12e3", "1.50", "null", "true"):
        config = resolved(f"name={word}", f"++data.path='{word}'", f"logging.wandb={{group: {word}, tags: [{word},a]}}")
        assert (config.name, config.output_dir, config.data.path) == (word, f"outputs/{word}", word)
        assert (config.logging.wandb.group, config.logging.wandb.tags) == (word, [word, "a"])
    assert resolved(f"logging.wandb.tags=[{','.join(WORDS)}]").logging.wandb.tags == list(WORDS)
    quoted = ", ".join(f"'{word}'" for word in WORDS)
    assert resolved(f"logging.wandb.tags=[ {quoted} ]").logging.wandb.tags == list(WORDS)


def test_text_in_a_user_file_is_kept_as_typed(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "logging").mkdir()
    words = [word for word in WORDS if word != "null"]
    weights = "".join(f"    {word}: 1e0\n" for word in words)
    mine = f"# @package _global_\ndefaults: [quickstart]\nname: 2026_11_29\ndata:\n  weights:\n{weights}optim: {{lr: 1e-2}}\nseed: 0x10\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(mine)
    tags = "".join(f"    - {word}  # a remark\n" for word in words)
    (tmp_path / "logging" / "mine.yaml").write_text(f"wandb:\n  mode: off\n  entity: 1e3\n  tags:\n{tags}")
    config = resolved("-cd", str(tmp_path), "experiment=mine", "logging=mine")
    assert (config.name, config.logging.wandb.entity, config.logging.wandb.tags) == ("2026_11_29", "1e3", words)
    assert (config.data.weights, config.optim.lr, config.seed) == (dict.fromkeys(words, 1.0), 1e-2, 16)
    assert config.logging.wandb.mode is WandbMode.off


def test_options_may_have_names_like_numbers(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    for name in ("2026_11_29", "1e3"):
        (tmp_path / "experiment" / f"{name}.yaml").write_text(
            f"# @package _global_\ndefaults: [quickstart]\nname: of_{name}\n"
        )
        assert resolved("-cd", str(tmp_path), f"experiment={name}").name == f"of_{name}"


@pytest.mark.parametrize("name", ["1e3", "null", "2026-11-29"])
def test_saved_configuration_round_trips(name: str, tmp_path: Path) -> None:
    config = resolved(f"name={name}", f"logging.wandb.tags=[{','.join(WORDS)}]", "optim.lr=1e-5")
    save_config(config, tmp_path / "config.yaml")
    assert load_config(Config, tmp_path / "config.yaml") == config
    assert resolve_config("train", ["-cp", str(tmp_path)], Machine(world_size=1, has_files=False)) == config


def test_configuration_edited_by_hand_is_read_as_typed(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "name: 2026_11_29\ndata: {path: 007}\nlogging: {wandb: {group: 1e3, tags: [2026-11-29]}}\n", encoding="utf-8"
    )
    config = load_config(Config, path)
    assert (config.name, config.data.path) == ("2026_11_29", "007")
    assert (config.logging.wandb.group, config.logging.wandb.tags) == ("1e3", ["2026-11-29"])


def test_names_in_a_mapping_are_text() -> None:
    config = resolved("data.weights={2024_01: 1, b: 2_0}", "data.weights.2024_02=0.5")
    assert config.data.weights == {"2024_01": 1.0, "b": 20.0, "2024_02": 0.5}


def test_text_that_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match="data.weights={1e3: 1} has the name 1e3, which the command line reads as a number; put",  # noqa: RUF043
    ):
        resolved("data.weights={1e3: 1}")
    with pytest.raises(
        ConfigError,
        match="data.weights.1e3=1 has a name that the command line cannot take; put the mapping into a YAML",  # noqa: RUF043
    ):
        resolved("data.weights.1e3=1")
    with pytest.raises(
        ConfigError,
        match="mix.weights={1e3: 1} has the name 1e3, which the command line reads as a number; put",  # noqa: RUF043
    ):
        read_config(["out=x", "mix.weights={1e3: 1}"])
    (tmp_path / "logging").mkdir()
    (tmp_path / "logging" / "mine.yaml").write_text("wandb: {entity: null}\n")
    with pytest.raises(ConfigError, match="logging.wandb.entity=null must be text"):  # noqa: RUF043
        resolved("-cd", str(tmp_path), "logging=mine")


def test_numbers_stay_numbers() -> None:
    config = resolved(
        "optim.lr=1e-3", "training.steps=1_0", "seed=12", "attention.gate=true", "profile.at=[1,2]", "optim.eps=.5"
    )
    assert (config.optim.lr, config.training.steps, config.seed, config.attention.gate) == (1e-3, 10, 12, True)
    assert (config.profile.at, config.optim.eps) == ([1, 2], 0.5)
    breakdown = resolved("engine=deepspeed", "deepspeed.extra={wall_clock_breakdown: true}").deepspeed.extra
    assert breakdown == {"wall_clock_breakdown": True}


def test_interpolations_within_lists_are_resolved() -> None:
    assert resolved("name=1e3", "logging.wandb.tags=[${name},x]").logging.wandb.tags == ["1e3", "x"]


def test_data_prep_keeps_text_as_typed() -> None:
    words = ",".join(WORDS)
    own = read_config(["source=jsonl", f"source.paths=[{words}]", "source.text_column=1e3", "out=2026_11_29"])
    assert (own.source.paths, own.source.text_column, own.out) == (list(WORDS), "1e3", "2026_11_29")
    named = [
        "tokenizer=file",
        "tokenizer.path=null",
        "tokenizer.eos_token=1_0",
        "executor=slurm",
        "executor.partition=007",
        "out=true",
    ]
    sbatch = ",".join(f"x{i}: {word}" for i, word in enumerate(WORDS))
    found = read_config([*named, f"executor.sbatch={{{sbatch}}}"])
    assert (found.tokenizer.path, found.tokenizer.eos_token, found.out) == ("null", "1_0", "true")
    assert (found.executor.partition, list(found.executor.sbatch.values())) == ("007", list(WORDS))


def test_data_prep_mixed_sources_and_nulls() -> None:
    parts = "source.parts={web: {kind: jsonl, paths: [2024_01, 1e3]}}"
    mixed = read_config(
        ["source=mixed", parts, "source.parts.docs.kind=text", "source.parts.docs.paths=[007]", "out=x"]
    )
    assert mixed.problems() == []
    assert [part.paths for part in mixed.source.settings()] == [["2024_01", "1e3"], ["007"]]
    hub = read_config(
        [
            "source=hub",
            "source.repo=a/b",
            "source.endpoint=null",
            "source.revision=1e3",
            "source.part_mb=1e3",
            "source.subsets.2024_01.limit_gb=2",
            "out=x",
        ]
    )
    assert hub.source.subsets["2024_01"].limit_gb == 2
    assert (hub.source.endpoint, hub.source.revision, hub.source.part_mb) == (None, "1e3", 1000.0)
    weights = read_config(["out=x", "mix.weights={2024_01: 1, b: 2}", "workers=1_0"])
    assert (weights.mix.weights, weights.workers) == ({"2024_01": 1.0, "b": 2.0}, 10)
