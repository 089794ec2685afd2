"""Context parallelism over two ranks, on one GPU or on two, against one rank: references in fp32 to 1e-5, kernels in bf16 and FP8 about as far from fp32 as one rank."""

from pathlib import Path

import pytest
import torch

from ssa_pretrain.checkpoint.weights import canonical_name
from support import gpu_ranks
from support.errors import relative, require_as_near, require_means_as_near

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1200)]
WORKER = Path(__file__).with_name("context_worker.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    """Returns the results of one rank and of two."""
    found = []
    for cp in (1, 2):
        path = tmp_path_factory.mktemp("context") / f"{cp}.pt"
        gpu_ranks.run([str(WORKER), str(path), str(cp)], cp, timeout=900)
        found.append(torch.load(path, weights_only=True))
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_two_ranks_equal_one(results, precision):
    if precision == "fp8":
        pytest.importorskip("transformer_engine")
    one, two = results
    assert one.keys() == two.keys()
    assert sum(name.startswith(precision) for name in one) == (7 if precision == "fp8" else 7 + 2 * 6)
    for name, wanted in one.items():
        if not name.startswith(precision):
            continue
        found, exact = two[name], one[f"fp32.{name.partition('.')[2]}"]
        # The exact model has the local layers' names, the others Transformer Engine's.
        truths = {canonical_name(key): gradient for key, gradient in exact["gradients"].items()}
        for what in ("results", "evaluated"):
            ours, theirs, right = (torch.tensor(r[what], dtype=torch.float64) for r in (found, wanted, exact))
            if precision == "fp32":
                # The alignment is a distance between two streams that are nearly equal.
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
            else:
                require_means_as_near(ours, theirs, right)
        for key, gradient in wanted["gradients"].items():
            if precision == "fp32":
                off = relative(found["gradients"][key], gradient)
                assert off < 1e-5, f"{name}: {key} off by {off:.1e}"
            else:
                ours, right = found["gradients"][key], truths[canonical_name(key)]
                require_as_near(ours, gradient, right, factor=1.5, name=f"{name}: {key}")
