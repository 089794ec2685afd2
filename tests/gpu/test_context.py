"""Two GPUs under context parallelism against one: the references in fp32 to 1e-5, the kernels in bf16 to its rounding."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1200)]
WORKER = Path(__file__).with_name("context_worker.py")
ROOT = WORKER.parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    """Return the results of one GPU and of two."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two NVIDIA GPUs, found {torch.cuda.device_count()}")
    found = []
    for cp in (1, 2):
        path = tmp_path_factory.mktemp("context") / f"{cp}.pt"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cp)]
        places = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
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


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of what is wanted."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(("precision", "figures", "gradients"), [("fp32", 1e-5, 1e-5), ("bf16", 3e-2, 3e-2)])
def test_two_gpus_equal_one(results, precision, figures, gradients):
    one, two = results
    assert one.keys() == two.keys() and len(one) == 20
    for name, wanted in one.items():
        if not name.startswith(precision):
            continue
        found = two[name]
        for what in ("figures", "evaluated"):
            ours, theirs = (torch.tensor(r[what], dtype=torch.float64) for r in (found, wanted))
            torch.testing.assert_close(
                ours[:, 1:], theirs[:, 1:], rtol=figures, atol=0.0, msg=lambda text, n=name: f"{n}: {text}"
            )
            torch.testing.assert_close(ours[:, 0], theirs[:, 0], rtol=min(figures, 1e-3), atol=0.0)
        for key, gradient in wanted["gradients"].items():
            off = relative(found["gradients"][key], gradient)
            assert off < gradients, f"{name}: {key} off by {off:.1e}"
