"""The kernels around attention on a GPU at the sizes of the 1B model: bf16 against float64, no worse than rounding, no waiting."""

import pytest
import torch
import torch.nn.functional as F

from ssa_kernels import gate, linear_cross_entropy, qkv_rope, swiglu
from ssa_kernels.qkv_rope.reference import qkv_rope_reference

pytestmark = pytest.mark.gpu
ULP = 2**-9  # half of bf16's last place: what rounding a result once may cost


def error(got, want):
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize(
    ("tokens", "kv_heads", "group", "head_dim", "gates"),
    [(4096, 2, 16, 64, 16), (1000, 1, 16, 64, 0), (777, 8, 4, 128, 4), (129, 3, 5, 80, 5)],
)
def test_qkv_rope(tokens, kv_heads, group, head_dim, gates):
    width = kv_heads * ((group + 2) * head_dim + gates)
    mixed = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    frequencies = 500_000.0 ** (-torch.arange(0, head_dim, 2, device="cuda") / head_dim)
    angles = torch.arange(32768, device="cuda").float()[:, None] * frequencies
    positions = torch.randint(0, 32768, (tokens,), device="cuda")
    sizes = {"num_kv_heads": kv_heads, "group_size": group, "head_dim": head_dim, "num_gates": gates}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    found = [x for x in qkv_rope(mixed, angles, positions, **sizes) if x is not None]
    grads = [torch.randn_like(x) for x in found]
    (grad,) = torch.autograd.grad(found, mixed, grads)
    torch.cuda.set_sync_debug_mode("default")
    wide = mixed.detach().double().requires_grad_()
    wanted = [x for x in qkv_rope_reference(wide, angles.double(), positions, **sizes) if x is not None]
    for got, want in zip(found, wanted, strict=True):
        assert error(got, want) < 1.2 * ULP and not got.isnan().any()
    (want,) = torch.autograd.grad(wanted, wide, [g.double() for g in grads])
    assert error(grad, want) < 1.2 * ULP and not grad.isnan().any()


@pytest.mark.parametrize("shape", [(4096, 32, 64), (77, 3, 80)])
def test_gate(shape):
    o = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    logits = torch.randn(shape[:2], device="cuda", dtype=torch.bfloat16, requires_grad=True)
    out = gate(o, logits)
    grad = torch.randn_like(out)
    wide = [x.detach().double().requires_grad_() for x in (o, logits)]
    want = wide[0] * wide[1].sigmoid()[..., None]
    assert error(out, want) < 1.2 * ULP
    for got, expected in zip(
        torch.autograd.grad(out, (o, logits), grad), torch.autograd.grad(want, wide, grad.double()), strict=True
    ):
        assert error(got, expected) < 1.2 * ULP


@pytest.mark.parametrize("shape", [(2048, 1, 16384), (33, 70)])
def test_swiglu(shape):
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = swiglu(x)
    grad = torch.randn_like(y)
    wide = x.detach().double().requires_grad_()
    a, b = wide.chunk(2, dim=-1)
    want = F.silu(a) * b
    assert error(y, want) < 1.2 * ULP
    (expected,) = torch.autograd.grad(want, wide, grad.double())
    assert error(torch.autograd.grad(y, x, grad)[0], expected) < 1.2 * ULP


@pytest.mark.parametrize(("tokens", "columns", "size"), [(512, 128256, 256), (100, 5000, 64)])
@pytest.mark.parametrize("fused", [False, True])
def test_linear_cross_entropy(tokens, columns, size, fused):
    hidden = torch.randn(tokens, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(columns, size, device="cuda") * size**-0.5).bfloat16().requires_grad_()
    labels = torch.randint(0, columns, (tokens,), device="cuda")
    grad = torch.rand(tokens, device="cuda") / tokens
    buffer = torch.ones(columns, size, device="cuda") if fused else None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    losses = linear_cross_entropy(hidden, weight, labels, accumulate_into=buffer)
    losses.backward(grad)
    torch.cuda.set_sync_debug_mode("default")
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want = F.cross_entropy(wide[0] @ wide[1].t(), labels, reduction="none")
    want.backward(grad.double())
    # Logits of size one are rounded to bf16, and so are the probabilities; sums over them average the rounding out.
    assert error(losses, want) < ULP
    assert error(hidden.grad, wide[0].grad) < 3 * ULP
    got = weight.grad if buffer is None else buffer - 1.0
    assert error(got, wide[1].grad) < 4 * ULP
    assert (weight.grad is None) == fused


def test_it_holds_one_buffer_of_logits():
    tokens, columns, size = 4096, 128256, 256
    hidden = torch.randn(tokens, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(columns, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, columns, (tokens,), device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(hidden, weight, labels).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 1.2 * tokens * columns * 2 + 4 * columns * size * 2
