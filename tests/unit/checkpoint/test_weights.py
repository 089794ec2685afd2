"""The common weights format: names, files, and the messages for weights that do not fit."""

import re
from pathlib import Path

import pytest
import torch

from ssa_pretrain.checkpoint import weights
from ssa_pretrain.checkpoint.weights import (
    WeightsError,
    WeightsReader,
    WeightsWriter,
    canonical_name,
    find_weights,
    write_index,
)


def written(folder: Path, tensors: dict[str, torch.Tensor], prefix: str = "stage_000") -> Path:
    writer = WeightsWriter(folder, prefix)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.flush()
    return folder


def test_both_layer_specs_use_the_same_names() -> None:
    fused = {
        "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight": "decoder.layers.3.input_layernorm.weight",
        "decoder.layers.3.mlp.linear_fc1.layer_norm_weight": "decoder.layers.3.pre_mlp_layernorm.weight",
        "decoder.layers.3.mlp.linear_fc1.weight": "decoder.layers.3.mlp.linear_fc1.weight",
        "decoder.final_layernorm.weight": "decoder.final_layernorm.weight",
    }
    assert {name: canonical_name(name) for name in fused} == fused


def test_files_of_several_writers_and_formats_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "FILE_BYTES", 100)
    first = {"a": torch.randn(5, 7), "b": torch.randn(3).bfloat16(), "c": torch.randn(6, 6).t()}
    second = {"d": torch.randn(2, 2)}
    written(tmp_path, first)
    written(tmp_path, second, "stage_001")
    write_index(tmp_path)
    assert len(list(tmp_path.glob("stage_000_*.safetensors"))) == 2
    reader = WeightsReader(tmp_path)
    assert reader.tensors.keys() == {"a", "b", "c", "d"}
    for name, tensor in (first | second).items():
        assert reader.read(name).dtype == tensor.dtype
        assert torch.equal(reader.read(name), tensor)


def test_weights_are_found_in_a_checkpoint_and_in_their_own_folder(tmp_path: Path) -> None:
    assert find_weights(tmp_path) is None
    (tmp_path / "weights").mkdir()
    write_index(tmp_path / "weights")
    assert find_weights(tmp_path) == find_weights(tmp_path / "weights") == tmp_path / "weights"


def test_weights_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    write_index(written(tmp_path, {"a": torch.zeros(2, 3), "b": torch.zeros(4)}))
    reader = WeightsReader(tmp_path)
    reader.require({"a": (2, 3), "b": (4,)}, exact=True)
    reader.require({"a": (2, 3)}, exact=False)
    with pytest.raises(WeightsError, match=r"holds another model: a is \(2, 3\) there and \(2, 4\) in this run; set"):
        reader.require({"a": (2, 4), "b": (4,)}, exact=True)
    with pytest.raises(WeightsError, match=r"b is \(4,\) there and missing in this run"):
        reader.require({"a": (2, 3)}, exact=True)
    with pytest.raises(WeightsError, match=r"c is missing there and \(1,\) in this run"):
        reader.require({"c": (1,)}, exact=False)


def test_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=f"{tmp_path} holds no common weights"):
        WeightsReader(tmp_path)
    (tmp_path / "weights.json").write_text('{"schema": 99}')
    with pytest.raises(WeightsError, match="has schema 99, and this version reads 1"):
        WeightsReader(tmp_path)


@pytest.mark.parametrize("file", ["../outside.safetensors", "/outside.safetensors", "link.safetensors"])
def test_index_that_names_a_file_outside_is_refused(tmp_path, file):
    folder = tmp_path / "weights"
    folder.mkdir()
    writer = WeightsWriter(folder, "stage_000")
    writer.add("a", torch.zeros(3))
    writer.flush()
    write_index(folder)
    (folder / "stage_000_0000.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "link.safetensors").symlink_to("../outside.safetensors")
    index = folder / "weights.json"
    index.write_text(index.read_text().replace("stage_000_0000.safetensors", file))
    with pytest.raises(WeightsError, match=rf"weights.json names '{re.escape(file)}', which is outside its folder"):
        WeightsReader(folder)
