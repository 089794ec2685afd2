"""Rules across sections: each invalid combination is one line with key, value, rule and the nearest valid choice."""

import hashlib
import importlib.util
import json
import os
import re
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ssa_pretrain.cli import read_config, resolve_config
from ssa_pretrain.config.machine import Machine, this_machine
from ssa_pretrain.config.rules import files
from ssa_pretrain.data.indexed_format import token_dtype, write_index
from ssa_pretrain.run_folder import lock_folder
from ssa_pretrain.settings.files import file_sha256, unlock
from ssa_pretrain.settings.problems import ConfigError, Problem

CPU = Machine(world_size=1, has_gpu=False, has_transformer_engine=False, has_files=False)
GPU = Machine(world_size=1, has_gpu=True, has_transformer_engine=True, has_files=False)
BASE = (  # 4 layers, 4 heads in 2 groups, rows of 512, steps of 16 rows
    "model.num_layers=4",
    "model.hidden_size=128",
    "model.ffn_hidden_size=384",
    "model.num_attention_heads=4",
    "model.num_kv_heads=2",
    "model.head_dim=32",
    "data.sequence_length=512",
    "precision=fp32",
    "training.steps=300",
    "training.global_batch_tokens=8192",
    "training.micro_batch_size=4",
)
PAPER = ("experiment=ssa_1b_8k",)


def found(*overrides: str, machine: Machine = CPU) -> list[str]:
    """Returns the problems of a command as lines."""
    try:
        resolve_config("train", overrides, machine)
    except ConfigError as error:
        return [str(problem) for problem in error.problems]
    return []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("training.skip_steps=[[130,120]]",),
            "training.skip_steps=[[130, 120]] must be ranges [first, last] of steps, counted from 1; try 'training.skip_steps=[[120,130]]'",
        ),
        (("training.skip_steps=[120,130]",), "training.skip_steps=[120, 130] must be a list of lists; try [[120,130]]"),
        (("training.max_skipped_steps=-1",), "training.max_skipped_steps=-1 must be at least 0; try 0"),
        (("checkpoint.max_failed_saves=-1",), "checkpoint.max_failed_saves=-1 must be at least 0; try 0"),
        (("training.rollback_window=0",), "training.rollback_window=0 must be at least 1; try 1"),
        (
            ("training.rollback_on_spike=true", "training.spike_threshold=0"),
            "training.rollback_on_spike=true needs spikes, but training.spike_threshold=0 finds none; try training.spike_threshold=8",
        ),
    ],
)
def test_settings_of_skipped_steps_and_spikes_are_checked(overrides: tuple[str, ...], message: str) -> None:
    assert found("experiment=quickstart", *overrides) == [message]
    assert found("experiment=quickstart", "training.skip_steps=[[1,3],[120,130]]") == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("attention.key_convolution=4",), "attention.key_convolution=4 must be 0, 3 or 5 tokens; try 3 or 5"),
        (
            ("attention=full", "attention.key_convolution=3"),
            "attention.key_convolution=3 needs a method that chooses blocks by mean keys, and attention.method=full does not; "
            "try 0 or attention.method=moba",
        ),
        (("attention.key_convolution=true",), "attention.key_convolution=true must be a whole number; try 0"),
        (("model.qk_norm=2",), "model.qk_norm=2 must be true or false; try false"),
    ],
)
def test_options_of_queries_and_keys_are_checked(overrides: tuple[str, ...], message: str) -> None:
    assert found("experiment=quickstart", *overrides) == [message]
    assert found("experiment=quickstart", "attention=moba", "attention.key_convolution=5", "model.qk_norm=true") == []


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (("attention=nsa",), []),
        (("attention=nsa", "attention.score=official_compat"), []),
        (
            ("attention=nsa", "attention.gate=false", "attention.window=0"),
            [
                "attention.window=0 must be at least 1; try 1",
                "attention.gate=false leaves the three branches of attention.method=nsa without the gates that sum them; try attention.gate=true",
            ],
        ),
        (
            ("attention.method=nsa",),
            [
                "attention.score=softmax_sum must be compressed or official_compat under attention.method=nsa: its compressed branch scores the "
                "blocks; try compressed"
            ],
        ),
        (
            ("attention.score=compressed",),
            ["attention.score=compressed needs attention.method=nsa, which has a compressed branch; try softmax_sum"],
        ),
    ],
)
def test_nsa_has_gates_and_scores_blocks_by_its_compressed_branch(
    overrides: tuple[str, ...], messages: list[str]
) -> None:
    assert sorted(found("experiment=quickstart", *overrides)) == sorted(messages)


PAPERS = (
    "ssa_1b_8k",
    "ssa_1b_8k_quarter",
    "ssa_1b_32k",
    "full_1b_8k",
    "moba_1b_8k",
    "nsa_1b_8k",
    "ssa_300m_8k",
    "indexer_1b_8k",
)
EVIDENCE = ("ssa_300m_evidence", "full_300m_evidence", "moba_300m_evidence", "nsa_300m_evidence", "fp8_300m_evidence")


@pytest.mark.parametrize("world_size", [1, 8, 64])
@pytest.mark.parametrize("experiment", PAPERS)
def test_experiments_of_the_paper_pass_every_check(experiment: str, world_size: int) -> None:
    layout = ("parallel=tp2",) if experiment == "ssa_1b_32k" and world_size == 64 else ()  # 96 rows per step
    machine = Machine(world_size=world_size, has_gpu=True, has_transformer_engine=True, has_files=False)
    assert found(f"experiment={experiment}", "training.micro_batch_size=1", *layout, machine=machine) == []
    if world_size == 1:
        assert found(f"experiment={experiment}", machine=machine) == []


@pytest.mark.parametrize("experiment", EVIDENCE)
def test_short_experiments_pass_on_one_gpu(experiment: str) -> None:
    assert found(f"experiment={experiment}", machine=GPU) == []


@pytest.mark.parametrize("machine", [CPU, GPU])
def test_quickstart_passes_with_and_without_a_gpu(machine: Machine) -> None:
    assert found("experiment=quickstart", machine=machine) == []
    two = replace(machine, world_size=2)
    assert found("experiment=quickstart", "parallel=tp2", machine=two) == []


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (
            (*BASE, "parallel.tp=3"),
            3,
            "parallel.tp=3 must divide model.num_attention_heads=4, model.num_kv_heads=2 and model.vocab_divisor=128 "
            "(selection sums over the heads of a kv head, which live on one rank); try 1 or 2",
        ),
        (
            (*PAPER, "parallel.tp=4"),
            4,
            "parallel.tp=4 must divide model.num_kv_heads=2 "
            "(selection sums over the heads of a kv head, which live on one rank); try 1 or 2",
        ),
        (
            (*BASE, "parallel=tp2", "model.ffn_hidden_size=383"),
            2,
            "parallel.tp=2 must divide model.ffn_hidden_size=383; try 1",
        ),
        ((*BASE, "parallel.pp=3"), 3, "parallel.pp=3 must divide model.num_layers=4; try 2 or 4"),
        (
            (*BASE, "parallel.layers_on_last_stage=1"),
            1,
            "parallel.layers_on_last_stage=1 is for pipelines, but parallel.pp=1 has one stage; try 0",
        ),
        (
            (*PAPER, "parallel.pp=4", "parallel.layers_on_last_stage=3"),
            4,
            "parallel.layers_on_last_stage=3 must leave equally many of the model.num_layers=16 layers to each other stage of parallel.pp=4; try 1 or 4",
        ),
        (
            (*PAPER, "parallel.pp=2", "parallel.vpp=2", "parallel.layers_on_last_stage=7"),
            2,
            "parallel.layers_on_last_stage=7 must leave equally many of the model.num_layers=16 layers to each other stage of parallel.pp=2, "
            "and parallel.vpp=2 must divide it and them; try 6 or 8",
        ),
        (
            (*PAPER, "parallel.pp=4", "parallel.vpp=3"),
            4,
            "parallel.vpp=3 times parallel.pp=4 must divide model.num_layers=16; try 2 or 4",
        ),
        (
            (*BASE, "data.sequence_length=500", "training.global_batch_tokens=8000"),
            1,
            "data.sequence_length=500 must be a multiple of attention.block_size=16; try 400",
        ),
        (
            (
                *BASE,
                "model.num_attention_heads=12",
                "model.num_kv_heads=12",
                "model.vocab_divisor=120",
                "parallel.tp=12",
                "parallel.sequence_parallel=true",
            ),
            12,
            "data.sequence_length=512 must be a multiple of parallel.tp=12 under parallel.sequence_parallel=true; "
            "try 480 or 528",
        ),
        (
            (*BASE, "parallel.cp=3"),
            3,
            "data.sequence_length=512 must be a multiple of 2 * parallel.cp=3: two chunks of a row on each "
            "context-parallel rank; try 480 or 528",
        ),
        (
            ("experiment=ssa_1b_32k", "parallel=tp2_sp", "parallel.cp=3"),
            6,
            "data.sequence_length=32768 must be a multiple of 2 * parallel.cp=3 * parallel.tp=2: two chunks of a row on "
            "each context-parallel rank; try 24576",
        ),
        (
            ("experiment=ssa_1b_32k", "model.rope_scaling.factor=2"),
            1,
            "model.rope_scaling.factor=2.0 stretches RoPE to 16384 tokens, fewer than data.sequence_length=32768; try 4",
        ),
        (
            (*BASE, "parallel=tp2"),
            1,
            "world_size=1 must be a multiple of tp * pp * cp = 2 * 1 * 1 = 2; "
            "try launchers/torchrun.sh --nproc-per-node 2 …",
        ),
        (
            (*BASE, "parallel=tp2_pp2", "parallel.world_size=6"),
            1,
            "parallel.world_size=6 must be a multiple of tp * pp * cp = 2 * 2 * 1 = 4; try 4 or 8",
        ),
        (
            (*BASE, "training.global_batch_tokens=9000"),
            1,
            "training.global_batch_tokens=9000 must be a multiple of sequence_length * micro_batch_size * dp = "
            "512 * 4 * 1 = 2048; try 8192 or 10240",
        ),
        (
            (*BASE,),
            8,
            "training.global_batch_tokens=8192 must be a multiple of sequence_length * micro_batch_size * dp = "
            "512 * 4 * 8 = 16384; try 16384",
        ),
        (
            (*BASE, "parallel.pp=4", "model.num_layers=8", "parallel.vpp=2", "training.global_batch_tokens=6144"),
            4,
            "training.global_batch_tokens=6144 gives 3 microbatches, but interleaving (parallel.vpp=2) needs a multiple "
            "of parallel.pp=4; try 8192",
        ),
        (
            (*BASE, "training.stop_at_step=301"),
            1,
            "training.stop_at_step=301 is past the last step, 300; try 0 or at most 300",
        ),
        (
            (*PAPER, "training.stop_at_step=31791", "attention.impl=reference"),
            1,
            "training.stop_at_step=31791 is past the last step, 31790; try 0 or at most 31790",
        ),
    ],
)
def test_impossible_combination_is_one_line(overrides: tuple[str, ...], world_size: int, message: str) -> None:
    machine = Machine(world_size=world_size, has_gpu=False, has_transformer_engine=False, has_files=False)
    assert found(*overrides, machine=machine) == [message]


@pytest.mark.parametrize(
    ("overrides", "machine", "message"),
    [
        (
            (*BASE, "attention.impl=triton"),
            CPU,
            "attention.impl=triton needs a GPU, and torch sees none; try auto or reference",
        ),
        (
            (*PAPER, "model.head_dim=84"),
            GPU,
            "model.head_dim=84 must be a multiple of 8 from 16 to 256 for the GPU kernels; "
            "try 80, 88 or attention.impl=reference",
        ),
        (
            ("experiment=full_1b_8k", "model.head_dim=320"),
            GPU,
            "model.head_dim=320 must be a multiple of 8 from 16 to 256 for the GPU kernels; "
            "try 248, 256 or attention.impl=reference",
        ),
        (
            (*PAPER, "model.head_dim=8"),
            GPU,
            "model.head_dim=8 must be a multiple of 8 from 16 to 256 for the GPU kernels; try 16, 24 or attention.impl=reference",
        ),
        (
            (*PAPER, "model.num_attention_heads=96", "model.num_kv_heads=2"),
            GPU,
            "model.num_kv_heads=2 puts more than 32 of model.num_attention_heads=96 on each kv head, the limit of the GPU kernels; "
            "try 3 or attention.impl=reference",
        ),
        (
            (*PAPER, "precision=fp32"),
            GPU,
            "precision.name=fp32 is not supported by the GPU kernels; try precision=bf16 or attention.impl=reference",
        ),
        (
            (*BASE, "engine.layer_spec=transformer_engine"),
            CPU,
            "engine.layer_spec=transformer_engine needs a GPU, and torch sees none; try auto or local",
        ),
        (
            (*BASE, "precision=fp8"),
            CPU,
            "precision.name=fp8 needs a GPU, and torch sees none; try precision=bf16",
        ),
        (
            (*PAPER, "precision=fp8"),
            Machine(world_size=1, has_gpu=True, has_transformer_engine=False, has_files=False),
            "precision.name=fp8 needs Transformer Engine, which is not installed; try precision=bf16",
        ),
        (
            (*PAPER, "precision=fp8", "engine.layer_spec=local"),
            GPU,
            "precision.name=fp8 runs in Transformer Engine's layers, not in engine.layer_spec=local; "
            "try engine.layer_spec=auto",
        ),
        (
            (*PAPER, "precision=fp8", "model.ffn_hidden_size=8200"),
            GPU,
            "model.ffn_hidden_size=8200 gives a matrix dimension of 8200 on each rank, but precision=fp8 needs a multiple of 16; "
            "try precision=bf16",
        ),
        (
            (*PAPER, "precision=fp8", "model.num_attention_heads=34"),
            GPU,
            "model.head_dim=64 gives a matrix dimension of 2466 on each rank, but precision=fp8 needs a multiple of 16; "
            "try precision=bf16",
        ),
        (
            (*PAPER, "engine.overlap_tp=true"),
            GPU,
            "engine.overlap_tp=true needs parallel.tp above 1 and parallel.sequence_parallel=true: it splits their gathers and "
            "scatters; try engine.overlap_tp=false",
        ),
        (
            (*PAPER, "parallel=tp2_sp", "engine.overlap_tp=true", "engine.layer_spec=local"),
            replace(GPU, world_size=2),
            "engine.overlap_tp=true needs Transformer Engine's layers, not engine.layer_spec=local; try engine.overlap_tp=false",
        ),
        (
            (*PAPER, "parallel=tp2_sp", "engine.overlap_tp=true", "precision=fp32", "attention.impl=reference"),
            replace(GPU, world_size=2),
            "engine.overlap_tp=true needs Transformer Engine's layers, but precision=fp32 runs without them (they multiply fp32 in TF32); try "
            "engine.overlap_tp=false",
        ),
        (
            (*BASE, "parallel=tp2_sp", "engine.overlap_tp=true"),
            replace(CPU, world_size=2),
            "engine.overlap_tp=true needs a GPU, and torch sees none; try engine.overlap_tp=false",
        ),
        (
            (*PAPER, "profile.at=[0,3]"),
            GPU,
            "profile.at=[0, 3] must be steps, counted from 1; try 'profile.at=[10]'",
        ),
    ],
)
def test_missing_hardware_or_package_is_one_line(overrides: tuple[str, ...], machine: Machine, message: str) -> None:
    assert found(*overrides, machine=machine) == [message]


def test_choices_pass_if_the_machine_has_what_they_need() -> None:
    assert found(*PAPER, "precision=fp8", machine=GPU) == []
    assert found(*PAPER, "parallel=tp2_sp", "engine.overlap_tp=true", machine=replace(GPU, world_size=2)) == []
    assert found(*PAPER, "attention.impl=triton", "engine.layer_spec=transformer_engine", machine=GPU) == []
    assert found(*PAPER, "model.head_dim=80", machine=GPU) == []
    assert found(*PAPER, "model.num_attention_heads=64", "model.num_kv_heads=2", machine=GPU) == []
    assert (
        found(*PAPER, "model.num_attention_heads=64", "model.num_kv_heads=1", "attention.impl=reference", machine=GPU)
        == []
    )
    assert found(*PAPER, "model.head_dim=84", "attention.impl=reference", machine=GPU) == []
    assert found(*PAPER, "precision=fp8", "attention.impl=triton", machine=CPU.unknown()) == []


def test_one_mistake_is_one_line() -> None:
    """A bad head count is not reported again by the rules of the layout."""
    assert found(*BASE, "model.num_kv_heads=0", "parallel=tp2", machine=Machine(world_size=2, has_files=False)) == [
        "model.num_kv_heads=0 must be at least 1; try 2 or 4"
    ]
    assert found(*BASE, "parallel.tp=abc") == ["parallel.tp=abc must be a whole number; try 1"]
    assert len(found(*BASE, "data.sequence_length=0")) == 1


def test_independent_mistakes_are_all_listed() -> None:
    lines = found(
        *BASE, "optim.lr=-1", "attention.full_ratio=2", "parallel.pp=3", "optim.lrr=1", "deepspeed.zero_stage=9"
    )
    assert [line.split("=")[0] for line in lines] == [
        "optim.lrr",
        "attention.full_ratio",
        "deepspeed.zero_stage",
        "optim.lr",
        "parallel.pp",
    ]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset of two sources: 3,000 tokens of english and 2,000 of python in each split, vocabulary 1,000."""
    root = tmp_path / "dataset"
    root.mkdir()
    (root / "tokenizer.json").write_text("{}")
    dtype = token_dtype(1000)
    splits: dict[str, list[dict]] = {"train": [], "heldout": []}
    for split, shards in splits.items():
        (root / split).mkdir()
        for name, tokens in (("english", 3000), ("python", 2000)):
            prefix = root / split / name
            prefix.with_suffix(".bin").write_bytes(np.zeros(tokens, dtype).tobytes())
            with prefix.with_suffix(".idx").open("wb") as file:
                write_index(file, np.array([tokens // 2] * 2), dtype)
            sizes = {f"{end}_bytes": prefix.with_suffix(f".{end}").stat().st_size for end in ("bin", "idx")}
            hashes = {f"{end}_sha256": file_sha256(prefix.with_suffix(f".{end}")) for end in ("bin", "idx")}
            shards.append(
                {"name": name, "prefix": f"{split}/{name}", "documents": 2, "tokens": tokens} | sizes | hashes
            )
    tokenizer = {"file": "tokenizer.json", "sha256": hashlib.sha256(b"{}").hexdigest(), "vocab_size": 1000}
    manifest = {
        "schema": 1,
        "tokenizer": tokenizer | {"eos_id": 0, "bos_id": None, "name": "test"},
        "policy": {},
        "splits": splits,
        "sources": [],
        "unigram_entropy_nats": {},
        "bytes_per_token": 4.0,
        "fingerprint": "f",
        "details": {},
    }
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


HERE = Machine(world_size=1, has_gpu=False, has_transformer_engine=False)


def test_prepared_data_passes(dataset: Path) -> None:
    assert found(*BASE, f"data.path={dataset}", machine=HERE) == []
    assert found(*BASE, f"data.path={dataset}", "+data.weights.english=1", machine=HERE) == []


def test_missing_data_is_a_data_problem(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"manifest\.json does not exist") as caught:
        resolve_config("train", (*BASE, f"data.path={tmp_path}"), HERE)
    assert caught.value.exit_code == 4
    with pytest.raises(ConfigError, match=r"manifest\.json does not exist") as caught:
        resolve_config("train", (*BASE, f"data.path={tmp_path}", "optim.lr=0"), HERE)
    assert caught.value.exit_code == 3


def test_damaged_dataset_is_a_data_problem(dataset: Path) -> None:
    (dataset / "train" / "python.bin").write_bytes(b"short")
    lines = found(*BASE, f"data.path={dataset}", machine=HERE)
    assert len(lines) == 1
    assert "python.bin has 5 bytes, manifest.json has 4000" in lines[0]


@pytest.mark.parametrize(("name", "byte"), [("train/python.idx", 35), ("tokenizer.json", 1), ("manifest.json", 60)])
def test_flipped_bit_in_a_small_file_is_rejected_by_every_command(
    dataset: Path, capsys: pytest.CaptureFixture[str], name: str, byte: int
) -> None:
    path = dataset / name
    raw = bytearray(path.read_bytes())
    raw[byte] ^= 1  # of the index: the length of the first document
    path.write_bytes(raw)
    for entry in ("train", "evaluate", "plan"):
        with pytest.raises(SystemExit) as left:
            read_config(entry, [*BASE, f"data.path={dataset}"])
        printed = capsys.readouterr().err
        assert left.value.code == 4 and path.name in printed and "with verify=full" in printed, (entry, printed)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.vocab_size=999", "is smaller than the 1000 ids of {path}'s tokenizer; try 0 (the tokenizer's) or 1000"),
        (
            "data.weights.german=1",
            "data.weights.german=1.0 names no part of {path}; its parts are english and python",
        ),
        (
            "data.stages=[{from_step:5,weights:{german:1}}]",
            "data.stages[0].weights.german=1.0 names no part of {path}; its parts are english and python",
        ),
        (
            "data.sequence_length=1024",
            "data.sequence_length=1024 needs 2049 tokens of each part, and python (train) in {path} has 2000; "
            "prepare more text, or try 992",
        ),
    ],
)
def test_settings_that_do_not_fit_the_data_are_one_line(dataset: Path, override: str, message: str) -> None:
    lines = found(*BASE, f"data.path={dataset}", override, machine=HERE)
    assert len(lines) == 1
    assert lines[0].endswith(message.format(path=dataset))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("data.stages=[5]",),
            "data.stages[0]=5 is a section, not a value; it has the keys from_step, from_tokens and weights",
        ),
        (
            ("data.stages=[{from_step:5,weight:{web:1}},{from_step:9}]",),
            "data.stages[0].weight={...} is not a known key of data.stages[0]; did you mean data.stages[0].weights?",
        ),
        (
            ("data.stages=[{from_step:10,from_tokens:81920,weights:{web:1}}]",),
            "data.stages[0].from_step=10 and from_tokens=81920 must be one positive number and one 0: where the stage begins; "
            "the run begins with data.weights; try {from_step: 1001, weights: {…}}",
        ),
        (
            ("data.stages=[{weights:{web:1}}]",),
            "data.stages[0].from_step=0 and from_tokens=0 must be one positive number and one 0: where the stage begins; "
            "the run begins with data.weights; try {from_step: 1001, weights: {…}}",
        ),
        (("data.stages=[{from_step:-1}]",), "data.stages[0].from_step=-1 must be at least 0; try 0"),
        (
            ("data.stages=[{from_step:10,weights:{web:-1,code:2}}]",),
            "data.stages[0].weights.web=-1.0 must not be negative; 0 leaves the source out",
        ),
        (
            ("data.stages=[{from_tokens:81921},{from_step:12}]",),
            "data.stages[1].from_step=12 must begin after the stage before it, which begins with step 12; try from_step: 13 or later",
        ),
        (
            ("data.stages=[{from_tokens:2457600}]",),
            "data.stages[0].from_tokens=2457600 begins with step 301, but the run ends with step 300; "
            "try from_step: 300 or earlier, or remove the stage",
        ),
        (
            ("data.index_path=/tmp",),
            "data.index_path=/tmp is for the index of data.packing=best_fit, and data.packing=flow has none; "
            "try data.index_path='' or data.packing=best_fit",
        ),
    ],
)
def test_stages_and_packing_are_checked(overrides: tuple[str, ...], message: str) -> None:
    assert found(*BASE, "data.path=somewhere", *overrides) == [message]


def test_best_fit_needs_documents(dataset: Path) -> None:
    assert found(*BASE, f"data.path={dataset}", "data.packing=best_fit", machine=HERE) == []
    manifest = json.loads((dataset / "manifest.json").read_text())
    manifest["policy"] = {"packing": "official_row", "row_tokens": 512}
    manifest.pop("checksum", None)
    (dataset / "manifest.json").write_text(json.dumps(manifest))
    (line,) = found(*BASE, f"data.path={dataset}", "data.packing=best_fit", machine=HERE)
    assert line == (
        f"data.packing=best_fit packs documents, but {dataset} was packed as official_row, a sequence per row; "
        "try flow, or prepare the text again with packing=megatron"
    )


def test_evaluation_pads_rows_and_microbatches(dataset: Path) -> None:
    """Held-out sources may be shorter than a row, and the global batch is training's."""
    command = (*BASE, f"data.path={dataset}", "data.sequence_length=4096", "training.micro_batch_size=7")
    assert found(*command, machine=replace(HERE, splits=("heldout",))) == []
    assert len(found(*command, machine=HERE)) == 2


def test_unwritable_output_dir_is_a_problem(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ours = (*BASE, f"data.path={dataset}")
    assert found(*ours, f"output_dir={tmp_path}/file", machine=HERE) == [
        str(Problem("output_dir", f"{tmp_path}/file", "is a file, not a folder", "try another output_dir"))
    ]
    assert found(*ours, f"output_dir={tmp_path}/new", machine=HERE) == []
    assert found(*ours, f"output_dir={tmp_path}/file", "dry_run=true", machine=HERE) == []


def test_output_dir_in_use_is_a_problem_only_for_a_run(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`evaluate` may read during a run, a plan starts nothing, and rank 1 must not take its own rank 0 for another run."""
    folder = tmp_path / "run"
    ours = [*BASE, f"data.path={dataset}", f"output_dir={folder}"]
    lock = lock_folder(folder)
    assert lock is not None
    with pytest.raises(SystemExit) as caught:
        read_config("train", ours)
    assert caught.value.code == 3
    printed = capsys.readouterr().err.splitlines()
    assert printed[0] == "ssa_pretrain.train: 1 problem in the configuration; nothing was started."
    holder = rf"process {os.getpid()} on {socket.gethostname()}, started \S+"
    key = re.escape(str(Problem("output_dir", str(folder), "", "")).rstrip("; "))
    assert re.fullmatch(rf"  {key} is in use by {holder}; stop that run or try another output_dir", printed[1]), printed
    assert read_config("evaluate", ours).output_dir == str(folder)
    with pytest.raises(SystemExit) as caught:
        read_config("train", [*ours, "dry_run=true"])
    assert caught.value.code == 0
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert read_config("train", ours).output_dir == str(folder)
    monkeypatch.setenv("RANK", "0")
    unlock(lock)
    assert read_config("train", ours).output_dir == str(folder)


@pytest.mark.parametrize(
    ("variables", "tasks"),
    [
        ({"SLURM_NTASKS": "8"}, 8),
        ({"SLURM_STEP_NUM_TASKS": "2"}, 2),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, 1),  # srun --ntasks=1 in a job of 8
        ({"SLURM_NTASKS": "8", "WORLD_SIZE": "8"}, 1),
        ({}, 1),
    ],
)
def test_srun_processes_without_a_launcher_are_rejected(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], tasks: int
) -> None:
    for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert this_machine().slurm_tasks == tasks
    lines = found(*BASE, f"data.path={dataset}", machine=replace(HERE, slurm_tasks=tasks))
    assert lines == [] if tasks == 1 else len(lines) == 1
    assert tasks == 1 or lines[0].startswith(f"SLURM_NTASKS={tasks} means that many separate processes")
    assert found(*BASE, "dry_run=true", machine=replace(HERE, slurm_tasks=tasks)) == []


def test_initial_weights_must_come_from_another_run_folder(dataset: Path, tmp_path: Path) -> None:
    ours = (*BASE, f"data.path={dataset}", f"output_dir={tmp_path}/run")
    assert found(*ours, "checkpoint.init_from=/nowhere", machine=HERE) == [
        "checkpoint.init_from=/nowhere does not exist; give an earlier run's folder, a checkpoint's or one of common weights"
    ]
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    lines = found(*ours, f"checkpoint.init_from={tmp_path}/run/checkpoints", machine=HERE)
    assert len(lines) == 1
    assert lines[0].endswith(f"own output_dir={tmp_path}/run; leave it out: the same command again resumes")
    (tmp_path / "other").mkdir()
    assert found(*ours, f"checkpoint.init_from={tmp_path}/other", machine=HERE) == []


def test_mirror_needs_boto3(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = (*BASE, f"data.path={dataset}", f"output_dir={tmp_path}/run", "checkpoint.mirror=s3://bucket/run")
    monkeypatch.setattr(files, "find_spec", lambda name: name != "boto3")
    assert found(*ours, machine=HERE) == [
        "checkpoint.mirror=s3://bucket/run needs boto3, which is not installed; install the extra: pip install -e '.[hub]'"
    ]
    monkeypatch.setattr(files, "find_spec", lambda _: True)
    assert found(*ours, machine=HERE) == []


def test_planning_checks_no_files_and_no_processes(dataset: Path) -> None:
    wrong_here = ("checkpoint.init_from=/nowhere", "data.path=/nowhere", "parallel.world_size=2", "parallel=tp2")
    assert found(*BASE, *wrong_here, "dry_run=true", machine=HERE) == []
    assert "parallel.world_size=2 but 1 process started; leave it at 0 to train, or add dry_run=true to plan" in found(
        *BASE, *wrong_here, machine=HERE
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.tasks.n={kind:needle,lengths:[512,1024]}"], "evaluation.tasks.n.lengths=[1024] must be at most data.sequence_length=512 tokens each; try [512], or data.sequence_length=1024 in an evaluation"),
        (["evaluation.tasks.n={kind:needle,lengths:[64]}"], "evaluation.tasks.n.lengths=[64] must be at least 128 tokens each; try [128]"),
        (["evaluation.tasks.n={kind:needle,depths:[101]}"], "evaluation.tasks.n.depths=[101.0] must be percentages from 0 to 100; try [0,25,50,75,100]"),
        (["evaluation.tasks.n={kind:needle,samples:0}"], "evaluation.tasks.n.samples=0 must be at least 1; try 1"),
        (["evaluation.tasks.n={kind:needel}"], "evaluation.tasks.n.kind=needel must be perplexity, multiple_choice or needle; did you mean needle?"),
        (["evaluation.tasks.n={kind:needle,haystack:straw}"], "evaluation.tasks.n.haystack=straw must be noise or heldout; try noise"),
        (["evaluation.tasks.q={kind:multiple_choice}"], "evaluation.tasks.q.path is not set and has no default; give evaluation.tasks.q.path=…"),
        (["evaluation.interval=20", "evaluation.task_interval=30"], "evaluation.task_interval=30 must be a multiple of evaluation.interval=20, with which the tasks are evaluated; try 40"),
        (["evaluation.task_interval=30"], "evaluation.task_interval=30 needs evaluations on the way; try evaluation.interval=30"),
        (["evaluation.name=a/b"], "evaluation.name=a/b must be a file's name of letters, digits, dots, hyphens and underscores; try rope_4x"),
        (["evaluation.lm_eval.num_fewshot=-2"], "evaluation.lm_eval.num_fewshot=-2 must be at least -1; try -1"),
    ],
)  # fmt: skip
def test_evaluation_that_cannot_run_is_one_line(overrides: list[str], message: str) -> None:
    assert found(*BASE, *overrides) == [message]


def test_files_of_tasks_are_checked_before_anything_starts(dataset: Path) -> None:
    command = (*BASE, f"data.path={dataset}")
    lines = found(*command, "evaluation.tasks.q={kind:multiple_choice,path:no.jsonl}", machine=HERE)
    assert lines == ["evaluation.tasks.q.path=no.jsonl does not exist; give a file with one question per line"]
    lines = found(*command, "evaluation.tasks.p={kind:perplexity,path:nowhere}", machine=HERE)
    assert len(lines) == 1 and lines[0].startswith("evaluation.tasks.p.path=nowhere is not usable: ")
    assert found(*command, f"evaluation.tasks.p={{kind:perplexity,path:{dataset}}}", machine=HERE) == []
    evaluating = replace(HERE, splits=("heldout",), entry="evaluate")
    if importlib.util.find_spec("lm_eval") is None:
        lines = found(*command, "evaluation.lm_eval.tasks=[arc_easy]", machine=evaluating)
        assert lines == [
            'evaluation.lm_eval.tasks=[arc_easy] needs lm_eval, which is not installed; try pip install -e ".[evaluation]"'
        ]
    assert found(*command, "evaluation.lm_eval.tasks=[arc_easy]", machine=HERE) == [], (
        "training runs no task of lm_eval"
    )


def test_checkpoints_of_deepspeed_are_evaluated_without_it_and_in_pipelines(dataset: Path) -> None:
    command = (*BASE, f"data.path={dataset}", "engine=deepspeed", "parallel.pp=2", "parallel.cp=2")
    evaluating = replace(HERE, splits=("heldout",), entry="evaluate", has_deepspeed=None, world_size=4)
    assert found(*command, machine=evaluating) == []
    assert len(found(*command, machine=replace(HERE, has_deepspeed=False, world_size=4))) == 3


def test_no_setting_holds_a_secret() -> None:
    machine = replace(CPU, secrets=("a-passphrase-of-mine",))
    advice = "set WANDB_API_KEY or HF_TOKEN in the environment, or log in with `wandb login` or `hf auth login`"
    line = "{}=<hidden> is a secret, and the configuration is saved; " + advice
    assert found(*BASE, "output_dir=here", "name=a-passphrase-of-mine", machine=machine) == [line.format("name")]
    token = "hf_" + "aB1" * 8
    weights = f"data.weights={{{token}: 1.0}}"
    assert found(*BASE, f"logging.wandb.tags=[a,{token}]", weights) == [
        line.format("data.weights"),
        line.format("logging.wandb.tags"),
    ]
    assert found(*BASE, f"name={'0123456789abcdef' * 2}01234567") == []  # a revision as well as a key
    assert "a-passphrase" not in repr(machine)


INDEXED = ("attention=indexer", "attention.indexer.warmup_steps=30")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            (*INDEXED, "attention.score=softmax_sum"),
            "attention.score=softmax_sum is not trained, but attention.method=indexer is the method with a trained scorer; try indexer",
        ),
        (
            ("attention=moba", "attention.score=indexer"),
            "attention.score=indexer is not trained by attention.method=moba, which computes one stream; try softmax_sum",
        ),
        (
            (*INDEXED, "attention.full_ratio=0.5"),
            "attention.full_ratio=0.5 must be 0 under attention.method=indexer: its main stream is full for "
            "attention.indexer.warmup_steps, then sparse; try 0",
        ),
        (
            ("attention=indexer",),
            "attention.indexer.warmup_steps=1000 leaves no step of sparse attention in a run of 300; try 30",
        ),
        (
            (*INDEXED, "attention.counterpart_share=0"),
            "attention.counterpart_share=0.0 leaves attention.score=indexer without a query to learn from; try 0.125",
        ),
        (
            ("attention.indexer.heads=2",),
            "attention.indexer.heads=2 has no effect under attention.score=softmax_sum; add attention.score=indexer",
        ),
        ((*INDEXED, "attention.indexer.heads=0"), "attention.indexer.heads=0 must lie in 1 to 32; try 1"),
        (
            (*INDEXED, "attention.indexer.loss_weight=0"),
            "attention.indexer.loss_weight=0.0 must be above 0; try 1",
        ),
    ],
)
def test_settings_of_the_trained_scorer_are_checked(overrides: tuple[str, ...], message: str) -> None:
    problems = found(*BASE, *overrides)
    without_advice = [problem.partition("; ")[0] for problem in problems]
    assert without_advice == [message.partition("; ")[0]]
    assert message.startswith("attention.indexer.") or problems == [message]


def test_trained_scorer_passes_every_check() -> None:
    assert found(*BASE, *INDEXED) == []
    assert found(*BASE, "attention=ssa", "attention.score=indexer", "attention.indexer.heads=2") == []
    overlap = ("parallel=tp2_sp", "engine.overlap_tp=true", "precision=bf16")
    gpus = replace(GPU, world_size=2)
    assert found(*BASE, *overlap, machine=gpus) == []
    assert found(*BASE, *overlap, *INDEXED, machine=gpus) == [
        "engine.overlap_tp=true has no buffer for the projection of attention.score=indexer; try engine.overlap_tp=false"
    ]
