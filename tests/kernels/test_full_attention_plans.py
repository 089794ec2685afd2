"""The choice of the full stream's fused kernel, and the shapes of its inputs and results, without a GPU: on meta tensors."""

import sys
import warnings
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from ssa_kernels import build_layout, full_attention, query_spans
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


def plan_on(monkeypatch, gpu, with_te=True):
    """Makes the choice that of a GPU which is not here, with or without Transformer Engine."""
    monkeypatch.setattr(sys.modules[plan_fused.__module__], "gpu_of", lambda device: KNOWN_GPUS[gpu])
    monkeypatch.setattr(te, "is_usable", lambda: with_te)


@pytest.mark.parametrize(
    ("gpu", "with_te", "head_dim", "chosen"),
    [
        ("sm_90", True, 64, "te"),
        ("sm_90", True, 128, "te"),
        ("sm_90", True, 136, "flash"),
        ("sm_90", True, 256, "flash"),
        ("sm_100", True, 128, "te"),
        ("sm_100", True, 256, "flash"),
        ("sm_90", False, 64, "flash"),
        ("sm_80", True, 64, "flash"),
        ("sm_120", True, 64, "flash"),
        ("gfx942", False, 64, "flash"),
    ],
)
def test_kernel_by_gpu_and_head_dim(monkeypatch, gpu, with_te, head_dim, chosen):
    """Of packed documents and of spans of queries. Rows of equal length take cuDNN where heads are narrow."""
    plan_on(monkeypatch, gpu, with_te)
    q, k, _ = make("cpu", head_dim=head_dim)
    assert plan(q, k).backend == chosen
    spans = query_spans(build_layout(ENDS, num_tokens=256, block_size=16), [(0, 256)])
    assert plan(q, k, spans).backend == chosen
    rows = "flash" if head_dim > 128 or gpu == "gfx942" else "cudnn"
    assert plan(q, k, num_rows=2).backend == plan(q, k, spans, num_rows=2).backend == rows


@pytest.mark.parametrize("backend", ["cudnn", "te"])
def test_cudnn_is_refused_for_wide_heads(monkeypatch, backend):
    """Also where it is asked for by name, and before anything runs: its gradients were wrong on an H200."""
    plan_on(monkeypatch, "sm_90")
    message = (
        f"head_dim=256 of full_attention must be at most 128 with backend='{backend}', .* try backend=None or 'flash'"
    )
    q, k, v = make("cpu", head_dim=256)
    spans = query_spans(build_layout(ENDS, num_tokens=256, block_size=16), [(0, 256)])
    for ends in (ENDS, spans):
        with pytest.raises(ValueError, match=message):
            plan(q, k, ends, num_rows=2, backend=backend)
    with pytest.raises(ValueError, match=message):
        full_attention(q, k, v, cu_seqlens=ENDS, num_rows=2, backend=backend)
    narrow = make("cpu", head_dim=128)[:2]
    assert plan(*narrow, num_rows=2, backend=backend).backend == backend
    assert plan(q, k, backend="flash").backend == "flash"


def test_amd_takes_flash_attention(monkeypatch):
    q, k, _ = make("cpu")
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
