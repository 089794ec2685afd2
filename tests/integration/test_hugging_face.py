"""The commands on a run of TP 2 x PP 2 and on one of DeepSpeed: any number of processes writes the same folder, which starts and scores as the run does.

The quickstart's export also generates text in an environment that has torch, transformers and what those two need, and nothing else.
"""

import json
import os
import subprocess
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from support.foreign_llama import LLAMA3_ROPE, llama_record, random_tensors, write_folder
from support.fresh_environment import fresh_environment, needed
from support.run_folders import without_common_weights
from support.training import records, run, train

SETTINGS = (
    "experiment=quickstart",
    "model=tiny",
    "model.init_std=0.2",
    "training.steps=1",
    "training.global_batch_tokens=512",
    "training.micro_batch_size=1",
    "data.sequence_length=128",
    "evaluation.rows=4",
    "evaluation.at_start=false",
)
SIZE = "max_shard_size=300KB"
GENERATE = """
import json, sys
from importlib.util import find_spec
from transformers import AutoModelForCausalLM, AutoTokenizer

found = [name for name in ("ssa_pretrain", "ssa_kernels", "data_prep", "megatron", "hydra", "triton", "pytest") if find_spec(name)]
tokenizer, texts = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True), []
for mode in ("full", "sparse"):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], attention_mode=mode, trust_remote_code=True)
    tokens = tokenizer(sys.argv[2], return_tensors="pt")
    new = model.generate(**tokens, max_new_tokens=40, do_sample=False)[0, tokens["input_ids"].shape[1] :]
    texts.append({"tokens": new.tolist(), "text": tokenizer.decode(new)})
print(json.dumps({"found": found, "module": type(model).__module__, "texts": texts}))
"""
TEXT = "The history of the town begins in the thirteenth century, when a bridge was built over the river. " * 5


def export(source: Path, out: Path, *settings: str, processes: int = 1) -> Path:
    done = run("ssa_pretrain.export", str(source), f"out={out}", SIZE, *settings, processes=processes)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f": {out}\n" in done.stdout
    assert ("checked: relative errors of the logits" in done.stdout) is ("check=true" in settings)
    return out


def require_same(one: Path, other: Path, *, but: tuple[str, ...] = ()) -> None:
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in other.iterdir()}
    for name in names - set(but):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def trained(folder: Path, corpus: Path, *settings: str, processes: int) -> Path:
    train(*SETTINGS, f"data.path={corpus}", f"output_dir={folder}", *settings, processes=processes)
    return folder


def imported_from(folder: Path, out: Path, *settings: str) -> list[str]:
    """Imports a folder; returns the model's settings, as the command prints them."""
    done = run("ssa_pretrain.import_hf", str(folder), f"out={out}", *settings)
    assert done.returncode == 0, done.stderr
    assert f"checkpoint.init_from={out}" in done.stdout
    return done.stdout.splitlines()[-1].split()


@pytest.fixture(scope="module")
def exported(corpus, tmp_path_factory) -> tuple[Path, Path]:
    """Returns the folders of the quickstart's run on four processes, and of its export. No test changes the export."""
    folder = tmp_path_factory.mktemp("quickstart")
    source = trained(folder / "run", corpus, "parallel=tp2_pp2", processes=4)
    return source, export(source, folder / "alone", "dtype=fp32", "check=true")


def test_quickstarts_export_generates_with_torch_and_transformers_only(exported, tmp_path):
    import torch
    from transformers import AutoTokenizer

    from ssa_pretrain.huggingface.modelling_ssa import SSALlamaForCausalLM

    _, folder = exported
    python = fresh_environment(tmp_path / "environment", "torch", "transformers")
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    variables |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [str(python), "-I", "-c", GENERATE, str(folder), TEXT]
    done = subprocess.run(
        command, capture_output=True, text=True, env=variables, cwd=tmp_path, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["found"] in ([], ["triton"]), "a CUDA build of torch needs triton"
    assert result["module"].startswith("transformers_modules.")
    tokens = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(TEXT, return_tensors="pt")
    for mode, found in zip(("full", "sparse"), result["texts"], strict=True):
        model = SSALlamaForCausalLM.from_pretrained(folder, attention_mode=mode)
        with torch.no_grad():
            wanted = model.generate(**tokens, max_new_tokens=40, do_sample=False)[0, tokens["input_ids"].shape[1] :]
        assert found["tokens"] == wanted.tolist() and found["text"].strip(), mode


def test_needs_are_found_through_needs():
    found = {name.replace("_", "-") for name in needed("torch", "transformers")}
    assert {"torch", "transformers", "huggingface-hub", "numpy", "sympy", "mpmath"} <= found
    with pytest.raises(PackageNotFoundError, match="no_such_package"):
        needed("no_such_package")


def test_every_number_of_processes_exports_the_same_and_an_import_scores_the_same(exported, corpus, tmp_path):
    source, alone = exported
    assert len(list(alone.glob("*.safetensors"))) >= 4
    require_same(export(source / "checkpoints/step_00000001", tmp_path / "four", "dtype=fp32", processes=4), alone)
    imported_from(alone, tmp_path / "imported", f"data={corpus}")
    scores = [evaluate(folder, corpus) for folder in (source, tmp_path / "imported")]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)
    without_common_weights(source / "checkpoints/step_00000001")
    require_same(export(source, tmp_path / "by_engine", "dtype=fp32", processes=4), alone)


def test_deepspeed_exports_and_starts_from_an_import(corpus, tmp_path):
    layout = ("engine=deepspeed", "parallel=tp2")
    source = trained(tmp_path / "run", corpus, *layout, processes=2)
    alone = export(source, tmp_path / "alone", "dtype=fp32")
    settings = imported_from(alone, tmp_path / "imported")
    start = (f"checkpoint.init_from={tmp_path / 'imported'}", "optim.lr=1e-30", *settings)
    begun = trained(tmp_path / "begun", corpus, *layout, *start, processes=2)
    require_same(export(begun, tmp_path / "unchanged", "dtype=fp32"), alone, but=("README.md",))
    without_common_weights(source / "checkpoints/step_00000001")
    require_same(export(source, tmp_path / "by_engine", "dtype=fp32", processes=2), alone)


def test_convert_llama_trains_a_llama_from_an_import(corpus, tmp_path):
    """The recipe at its own settings, but for size, precision and the number of steps; the import prints the settings of the model."""
    record = llama_record(rope=LLAMA3_ROPE) | {"vocab_size": 4096}
    folder = write_folder(tmp_path / "llama", record, random_tensors(vocab=4096))
    imported, out = tmp_path / "imported", tmp_path / "out"
    settings = imported_from(folder, imported, "gate=open")
    assert "attention.gate=true" in settings
    small = ("precision=fp32", "data.sequence_length=512", "training.global_batch_tokens=1024", "training.steps=2")
    small += ("evaluation.rows=2", "attention.impl=reference", "attention.top_k=4")
    paths = (f"data.path={corpus}", f"output_dir={out}", f"checkpoint.init_from={imported}")
    train("experiment=convert_llama", *settings, *small, *paths)
    losses = {(r["step"], r["mode"]): r["cross_entropy"] for r in records(out, "evaluation")}
    assert set(losses) == {(step, mode) for step in (0, 2) for mode in ("full", "sparse")}
    assert losses[0, "full"] != losses[0, "sparse"]
    assert losses[2, "full"] < losses[0, "full"], "the weights of the import were trained"
    assert (out / "checkpoints/step_00000002").is_dir()


def evaluate(folder: Path, corpus: Path) -> list[float]:
    """Returns the cross entropy of each mode."""
    done = run("ssa_pretrain.evaluate", str(folder), f"data.path={corpus}", "precision.name=fp32", "evaluation.rows=4")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = (folder / "evaluations").glob("*.json")
    modes = json.loads(path.read_text())["modes"]
    (folder / "evaluation.json").unlink(missing_ok=True)
    return [modes[mode]["cross_entropy"] for mode in ("full", "sparse")]
