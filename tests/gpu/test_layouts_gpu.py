"""Layouts of two GPUs train like one GPU: in fp32 to 1e-5 in every gradient, in bf16 and FP8
with the kernels about as far from fp32 as one GPU.

The cases run in the processes of tests/support/layout_worker.py, started by torchrun over NCCL.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssa_pretrain.checkpoint.weights import canonical_name
from support.errors import relative, require_as_near, require_means_as_near
from support.layout_results import assemble
from support.processes import ROOT, SUPPORT

WORKER = SUPPORT / "layout_worker.py"
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

TP, PP, DP = "parallel.tp", "parallel.pp", "world"
LAYOUTS = {
    "tp2": {TP: 2},
    "tp2_sp": {TP: 2, "parallel.sequence_parallel": True},
    "pp2": {PP: 2},
    "pp2_vpp2": {PP: 2, "parallel.vpp": 2},
    "dp2": {DP: 2, "engine.overlap_grad_reduce": True, "engine.overlap_param_gather": True},
}
FP32 = {"attention.impl": "reference", "engine.layer_spec": "local"}
# The 1B model's head shape, so that the kernels of its size run; Transformer Engine's layers where it is installed.
BF16 = {
    "precision.name": "bf16",
    "model.num_layers": 4,
    "model.hidden_size": 256,
    "model.ffn_hidden_size": 512,
    "model.num_attention_heads": 32,
    "model.head_dim": 64,
    "model.init_std": 0.05,
    "training.micro_batch_size": 2,
}
FP8 = BF16 | {"precision.name": "fp8"}
# Only these need Transformer Engine's user buffers.
OVERLAPPED = {"tp2_overlap": LAYOUTS["tp2_sp"] | {"engine.overlap_tp": True}}
EXACT = BF16 | FP32 | {"precision.name": "fp32"}  # the same model without low precision
FP32_TOLERANCE = 1e-5
COPIES = (
    2**-4
)  # tensor ranks' copies of one gradient, each a sum of rounded products; each is judged by the exact one besides


def cases() -> dict[int, dict[str, dict]]:
    """Returns the cases by world size; each precision and stream on one GPU and on every layout of two."""
    found: dict[int, dict[str, dict]] = {1: {}, 2: {}}
    for stream, ratio in (("full", 1.0), ("sparse", 0.0)):
        found[1][f"single.exact.{stream}"] = EXACT | {"attention.full_ratio": ratio}
    for precision, changes in (("fp32", FP32), ("bf16", BF16), ("fp8", FP8)):
        for stream, ratio in (("full", 1.0), ("sparse", 0.0)):
            common = changes | {"attention.full_ratio": ratio}
            found[1][f"single.{precision}.{stream}"] = common
            for layout, degrees in (LAYOUTS | (OVERLAPPED if precision == "bf16" else {})).items():
                name = f"{layout}.{precision}.{stream}"
                found[2][name] = common | {k: v for k, v in degrees.items() if k != DP}
    nsa = {"attention.method": "nsa", "attention.score": "compressed", "attention.window": 20}
    found[1] |= {"single.exact.nsa": EXACT | nsa, "single.bf16.nsa": BF16 | nsa}
    found[2]["tp2_sp.bf16.nsa"] = BF16 | nsa | LAYOUTS["tp2_sp"]
    return found


CASES = cases()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Runs all cases, one torchrun per number of GPUs, and returns the folder of their results."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, and {torch.cuda.device_count()} is visible")
    out = tmp_path_factory.mktemp("layouts")
    for world, listed in CASES.items():
        listing = out / f"cases{world}.json"
        listing.write_text(json.dumps(listed))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        done = subprocess.run(
            [sys.executable, *launcher, str(WORKER), str(listing), str(out)],
            cwd=ROOT,
            env=os.environ | {"UB_SKIPMC": "1"},  # user buffers without multicast, which not every host allows
            capture_output=True,
            text=True,
            timeout=800,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return out


@pytest.mark.parametrize("name", list(CASES[2]))
def test_two_gpus_equal_one(folder, name):
    _, precision, stream = name.split(".")
    if precision == "fp32":
        wanted, found = (assemble(folder, case) for case in (f"single.fp32.{stream}", name))
        torch.testing.assert_close(found["records"], wanted["records"], rtol=FP32_TOLERANCE, atol=1e-6)
    else:
        wanted, found, exact = (
            assemble(folder, case, COPIES) for case in (f"single.{precision}.{stream}", name, f"single.exact.{stream}")
        )
        require_means_as_near(found["records"], wanted["records"], exact["records"])
        # The exact model has the local layers' names, the others Transformer Engine's.
        truths = {canonical_name(key): entry["grad"] for key, entry in exact["parameters"].items()}
    assert {key.removeprefix("output:") for key in found["parameters"]} == set(wanted["parameters"])
    for key, entry in found["parameters"].items():
        target = wanted["parameters"][key.removeprefix("output:")]["grad"]
        if precision == "fp32":
            assert relative(entry["grad"], target) < FP32_TOLERANCE, key
        else:
            truth = truths[canonical_name(key.removeprefix("output:"))]
            require_as_near(entry["grad"], target, truth, factor=1.5, name=key)
