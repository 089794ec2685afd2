"""A checkpoint that is written beside training holds, bit for bit, what a synchronous one holds, and its failure ends all ranks together."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.processes import run_workers

pytestmark = pytest.mark.timeout(900)
WORKER = Path(__file__).parent / "asynchronous_worker.py"
CASES = {
    "tp2": {"parallel.tp": 2},
    "dp2.bf16": {"precision.name": "bf16"},
    "dp2.not_distributed": {"engine.distributed_optimizer": False, "precision.name": "bf16"},
    "dp2.muon": {"optim.name": "muon", "precision.name": "bf16"},
    "dp2.zero1": {"engine.name": "deepspeed", "deepspeed.zero_stage": 1},
    "dp2.zero3": {"engine.name": "deepspeed", "deepspeed.zero_stage": 3},
    "dp2.zero2.muon": {"engine.name": "deepspeed", "deepspeed.zero_stage": 2, "optim.name": "muon"},
}


def same(one, other, where: str = "") -> None:
    """Fails unless two loaded files are equal: types, tensors to the bit, and everything else."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), where
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            same(*pair, f"{where}.{i}")
    elif hasattr(one, "__dict__"):
        same(vars(one), vars(other), where)
    else:
        assert one == other, where


def files(folder: Path) -> dict[str, Path]:
    return {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """Runs all cases, DeepSpeed's only if it is installed, in the same processes."""
    folder, has_deepspeed = tmp_path_factory.mktemp("asynchronous"), find_spec("deepspeed") is not None
    chosen = {name: settings for name, settings in CASES.items() if has_deepspeed or "zero" not in name}
    run_workers(WORKER, 2, "content", str(folder), json.dumps(chosen), timeout=600)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_content_equals_a_synchronous_checkpoint_although_training_went_on(case, written):
    if "zero" in case:
        pytest.importorskip("deepspeed")
    folder = written / case
    for rank in (0, 1):
        results = json.loads((folder / f"results_{rank}.json").read_text())
        for number in (1, 2):
            assert results[f"live_{number}"] == results[f"loaded_{number}"]
        assert results["live_1"] != results["live_2"]
    for number in (1, 2):
        now, later = files(folder / f"now_{number}"), files(folder / f"later_{number}")
        assert now.keys() == later.keys()
        assert any(name.startswith("weights/") for name in now)
        for name, path in now.items():
            if name.endswith(".pt"):
                same(*(torch.load(p, weights_only=False, map_location="cpu") for p in (path, later[name])), name)
            elif name.endswith(".safetensors"):
                same(load_file(path), load_file(later[name]), name)
            elif name != ".metadata":  # has the time of the save
                assert path.read_bytes() == later[name].read_bytes(), name


def test_failed_write_is_raised_on_all_ranks_after_the_same_step(tmp_path):
    run_workers(WORKER, 2, "failure", str(tmp_path), timeout=300)
    (first, text), (second, other) = ((tmp_path / f"message_{rank}").read_text().split(" ", 1) for rank in (0, 1))
    assert first == second and text == other
    assert text.startswith("step 1 could not be saved in")
    assert "(rank 1: OSError: [Errno 28] No space left on device)" in text
    assert list((tmp_path / "checkpoints").iterdir()) == []
