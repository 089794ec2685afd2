"""The command line: Hydra's semantics for valid commands, one message for bad ones, no import of torch and no output of Hydra's own."""

import dataclasses
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ssa_pretrain.cli import CONF, read_config, resolve_config
from ssa_pretrain.config import Config, Method, PrecisionName
from ssa_pretrain.config.machine import Machine, this_machine
from ssa_pretrain.planning.plan import make_plan
from ssa_pretrain.planning.table import describe
from ssa_pretrain.settings.convert import known_keys, load_config, save_config
from ssa_pretrain.settings.problems import ConfigError

ROOT = CONF.parent
PLAN = Machine(world_size=1, has_files=False)
PROGRAM = """
import sys
from ssa_pretrain.cli import read_config
try:
    config = read_config("train")
finally:
    heavy = {"torch", "megatron", "transformer_engine", "transformers"} & set(sys.modules)
    print("imported", sorted(heavy), file=sys.stderr)
"""


def resolved(*arguments: str, machine: Machine = PLAN) -> Config:
    return resolve_config("train", arguments, machine)


def lines(*arguments: str, machine: Machine = PLAN) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve_config("train", arguments, machine)
    return [str(problem) for problem in caught.value.problems]


def run(*arguments: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a separate process, as an entry point does."""
    dropped = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "COLUMNS": "120"} | variables
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


# --- what Hydra's users expect ---


def test_groups_experiments_and_overrides_compose() -> None:
    config = resolved("experiment=ssa_1b_8k", "attention=full", "model=llama_300m", "precision=fp32", "optim.lr=2e-3")
    assert (config.attention.method, config.model.name) == (Method.full, "llama_300m")
    assert (config.precision.name, config.optim.lr, config.optim.beta2) == (PrecisionName.fp32, 2e-3, 0.95)
    assert config.training.total_tokens == 100_000_000_000
    assert config.output_dir == "outputs/ssa_1b_8k"  # interpolated


def test_no_experiment_may_be_given_explicitly() -> None:
    assert resolved("experiment=null", "training.steps=2", "training.global_batch_tokens=512").training.steps == 2


def test_override_beats_experiment_and_the_last_one_wins() -> None:
    config = resolved("optim.lr=0.5", "experiment=quickstart", "optim.lr=0.25", "name=mine")
    assert config.optim.lr == 0.25
    assert config.output_dir == "outputs/mine"


@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_known_key_or_group_may_have_hydra_prefixes(sign: str) -> None:
    config = resolved(f"{sign}experiment=quickstart", f"{sign}optim.lr=0.25", f"{sign}data.weights.english=0.5")
    assert (config.name, config.optim.lr, config.data.weights) == ("quickstart", 0.25, {"english": 0.5})


def test_section_may_be_given_as_a_mapping() -> None:
    whole = resolved("experiment=quickstart")
    config = resolved("experiment=quickstart", "training={steps: 5, micro_batch_size: 1}", "logging.wandb.tags=[a,b]")
    assert config.training == dataclasses.replace(whole.training, steps=5, micro_batch_size=1)
    assert config.logging.wandb.tags == ["a", "b"]


def test_user_folder_adds_options(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    mine = "# @package _global_\ndefaults:\n  - quickstart\nname: mine\noptim:\n  lr: 1e-2\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(mine)
    config = resolved("-cd", str(tmp_path), "experiment=mine")
    assert (config.name, config.optim.lr, config.model.name) == ("mine", 1e-2, "quickstart")
    assert "did you mean experiment=mine?" in lines("--config-dir", str(tmp_path), "experiment=mien")[0]


def test_problems_in_a_user_file_are_listed(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    mine = "# @package _global_\ndefaults:\n  - quickstart\noptim:\n  lrr: 1e-2\n  lr: fast\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(mine)
    assert lines("-cd", str(tmp_path), "experiment=mine") == [
        "optim.lrr=0.01 is not a known key; did you mean optim.lr?",
        "optim.lr=fast must be a number; try 0.001",
    ]
    (tmp_path / "experiment" / "mine.yaml").write_text("a: [1,\n")
    assert "the configuration does not compose: " in lines("-cd", str(tmp_path), "experiment=mine")[0]
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ndefaults:\n  - override /model: lama\n")
    assert "the configuration does not compose: " in lines("-cd", str(tmp_path), "experiment=mine")[0]


def test_saved_configuration_runs_again(tmp_path: Path) -> None:
    first = resolved("experiment=quickstart", "optim.lr=0.25", "data.weights.english=0.5")
    save_config(first, tmp_path / "config.yaml")
    assert resolved("-cp", str(tmp_path)) == first == load_config(Config, tmp_path / "config.yaml")
    assert resolved("-cp", str(tmp_path), "-cn", "config.yaml", "optim.lr=0.125").optim.lr == 0.125


def test_saved_configuration_has_no_groups(tmp_path: Path) -> None:
    save_config(resolved("experiment=quickstart"), tmp_path / "config.yaml")
    (tmp_path / "data").mkdir()  # a run's folder may hold one; it is no group
    whole = f"is not a value, and {tmp_path / 'config'}.yaml is a whole configuration without groups; set single keys, such as "
    assert lines("-cp", str(tmp_path), "attention=full") == [f"attention=full {whole}attention.method=full"]
    assert lines("-cp", str(tmp_path), "parallel=tp2") == [f"parallel=tp2 {whole}parallel.tp=…"]
    assert resolved("-cp", str(tmp_path), "attention.method=full").attention.method is Method.full
    assert resolved("-cp", str(tmp_path), "attention={top_k: 8}").attention.top_k == 8


def test_local_rank_of_a_launcher_is_ignored() -> None:
    assert resolved("--local_rank=1", "experiment=quickstart").name == "quickstart"
    assert resolved("experiment=quickstart", "--local-rank", "1").name == "quickstart"


# --- bad commands ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("optim.lrr=1",), "optim.lrr=1 is not a known key; did you mean optim.lr?"),
        (("+optim.lrr=1",), "optim.lrr=1 is not a known key; did you mean optim.lr?"),
        (("++optim.lrr=1",), "optim.lrr=1 is not a known key; did you mean optim.lr?"),
        (("lr=1",), "lr=1 is not a known key; did you mean optim.lr?"),
        (("trainer.max_steps=1",), "trainer.max_steps=1 is not a known key; did you mean training.steps?"),
        (("wandb.mode=online",), "wandb.mode=online is not a known key; did you mean logging.wandb.mode?"),
        (("optim.lr.x=1",), "optim.lr.x=1 is not a known key; did you mean optim.lr?"),
        (("+extra.thing=1",), "extra.thing=1 is not a known key; see --help for all keys"),
        (("optim.lr=abc",), "optim.lr=abc must be a number; try 0.001"),
        (("optim.lr=",), "optim.lr='' must be a number; try 0.001"),
        (("optim.lr=null",), "optim.lr=null must be a number; try 0.001"),
        (("optim.lr=nan",), "optim.lr=nan must be a finite number; try 0.001"),
        (("training.steps=true",), "training.steps=true must be a whole number; try 300"),
        (("training.steps=-3",), "training.steps=-3 must be at least 0; try 3"),
        (("training=5",), "training=5 is a section, not a value; it has the keys total_tokens, steps, "),
        (("data.path=???",), "data.path is not set and has no default; give data.path=…"),
        (("model=lama_1b", "attention.impl=reference"), "model=lama_1b is not an option of the group model; did you mean"),
        (("model=zzz",), "model=zzz is not an option of the group model; try llama_1b, llama_300m, "),
        (("optim=5",), "optim=5 is not an option of the group optim; try adamw"),
        (("optim={lr: 3}",), "optim={...} is not an option of the group optim; try adamw"),
        (("precison=fp32",), "precison=fp32 is not a known key or group; did you mean precision=…? It has bf16, fp32 or fp8"),
        (("seed=1,2,3",), "seed=1,2,3 is a sweep of several values; give one value; "),
        (("seed=range(3)",), "seed=range(3) is a sweep of several values; give one value; "),
        (("-m",), "--multirun is refused: a command starts one run; try: for s in 1 2 3; do "),
        (("~optim.lr",), "~optim.lr removes a key, and every key has a value; try optim.lr=… instead"),
        (("hydra.run.dir=x",), "hydra.run.dir=x has no effect: Hydra writes nothing here; remove it"),
        (("--optim.lr=1",), "--optim.lr=1 is not a flag: settings are written key=value, without dashes; try optim.lr=1"),
        (("--learning-rate=1",), "--learning-rate=1 is not a flag: settings are written key=value, without dashes; try optim.lr=1"),
        (("steps",), "steps is not key=value; try training.steps=…"),
        (("optim..lr=1",), "optim..lr=1 is not a known key; did you mean optim.lr?"),
        (("optim lr=1",), "optim lr=1 is not a known key; did you mean optim.lr?"),
        (("name=a[",), 'name=a[ cannot be read; put a text in quotes inside quotes: "name=\'a[\'"'),
        (("output_dir=${nam}/x",), "output_dir=${nam}/x leads nowhere (Interpolation key 'nam' not found); give a plain value"),
        (("-cd", "/nowhere"), "--config-dir=/nowhere is not a folder; the project's own is "),
        (("engine=deepspeed", "deepspeed.zero_stage=4"), "deepspeed.zero_stage=4 must be 0, 1, 2 or 3; try 3"),
        (("engine=deepspeed", "deepspeed.zero_stagee=2"), "deepspeed.zero_stagee=2 is not a known key; did you mean deepspeed.zero_stage?"),
    ],
)  # fmt: skip
def test_bad_argument_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    found = lines("experiment=quickstart", *arguments)
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ("wandb.api_key=s3cret",),
        ("+logging.wandb.api_key=s3cret",),
        ("++WANDB_API_KEY=s3cret",),
        ("hf_token=s3cret",),
        ("logging.wandb={api_key: s3cret}",),
        ("--wandb-api-key=s3cret",),
        ("wandb.api_key=s3cret[",),
    ],
)
def test_secret_is_refused_with_advice_and_never_printed(arguments: tuple[str, ...]) -> None:
    found = lines("experiment=quickstart", *arguments)
    assert len(found) == 1
    assert "is a secret, and the configuration is saved; set WANDB_API_KEY or HF_TOKEN in the environment" in found[0]
    assert "s3cret" not in found[0]


def test_secret_is_not_interpolated_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "s3cret")
    found = lines("experiment=quickstart", "name=${oc.env:WANDB_API_KEY}")
    assert len(found) == 1
    assert "name is a secret" in found[0]
    assert "s3cret" not in found[0]


def test_unknown_experiment_is_one_line_and_the_closest_one_is_checked() -> None:
    assert len(lines("experiment=zzz")) == 1
    found = lines("experment=quickstart", "parallel.pp=1000")
    assert len(found) == 2
    assert "did you mean experiment=…?" in found[0]
    assert "parallel.pp=1000 must divide model.num_layers=" in found[1]


def test_all_kinds_of_problems_are_in_one_list() -> None:
    found = lines(
        "experiment=quickstart", "optim.lrr=1", "model=tinny", "optim.lr=abc", "parallel.pp=1000", "oops", "-m"
    )
    assert len(found) == 6


def test_empty_command_names_a_first_command() -> None:
    assert any("start from an experiment: experiment=quickstart" in line for line in lines())


@pytest.mark.parametrize(
    ("environment", "speaks"),
    [
        ({}, True),
        ({"RANK": "0"}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0"}, True),  # the first of another node, which may differ
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, False),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, False),
        # Without WORLD_SIZE a process is a world of its own, such as in a pod or in a shell on a job's node.
        ({"RANK": "1"}, True),
        ({"LOCAL_RANK": "1"}, True),
        ({"RANK": "3", "LOCAL_RANK": "3"}, True),
        ({"SLURM_PROCID": "3"}, True),
        ({"OMPI_COMM_WORLD_RANK": "1", "PMI_RANK": "1"}, True),
    ],
)
def test_one_rank_per_node_prints_and_all_exit_with_3(
    environment: dict[str, str], speaks: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        read_config("train", ["experiment=quickstart", "optim.lrr=1", "dry_run=true"])
    assert caught.value.code == 3
    out, err = capsys.readouterr()
    assert out == ""
    message = (
        "ssa_pretrain.train: 1 problem in the configuration; nothing was started.\n"
        "  optim.lrr=1 is not a known key; did you mean optim.lr?\n"
        "All keys and groups: python -m ssa_pretrain.train --help\n"
    )
    node = environment.get("WORLD_SIZE") and environment.get("LOCAL_RANK") == "0"
    where = f"{socket.gethostname()}: " if node else ""
    assert err == (where + message if speaks else "")


@pytest.mark.parametrize(
    ("name", "value", "least"), [("WORLD_SIZE", "abc", 1), ("WORLD_SIZE", "0", 1), ("RANK", "x", 0), ("RANK", "-1", 0), ("LOCAL_RANK", "", 0)]
)  # fmt: skip
def test_bad_number_from_a_launcher_is_one_line(
    name: str, value: str, least: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        read_config("train", ["experiment=quickstart"])
    assert caught.value.code == 3
    line = f"{name}={value or chr(39) * 2} in the environment must be a whole number from {least} on; "
    advice = f"unset {name}, or start with launchers/torchrun.sh, which sets it"
    assert capsys.readouterr().err.splitlines()[1] == f"  {line}{advice}"


def test_installation_without_conf_gets_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssa_pretrain.cli.CONF", tmp_path / "conf")
    assert lines("experiment=quickstart") == [
        f"this installation has no {tmp_path / 'conf'}: the configuration lies in the repository; "
        "pip install -e . in a clone, or give --config-path"
    ]
    assert resolved("-cp", str(CONF), "experiment=quickstart").name == "quickstart"


def test_any_command_gives_a_list_of_problems_or_a_plan() -> None:
    """For random arguments the only error is ConfigError, which the command line prints."""
    draw = random.Random(3)
    keys = [
        *known_keys(Config),
        "model",
        "training",
        "experiment",
        "logging.wandb",
        "data.weights.x",
        "hydra.job",
        "model@x",
        "",
    ]
    values = ["", "null", "0", "-1", "3", "1e400", "nan", "true", "abc", "[]", "{}", "{a: {b: [c]}}", "???", "${nope}"]
    values += [
        "${oc.env:HOME}",
        "${name}",
        "'",
        "[1",
        "1,2",
        "range(1,3)",
        "99999999999999999999",
        "a=b",
        "tp2",
        "1_000",
    ]
    refused = 0
    for _ in range(30):
        typed = [f"{draw.choice(['', '+', '~'])}{draw.choice(keys)}={draw.choice(values)}" for _ in range(2)]
        try:
            config = resolved("experiment=ssa_1b_8k", *typed)
            describe(config, make_plan(config, 1))
        except ConfigError as error:
            refused += 1
            assert str(error)
    assert refused > 15


# --- whole processes ---


def test_bad_command_exits_without_torch_traceback_or_folders(tmp_path: Path) -> None:
    done = run("experiment=quickstart", "optim.lrr=1", "optim.lr=abc", "parallel.pp=1000", cwd=tmp_path, WORLD_SIZE="3")
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith(
        "ssa_pretrain.train: 4 problems in the configuration; nothing was started.\n  optim.lrr=1"
    )
    assert done.stderr.endswith("imported []\n")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_only_missing_data_exits_with_4(tmp_path: Path) -> None:
    done = run("experiment=quickstart", cwd=tmp_path)
    assert done.returncode == 4
    assert done.stderr.startswith(
        "ssa_pretrain.train: 1 problem in the data; nothing was started.\n  data.path=data/quick"
    )


def test_help_lists_groups_and_keys_without_torch(tmp_path: Path) -> None:
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr == "imported []\n"
    assert "model: llama_1b, llama_300m, llama_3_2_1b, llama_3b, llama_75m, llama_8b, quickstart, tiny" in done.stdout
    assert "micro_batch_size: 1" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_cfg_job_shows_the_whole_configuration_without_torch(tmp_path: Path) -> None:
    done = run("experiment=ssa_1b_32k", "+optim.lr=2e-4", "--cfg", "job", "--resolve", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr == "imported []\n"
    assert list(tmp_path.iterdir()) == []
    shown = yaml.safe_load(done.stdout)
    assert shown["output_dir"] == "outputs/ssa_1b_32k"
    assert shown["optim"]["lr"] == 2e-4
    (tmp_path / "config.yaml").write_text(done.stdout)
    assert load_config(Config, tmp_path / "config.yaml") == resolved("experiment=ssa_1b_32k", "optim.lr=2e-4")


def test_cfg_job_of_a_wrong_key_is_refused(tmp_path: Path) -> None:
    done = run("experiment=quickstart", "optim.lrr=1", "--cfg", "job", cwd=tmp_path)
    assert done.returncode == 3
    assert "optim.lrr=1 is not a known key; did you mean optim.lr?" in done.stderr


def test_other_ranks_print_nothing(tmp_path: Path) -> None:
    done = run("--help", cwd=tmp_path, RANK="1", WORLD_SIZE="2")
    assert (done.returncode, done.stdout) == (0, "")


def test_info_shows_where_groups_come_from(tmp_path: Path) -> None:
    done = run("experiment=full_1b_8k", "--info", "defaults", cwd=tmp_path)
    assert done.returncode == 0
    assert "attention/full" in done.stdout
    assert "experiment/ssa_1b_8k" in done.stdout


def test_no_section_has_a_field_for_a_secret() -> None:
    shown = json.dumps(yaml.safe_load(run("--cfg", "job").stdout)).lower()
    assert not any(word in shown for word in ('key"', 'token"', "password", "secret"))


def test_machine_reports_what_torch_sees() -> None:
    import torch

    assert this_machine().has_gpu == torch.cuda.is_available()


def test_hidden_devices_do_not_count_as_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("WORLD_SIZE", "4")
    machine = this_machine()
    assert (machine.has_gpu, machine.world_size) == (False, 4)
