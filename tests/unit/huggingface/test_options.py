"""The two command lines: every problem at once, no torch for a wrong one, and what import_hf prints starts a run."""

import subprocess
import sys

import pytest

from ssa_pretrain.cli import resolve_config
from ssa_pretrain.config import AttentionConfig, IndexerConfig, Method, ModelConfig, RopeScalingConfig, Score
from ssa_pretrain.config.machine import Machine
from ssa_pretrain.errors import UsageError
from ssa_pretrain.huggingface.options import (
    Dtype,
    ExportOptions,
    Gate,
    ImportOptions,
    as_arguments,
    attention_arguments,
    byte_count,
    read_options,
)
from ssa_pretrain.huggingface.settings import Mode
from support.processes import ROOT, environment


def test_settings_are_read(tmp_path):
    words = [
        str(tmp_path),
        f"out='{tmp_path}/x'",
        "dtype=fp32",
        "attention_mode=sparse",
        "add_bos=true",
        "max_shard_size=2GB",
    ]
    folder, options = read_options(ExportOptions, "ssa_pretrain.export", "a run", words)
    assert folder == tmp_path
    assert options == ExportOptions(
        out=f"{tmp_path}/x", dtype=Dtype.fp32, attention_mode=Mode.sparse, add_bos=True, max_shard_size="2GB"
    )
    _, options = read_options(ImportOptions, "ssa_pretrain.import_hf", "a folder", [str(tmp_path), "out=y", "gate=off"])
    assert options == ImportOptions(out="y", gate=Gate.off)


def test_new_folder_is_writable(tmp_path):
    (tmp_path / "file").touch()
    (problem,) = ExportOptions(out=str(tmp_path / "file" / "x")).problems()
    assert f"{problem.rule}; {problem.advice}" == f"lies below {tmp_path / 'file'}, which is a file; try another folder"


def test_checkpoint_may_be_named_by_its_step(tmp_path):
    (tmp_path / "run/checkpoints/step_00000007").mkdir(parents=True)
    folder, _ = read_options(
        ExportOptions, "ssa_pretrain.export", "a run", [f"{tmp_path / 'run'}@7", f"out={tmp_path}/y"]
    )
    assert folder == tmp_path / "run/checkpoints/step_00000007"


def test_folder_with_an_equals_sign_is_a_folder(tmp_path):
    (tmp_path / "a=b").mkdir()
    folder, _ = read_options(ExportOptions, "ssa_pretrain.export", "a run", [str(tmp_path / "a=b"), "out=y"])
    assert folder == tmp_path / "a=b"


def test_all_problems_are_reported_at_once(tmp_path):
    words = ["nowhere", "dtype=fp16", "max_shard_size=big", "data=none", "add_bos=false", "ouut=x"]
    with pytest.raises(UsageError) as caught:
        read_options(ExportOptions, "ssa_pretrain.export", "the folder of a run", words)
    assert str(caught.value).splitlines() == [
        "ssa_pretrain.export: 6 problems in the configuration; nothing was started.",
        "  nowhere is not a folder; give the folder of a run",
        "  ouut=x is not a known key; did you mean out?",
        "  dtype=fp16 must be bf16 or fp32; try bf16",
        "  out='' must name a folder that does not exist yet; try out=outputs/out",
        "  max_shard_size=big must be a size; try 5GB or 500MB",
        "  add_bos=false is a setting of the tokenizer, and data=none exports none; leave out one of the two",
        "All keys and groups: python -m ssa_pretrain.export --help",
    ]
    for words, count in ((["out=x"], "no folder"), ([str(tmp_path), "y", "out=x"], "2 folders")):
        with pytest.raises(UsageError, match=f"the command line names {count}; give a run"):
            read_options(ExportOptions, "ssa_pretrain.export", "a run", words)


@pytest.mark.parametrize(
    ("text", "count"),
    [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("700", 700), ("2K", 2000), ("0GB", 0), ("big", None), ("-1GB", None)],
)
def test_sizes(text, count):
    assert byte_count(text) == count


def test_a_model_as_arguments_names_every_setting_of_the_model():
    """Whatever experiment they are given to: with the settings of another model there, the result is the same."""
    model = ModelConfig(num_layers=16, tie_embeddings=False, rope_scaling=RopeScalingConfig(enabled=False))
    written = as_arguments("model", model)
    assert "model.tie_embeddings=false" in written
    assert "model.rope_scaling.enabled=false" in written
    data = ["data.path=none", "data.sequence_length=128", "dry_run=true"]
    config = resolve_config(
        "plan", ["experiment=convert_llama", *written, *data], Machine(world_size=1, has_files=False)
    )
    assert config.model == model


@pytest.mark.parametrize(
    "attention",
    [
        AttentionConfig(gate=False),
        AttentionConfig(key_convolution=3),
        AttentionConfig(score=Score.indexer, indexer=IndexerConfig(heads=2)),
        AttentionConfig(method=Method.indexer, score=Score.indexer, indexer=IndexerConfig(heads=2)),
        AttentionConfig(method=Method.nsa, score=Score.compressed, window=20),
    ],
)
def test_an_attention_as_arguments_names_every_setting_that_decides_its_weights(attention):
    data = ["data.path=none", "data.sequence_length=128", "training.steps=2000", "training.global_batch_tokens=1024"]
    config = resolve_config(
        "plan", [*attention_arguments(attention), *data, "dry_run=true"], Machine(world_size=1, has_files=False)
    )
    for name in ("method", "gate", "score", "window", "key_convolution"):
        assert getattr(config.attention, name) == getattr(attention, name)
    assert config.attention.indexer.heads == attention.indexer.heads


@pytest.mark.parametrize("command", ["export", "import_hf"])
def test_wrong_command_line_ends_with_3_and_help_with_0(command, tmp_path):
    """Each as a real process: help explains every setting."""
    known = {"export": ExportOptions, "import_hf": ImportOptions}[command].__slots__
    for words, code in (([], 0), ([str(tmp_path)], 3)):
        arguments = [sys.executable, "-m", f"ssa_pretrain.{command}", *words]
        done = subprocess.run(arguments, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        if not code:
            assert all(f"\n    {name} " in done.stdout for name in known)
        else:
            assert "out='' must name a folder" in done.stderr
