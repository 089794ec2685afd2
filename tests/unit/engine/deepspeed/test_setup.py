"""Around DeepSpeed: locks of killed builds, the folder of builds, and how a checkpoint is converted for other tensor ranks."""

import os
import re
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("deepspeed")

from ssa_pretrain.checkpoint.weights import WeightsError
from ssa_pretrain.config import Config
from ssa_pretrain.engine.deepspeed import setup
from ssa_pretrain.engine.deepspeed.checkpoint import _require_convertible, read_layout, universal_info
from ssa_pretrain.engine.deepspeed.engine import _require_accepted
from ssa_pretrain.settings.problems import ConfigError


@pytest.fixture
def builds(tmp_path, monkeypatch):
    """A folder of builds with the lock of one operator, on local rank 0."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(setup.dist, "barrier", lambda: None)
    (tmp_path / "cpu_adam").mkdir()
    lock = tmp_path / "cpu_adam" / "lock"
    lock.touch()
    return lock


def test_process_without_a_launcher_is_local_rank_0(monkeypatch):
    pytest.importorskip("deepspeed")
    placement = SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    setup.prepare_process(placement)
    assert os.environ["LOCAL_RANK"] == "3"
    monkeypatch.delenv("WORLD_SIZE")
    setup.prepare_process(placement)
    assert os.environ["LOCAL_RANK"] == "0"


def test_lock_of_a_killed_build_is_named_and_removed(builds, capsys):
    setup.announce_build("cpu_adam", SimpleNamespace())
    output = capsys.readouterr().out
    assert f"removing {builds}, which a killed build left" in output
    assert f"compiling DeepSpeed's cpu_adam into {builds.parent}; this takes minutes, once" in output
    assert not builds.exists()


def test_lock_of_a_running_build_stays(builds, capsys):
    with builds.open("w"):
        setup.announce_build("cpu_adam", SimpleNamespace())
    assert builds.exists()
    assert "removing" not in capsys.readouterr().out


def test_finished_build_is_silent(builds, capsys):
    builds.unlink()
    (builds.parent / "cpu_adam.so").touch()
    setup.announce_build("cpu_adam", SimpleNamespace())
    assert capsys.readouterr().out == ""


def test_build_folders_differ_by_host_and_versions(monkeypatch):
    here = setup.extensions_folder()
    assert torch.__version__ in here.name
    monkeypatch.setattr(setup.socket, "gethostname", lambda: "another")
    assert setup.extensions_folder() != here


NAMES = (
    "embedding.word_embeddings.weight",
    "decoder.layers.0.input_layernorm.weight",
    "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
    "decoder.layers.0.self_attention.linear_qkv.weight",
    "decoder.layers.0.self_attention.linear_proj.weight",
    "decoder.layers.0.pre_mlp_layernorm.weight",
    "decoder.layers.0.mlp.linear_fc1.weight",
    "decoder.layers.0.mlp.linear_fc2.weight",
    "decoder.layers.10.mlp.linear_fc2.weight",
    "decoder.final_layernorm.weight",
    "output_layer.weight",
)


def test_each_parameter_matches_one_converter_pattern():
    info = universal_info(list(NAMES))["universal_checkpoint_info"]

    def matched(kind: str) -> set[str]:
        return {name for name in NAMES for pattern in info[kind] if re.match(pattern, name)}

    assert matched("parameter_to_average_patterns") == {name for name in NAMES if "norm" in name}
    assert matched("parameter_with_row_parallelism_patterns") == {n for n in NAMES if "linear_proj" in n or "fc2" in n}
    assert matched("parameter_with_2_sub_params_cat_dim_0") == {"decoder.layers.0.mlp.linear_fc1.weight"}


def test_unknown_deepspeed_key_is_refused():
    from ssa_pretrain.config.deepspeed import ds_config

    config = Config()
    config.deepspeed.extra = {"zero_optimization": {"stage3_prefetch_buket_size": 3}}
    with pytest.raises(
        ConfigError, match=r"deepspeed.extra.zero_optimization.stage3_prefetch_buket_size=3 is not accepted"
    ):
        _require_accepted(ds_config(config, 1))


def test_unreshapable_checkpoint_names_the_setting_to_change(tmp_path):
    def refusal(*layouts: tuple[int, int, int]) -> str:
        saved, wanted = (dict(zip(("zero_stage", "tp", "dp"), layout, strict=True)) for layout in layouts)
        with pytest.raises(WeightsError) as caught:
            _require_convertible(tmp_path, saved, wanted)
        return str(caught.value)

    start = f"or start a new run from its weights with checkpoint.init_from={tmp_path}"
    assert refusal((2, 1, 2), (3, 1, 2)) == (
        f"{tmp_path} was written by ZeRO stage 2, whose optimizer state stage 3 does not read; set deepspeed.zero_stage=2, {start}"
    )
    assert refusal((0, 2, 1), (0, 1, 2)) == (
        f"{tmp_path} was written by ZeRO stage 0 at tp=2, and DeepSpeed reshapes only stages 1 to 3; set parallel.tp=2, {start}"
    )
    with pytest.raises(WeightsError, match="was not written by engine=deepspeed"):
        read_layout(tmp_path)
