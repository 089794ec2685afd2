"""Out, in and out again: the same bits. And what an export holds, refuses and leaves behind."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ssa_pretrain.checkpoint.weights import WeightsReader, find_weights
from ssa_pretrain.config import Config, Method, PrecisionName
from ssa_pretrain.errors import CheckpointError, DataError, WeightsError
from ssa_pretrain.evaluation.results import write_json
from ssa_pretrain.huggingface import exporting
from ssa_pretrain.huggingface.checking import check_export
from ssa_pretrain.huggingface.exporting import export
from ssa_pretrain.huggingface.importing import import_folder, imported_config, read_record
from ssa_pretrain.huggingface.options import Dtype, ExportOptions, ImportOptions
from ssa_pretrain.settings.convert import config_to_dict, load_config
from support.layout_worker import VOCAB, configure
from support.run_folders import without_common_weights, write_run
from support.small_datasets import write_dataset

CHECKPOINT = Path("checkpoints/step_00000003")


def export_to(out: Path, run: Path, config: Config, placement, **settings) -> Path:
    options = ExportOptions(out=str(out), **{"dtype": Dtype.fp32, "data": "none", **settings})
    assert options.problems() == []
    export(run, None, config, placement, options)
    return out


def import_from(folder: Path, out: Path, **settings) -> Config:
    options, record = ImportOptions(out=str(out), **settings), read_record(folder)
    config = imported_config(record, options)
    import_folder(folder, record, config, options.gate)
    return config


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the common weights of a run's only checkpoint."""
    (checkpoint,) = (folder / "checkpoints").glob("step_*")
    reader = WeightsReader(find_weights(checkpoint) or checkpoint)
    return {name: reader.read(name) for name in reader.tensors}


def require_same_bits(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [
        ({}, Dtype.fp32),
        ({"model.tie_embeddings": False, "attention.gate": False, "model.vocab_divisor": 80}, Dtype.fp32),
        ({"precision.name": "bf16", "model.qk_norm": True, "attention.key_convolution": 3}, Dtype.bf16),
        (
            {"attention.method": "nsa", "attention.score": "compressed", "attention.window": 20, "model.qk_norm": True},
            Dtype.fp32,
        ),
        ({"attention.method": "indexer", "attention.score": "indexer", "attention.indexer.heads": 2}, Dtype.fp32),
    ],
)
def test_import_of_an_export_is_bit_identical(tmp_path, placement, overrides, dtype):
    config = configure({"model.num_layers": 2, **overrides})
    write_run(tmp_path / "run", config, placement, VOCAB)
    folder = export_to(tmp_path / "out", tmp_path / "run", config, placement, dtype=dtype, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    imported = import_from(folder, tmp_path / "in", method=config.attention.method)
    require_same_bits(tensors(tmp_path / "in"), tensors(tmp_path / "run"))
    assert load_config(Config, tmp_path / "in/config.yaml") == imported
    for section, ignored in (
        ("model", ("name", "vocab_size", "vocab_divisor")),
        ("attention", ("alignment_weight", "full_ratio", "impl")),
    ):
        mine, theirs = (config_to_dict(c)[section] for c in (config, imported))
        assert {k: v for k, v in mine.items() if k not in ignored} == {
            k: v for k, v in theirs.items() if k not in ignored
        }
    described = {Method.nsa: "native sparse attention", Method.indexer: "a trained scorer of blocks"}
    assert described.get(config.attention.method, "sparse sparse attention") in (folder / "README.md").read_text()
    again = export_to(tmp_path / "again", tmp_path / "in", imported, placement, dtype=dtype, max_shard_size="20KB")
    for path in folder.iterdir():
        if path.name != "README.md":  # its recipe is the importing command's
            assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_export_of_an_imported_model_that_trained_in_bf16_keeps_its_values_in_fp32(tmp_path, placement):
    config = configure({"model.num_layers": 1, "precision.name": PrecisionName.bf16.value})
    write_run(tmp_path / "run", config, placement, VOCAB)
    folder = export_to(tmp_path / "out", tmp_path / "run", config, placement, dtype=Dtype.fp32)
    wanted = tensors(tmp_path / "run")["embedding.word_embeddings.weight"]
    found = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert wanted.dtype == torch.bfloat16
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted.float())


def test_export_without_common_weights_loads_the_checkpoint_by_its_engine(tmp_path, placement):
    config = configure({"model.num_layers": 2})
    write_run(tmp_path / "run", config, placement, VOCAB)
    first = export_to(tmp_path / "first", tmp_path / "run", config, placement)
    without_common_weights(tmp_path / "run" / CHECKPOINT)
    second = export_to(tmp_path / "second", tmp_path / "run", config, placement)
    assert sorted(p.name for p in first.iterdir()) == sorted(p.name for p in second.iterdir())
    for path in first.iterdir():
        assert (second / path.name).read_bytes() == path.read_bytes(), path.name


def test_what_else_an_export_holds(tmp_path, placement):
    config = configure(
        {"model.num_layers": 1, "attention.method": Method.moba.value, "attention.alignment_weight": 0.0}
    )
    config = replace(config, name="my model", output_dir="/somewhere/secret")
    write_run(tmp_path / "run", config, placement, VOCAB)
    modes = {
        mode: {"cross_entropy": value, "word_perplexity": 40.0, "bits_per_byte": None}
        for mode, value in (("full", 3.25), ("sparse", 3.5))
    }
    write_json(tmp_path / "run/evaluation.json", {"step": 3, "rows": 8, "modes": modes})
    folder = export_to(tmp_path / "out", tmp_path / "run", config, placement)
    record = json.loads((folder / "config.json").read_text())
    assert record["attention_mode"] == "sparse", "moba has no full stream"
    assert json.loads((folder / "generation_config.json").read_text()) == {"do_sample": False}
    card = (folder / "README.md").read_text()
    assert "# my model\n" in card
    assert "| attention | cross entropy (nats per token) | perplexity per word | bits per byte |\n" in card
    assert "| full | 3.2500 | 40.00 | – |\n| sparse | 3.5000 | 40.00 | – |\n" in card
    assert "secret" not in card
    write_json(tmp_path / "run/evaluation.json", {"step": 2, "rows": 8, "modes": modes})
    card = (export_to(tmp_path / "out2", tmp_path / "run", config, placement) / "README.md").read_text()
    assert "No evaluation of this checkpoint" in card
    assert "| full |" not in card


def test_tokenizer_of_another_training_is_refused(tmp_path, placement):
    config = configure({"model.num_layers": 1})
    write_run(tmp_path / "run", config, placement, VOCAB)
    documents = {"a": [np.arange(4)]}
    data = write_dataset(tmp_path / "data", documents, documents).root
    with pytest.raises(DataError, match="has another tokenizer than the model was trained with: the same token ids"):
        export_to(tmp_path / "out", tmp_path / "run", config, placement, data=str(data))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "run"]


def test_failed_export_leaves_nothing(tmp_path, placement, monkeypatch):
    config = configure({"model.num_layers": 1})
    write_run(tmp_path / "run", config, placement, VOCAB)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "write_index", fail)
    with pytest.raises(
        CheckpointError,
        match=r"out could not be written \(rank 0: OSError: .*No space left.*\); nothing was left of it",
    ):
        export_to(tmp_path / "out", tmp_path / "run", config, placement)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_existing_folder_is_refused_and_a_checkpoint_of_another_model_too(tmp_path, placement):
    config = configure({"model.num_layers": 1})
    write_run(tmp_path / "run", config, placement, VOCAB)
    (problem,) = ExportOptions(out=str(tmp_path)).problems()
    assert (problem.key, problem.value) == ("out", str(tmp_path))
    assert (
        f"{problem.rule}; {problem.advice}" == f"exists, and nothing is overwritten; remove it, or try out={tmp_path}_2"
    )
    with pytest.raises(
        WeightsError, match=r"holds another model: decoder\.layers\.1\.input_layernorm\.weight is missing there"
    ):
        export_to(
            tmp_path / "out", tmp_path / "run", replace(config, model=replace(config.model, num_layers=2)), placement
        )
    with pytest.raises(CheckpointError, match="holds no checkpoint; give the folder of a run that has saved one"):
        export_to(tmp_path / "out", tmp_path / "empty", config, placement)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [
        ({}, Dtype.bf16),
        ({"attention.gate": False, "model.tie_embeddings": False, "model.rope_scaling.enabled": True}, Dtype.fp32),
        ({"attention.score": "official_compat", "model.vocab_divisor": 80, "model.qk_norm": True}, Dtype.fp32),
        ({"model.mup.base_width": 12, "model.mup.base_head_dim": 5, "model.mup.output_multiplier": 1.5}, Dtype.bf16),
        ({"model.mup.base_width": 12, "model.mup.base_head_dim": 5, "model.qk_norm": True}, Dtype.fp32),
        ({"attention.key_convolution": 5}, Dtype.bf16),
        (
            {"attention.method": "nsa", "attention.score": "compressed", "attention.window": 20, "model.qk_norm": True},
            Dtype.fp32,
        ),
        ({"attention.score": "indexer", "attention.indexer.heads": 2}, Dtype.bf16),
    ],
)
def test_check_compares_the_export_with_the_training_model_and_sees_a_difference(tmp_path, placement, overrides, dtype):
    config = configure({"model.num_layers": 2, "data.sequence_length": 192, **overrides})
    write_run(tmp_path / "run", config, placement, VOCAB)
    options = ExportOptions(out=str(tmp_path / "out"), dtype=dtype, data="none")
    weights = export(tmp_path / "run", None, config, placement, options).weights
    line = check_export(tmp_path / "out", config, weights, exporting.DTYPES[dtype], placement)
    assert re.fullmatch(r"checked: .* of 7 documents in fp32: full \d\.\de-0[67], sparse \d\.\de-0[67]", line)
    changed = load_file(tmp_path / "out/model.safetensors")
    changed["model.layers.1.self_attn.o_proj.weight"][:, 0] *= 1.01
    save_file(changed, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="gives other logits than the training model in full mode"):
        check_export(tmp_path / "out", config, weights, exporting.DTYPES[dtype], placement)
