"""The running mean of the weights is that of one process, on every layout and in either engine; it loads on another layout to the bit."""

import json
from pathlib import Path

import pytest
import torch

from ssa_pretrain.checkpoint.weights import WeightsReader
from support.errors import relative
from support.processes import run_workers

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.timeout(600)
WORKER = Path(__file__).parent / "ema_worker.py"
ZERO0, ZERO2 = ({"engine.name": "deepspeed", "deepspeed.zero_stage": stage} for stage in (0, 2))
BF16 = {"precision.name": "bf16", "precision.grad_reduce_in_fp32": False}  # stage 0 has one type for both
TP, PP = {"parallel.tp": 2}, {"parallel.pp": 2}
CASES = {  # name -> its settings, and those that load it
    "dp": ({}, TP),
    "dp_whole": ({"engine.distributed_optimizer": False}, {}),
    "dp_whole_bf16": ({"engine.distributed_optimizer": False, "precision.name": "bf16"}, {}),
    "dp_bf16": ({"precision.name": "bf16"}, {"precision.name": "bf16"} | PP),
    "dp_overlap": ({"engine.overlap_grad_reduce": True, "engine.overlap_param_gather": True}, ZERO2),
    "dp_zero2": (ZERO2, ZERO2 | TP),
    "dp_zero0": (ZERO0, ZERO2),
    "dp_zero0_bf16": (ZERO0 | BF16, ZERO0 | BF16 | TP),
    "tp": (TP | {"parallel.sequence_parallel": True}, PP),
    "pp": (PP, {}),
}


def read(folder: Path, kind: str = "ema") -> dict[str, torch.Tensor]:
    reader = WeightsReader(folder / kind)
    return {name: reader.read(name) for name in reader.tensors}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ema")
    (folder / "cases.json").write_text(json.dumps(CASES))
    run_workers(WORKER, 2, str(folder / "cases.json"), str(folder), timeout=500)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_mean_is_the_same_on_every_layout_and_in_either_engine(results, name):
    found, wanted = read(results / name), read(results / "dp_whole")  # there each rank has whole weights
    assert found.keys() == wanted.keys()
    own = read(results / f"{name}.snapshot", "weights")
    for key, mean in found.items():
        assert mean.dtype == torch.float32 and not torch.equal(mean, mean.bfloat16().float()), key
        assert not torch.equal(mean, own[key].float()), key
        if "bf16" not in name:
            assert relative(mean.double(), wanted[key].double()) < 1e-5, key


@pytest.mark.parametrize("name", CASES)
def test_copy_for_an_asynchronous_save_and_another_layout_have_the_same_bits(results, name):
    saved = read(results / name)
    for other in (f"{name}.snapshot", f"{name}.again"):
        found = read(results / other)
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[key], saved[key]) for key in saved), other


@pytest.mark.parametrize("name", CASES)
def test_model_has_its_own_weights_again_after_the_mean_was_evaluated(results, name):
    own, mean, own_again, mean_again = json.loads((results / f"{name}.json").read_text())
    assert (own, mean) == (own_again, mean_again) and own != mean
