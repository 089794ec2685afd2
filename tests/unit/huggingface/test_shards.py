"""Files of weights: no file above the limit, an index that is right, and one sentence for each folder that cannot be read."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssa_pretrain.errors import WeightsError
from ssa_pretrain.huggingface.shards import INDEX, SINGLE, HuggingFaceReader, plan_files, write_file, write_index
from ssa_pretrain.huggingface.weights import Llama, tensor_names, tensor_shapes, training_shapes

SIZES = Llama(
    num_layers=3,
    hidden_size=8,
    ffn_hidden_size=16,
    vocab_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    gates=1,
    tied=False,
)


def export(folder, most: int, dtype=torch.float32) -> dict[str, list[str]]:
    files = plan_files(SIZES, dtype.itemsize, most)
    shapes = training_shapes(SIZES)

    def read(name: str) -> torch.Tensor:
        return torch.full(shapes[name], float(len(name)))

    for file, names in files.items():
        write_file(folder / file, names, read, SIZES, dtype)
    write_index(folder, files, SIZES, dtype.itemsize)
    return files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_stay_below_the_limit_and_the_index_names_every_tensor(tmp_path, dtype):
    most = 3000
    files = export(tmp_path, most, dtype)
    assert len(files) > 2
    record = json.loads((tmp_path / INDEX).read_text())
    found, total = {}, 0
    for file in files:
        tensors = load_file(tmp_path / file)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        assert size <= most or len(files[file]) == 1, "only a tensor that is larger by itself exceeds the limit"
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}
        found |= dict.fromkeys(tensors, file)
        total += size
    assert record["weight_map"] == found
    assert record["metadata"]["total_size"] == total
    assert sorted(files) == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    reader = HuggingFaceReader(tmp_path)
    assert reader.shapes == tensor_shapes(SIZES)
    first = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(reader.read(first), load_file(tmp_path / found[first])[first])


def test_one_file_has_no_index(tmp_path):
    assert list(export(tmp_path, 10**9)) == [SINGLE]
    assert not (tmp_path / INDEX).exists()
    assert set(HuggingFaceReader(tmp_path).shapes) == {n for names in tensor_names(SIZES).values() for n in names}
    assert (tmp_path / SINGLE).stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_folders_that_cannot_be_read(tmp_path):
    def message() -> str:
        with pytest.raises(WeightsError) as caught:
            HuggingFaceReader(tmp_path)
        return str(caught.value)

    assert message() == f"{tmp_path} has neither {SINGLE} nor {INDEX}; give the folder of config.json"
    (tmp_path / "pytorch_model.bin").touch()
    assert message() == f"{tmp_path} has neither {SINGLE} nor {INDEX}; save it again with transformers' save_pretrained"
    (tmp_path / SINGLE).write_bytes(b"not safetensors")
    assert message().startswith(f"{tmp_path / SINGLE} is damaged (")
    files = export(tmp_path, 3000)
    (tmp_path / list(files)[1]).unlink()
    assert message() == f"{tmp_path / list(files)[1]} is missing, and {INDEX} lists it; copy the folder again"
    save_file({"other": torch.ones(1)}, tmp_path / list(files)[1])
    assert "lacks model.layers." in message()
    assert message().endswith(f", which {INDEX} lists; copy the folder again")
    (tmp_path / INDEX).write_text("{")
    assert message().startswith(f"{tmp_path / INDEX} cannot be read (")


def _umask() -> int:
    import os

    current = os.umask(0)
    os.umask(current)
    return current
