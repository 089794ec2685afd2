"""Context parallelism on two GPUs against one GPU: references in fp32 to 1e-5, kernels in bf16 and FP8 about as far from fp32 as one GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.errors import relative, require_as_near, require_means_as_near
from support.processes import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1200)]
WORKER = Path(__file__).with_name("context_worker.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    """Returns the results of one GPU and of two."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two NVIDIA GPUs, found {torch.cuda.device_count()}")
    found = []
    for cp in (1, 2):
        path = tmp_path_factory.mktemp("context") / f"{cp}.pt"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cp)]
        folders = (ROOT, ROOT / "kernels", ROOT / "tests")
        places = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [*command, str(WORKER), str(path), str(cp)],
            env={**os.environ, "PYTHONPATH": places},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr[-6000:]
        found.append(torch.load(path, weights_only=True))
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_two_gpus_equal_one(results, precision):
    one, two = results
    assert one.keys() == two.keys() and len(one) == 31
    for name, wanted in one.items():
        if not name.startswith(precision):
            continue
        found, exact = two[name], one[f"fp32.{name.partition('.')[2]}"]
        for what in ("results", "evaluated"):
            ours, theirs, right = (torch.tensor(r[what], dtype=torch.float64) for r in (found, wanted, exact))
            if precision == "fp32":
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0.0, msg=lambda text, n=name: f"{n}: {text}")
            else:
                require_means_as_near(ours, theirs, right)
        for key, gradient in wanted["gradients"].items():
            if precision == "fp32":
                off = relative(found["gradients"][key], gradient)
                assert off < 1e-5, f"{name}: {key} off by {off:.1e}"
            else:
                ours, right = found["gradients"][key], exact["gradients"][key]
                require_as_near(ours, gradient, right, factor=1.5, name=f"{name}: {key}")
