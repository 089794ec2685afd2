"""The choice of the full stream's fused kernel, and the shapes of its inputs and results, without a GPU: on meta tensors."""

import sys
import warnings
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from ssa_kernels import build_layout
from ssa_kernels.devices import KNOWN_GPUS
from ssa_kernels.documents import document_ends
from ssa_kernels.full_attention import te
from ssa_kernels.full_attention.fused import FusedPlan, fused_backward, fused_forward, plan_fused

ENDS = torch.tensor([0, 128, 256])


def make(device="meta", dtype=torch.bfloat16, head_dim=64):
    sizes = ((256, 8, head_dim), (256, 2, head_dim), (256, 2, head_dim))
    return [torch.empty(size, device=device, dtype=dtype) for size in sizes]


def plan(q, k, ends=ENDS, num_rows=None, backend=None):
    return plan_fused(q, k, ends, num_rows=num_rows, backend=backend, scale=0.125)[0]


def test_plan_depends_on_shapes_and_arguments_only():
    q, k, _ = make("cpu")
    layout = build_layout(ENDS, num_tokens=256, block_size=16, max_length=200)
    assert plan(q, k, num_rows=2, backend="cudnn") == FusedPlan("cudnn", 2, 128, 0.125)
    assert plan(q, k, backend="flash") == FusedPlan("flash", 0, 256, 0.125)
    assert plan(q, k, layout, backend="flash") == FusedPlan("flash", 0, 200, 0.125)
    assert plan(q, k, num_rows=4, backend="flash") == FusedPlan("flash", 0, 64, 0.125)


def test_wide_heads_and_amd_take_flash_attention(monkeypatch):
    """No other kernel was tested there: what is asked for by name still runs."""
    q, k, _ = make("cpu", head_dim=256)
    assert plan(q, k, num_rows=2).backend == "flash"
    assert plan(q, k, num_rows=2, backend="cudnn").backend == "cudnn"
    q, k, _ = make("cpu")
    assert plan(q, k, num_rows=2).backend == "cudnn"
    monkeypatch.setattr(sys.modules[plan_fused.__module__], "gpu_of", lambda device: KNOWN_GPUS["gfx942"])
    assert plan(q, k, num_rows=2).backend == "flash"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for backend in ("cudnn", "te"):
        with pytest.raises(ValueError, match=f"backend='{backend}' of full_attention needs an NVIDIA GPU"):
            plan(q, k, num_rows=2, backend=backend)


def test_deterministic_mode_uses_a_deterministic_kernel():
    q, k, _ = make("cpu")
    torch.use_deterministic_algorithms(True)
    try:
        assert plan(q, k, num_rows=2).backend == "flash"
    finally:
        torch.use_deterministic_algorithms(False)


def test_boundaries_reach_the_last_token():
    assert document_ends(torch.tensor([0, 128]), 256).tolist() == [0, 128, 256]
    assert document_ends(torch.tensor([0, 300]), 256).tolist() == [0, 256, 256]
    assert document_ends(ENDS, 256).dtype == torch.int32


@pytest.mark.parametrize(("backend", "num_rows"), [("cudnn", 2), ("flash", None)])
def test_shapes_in_and_out(backend, num_rows):
    """Meta tensors run the library operators' own shape rules. The gradients' shapes and the lse's view are ours."""
    q, k, v = make()
    what, ends = plan_fused(q, k, ENDS.to("meta"), num_rows=num_rows, backend=backend, scale=0.125)
    o, lse, *states = fused_forward(q, k, v, ends, what)
    assert o.shape == q.shape and o.is_contiguous()
    assert lse.shape == ((2, 128, 8) if num_rows else (1, 256, 8)) and lse.dtype == torch.float32
    grads = fused_backward(o, q, k, v, o, lse, tuple(states), ends, what)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


def test_unsupported_arguments_are_refused():
    q, k, _ = make("cpu")
    with pytest.raises(ValueError, match="must be bfloat16 or float16"):
        plan(*make("cpu", torch.float32)[:2])
    with pytest.raises(ValueError, match="multiple of 8 and at most 256"):
        plan(*make("cpu", head_dim=264)[:2])
    with pytest.raises(ValueError, match="needs num_rows"):
        plan(q, k, backend="cudnn")
    with pytest.raises(ValueError, match="need them equal"):
        plan(q[:3], k, backend="flash")
    with pytest.raises(ValueError, match="must be None, 'cudnn'"):
        plan(q, k, backend="fast")
    if not te.is_usable():
        with pytest.raises(ValueError, match=r"needs transformer_engine 2.20"):
            plan(q, k, backend="te")


@pytest.mark.parametrize(
    ("installed", "warning"),
    [
        (None, None),  # not installed: no warning
        ("2.9.0", "2.9.0 is older than 2.20"),
        (
            "2.20.0+0123abc",
            "does not load",
        ),  # the name of a build from source, which has no separate distribution for torch
        ("3.0", "does not load"),
    ],
)
def test_unusable_transformer_engine_is_reported(monkeypatch, installed, warning):
    def version(name):
        if installed is None or name != "transformer_engine":
            raise PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(te, "version", version)
    monkeypatch.setitem(sys.modules, "transformer_engine", None)  # its import fails
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not te.is_usable.__wrapped__()
    assert [warning in str(one.message) for one in caught] == ([True] if warning else [])
