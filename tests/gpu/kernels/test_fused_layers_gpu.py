"""The kernels around attention on a GPU at the sizes of the 1B model: bf16 against float64 to rounding, without waiting."""

import pytest
import torch
import torch.nn.functional as F

from ssa_kernels import QKNorm, gate, key_convolution, linear_cross_entropy, qkv_rope, rope, swiglu
from ssa_kernels.key_convolution.reference import key_convolution_reference
from ssa_kernels.qkv_rope.reference import qkv_rope_reference, rope_reference
from support.errors import require_as_near

pytestmark = pytest.mark.gpu


def require_rounded(got, want):
    """Fails unless the error is at most 1.2 times that of rounding the exact result once."""
    require_as_near(got, want.to(got.dtype), want, factor=1.2)
    assert not got.isnan().any()


@pytest.mark.parametrize(
    ("tokens", "kv_heads", "group", "head_dim", "gates"),
    [(4096, 2, 16, 64, 16), (1000, 1, 16, 64, 0), (777, 8, 4, 128, 4), (129, 3, 5, 80, 5), (513, 2, 8, 256, 8)],
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
        require_rounded(got, want)
    (want,) = torch.autograd.grad(wanted, wide, [g.double() for g in grads])
    require_rounded(grad, want)


def without_waiting(call, leaves):
    """Returns an operator's results, gradients of them and the leaves' gradients; fails if the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    found = [x for x in call() if x is not None]
    grads = [torch.randn_like(x) for x in found]
    got = torch.autograd.grad(found, leaves, grads)
    torch.cuda.set_sync_debug_mode("default")
    return found, grads, got


@pytest.mark.parametrize("rotate_keys", [True, False])
@pytest.mark.parametrize(
    ("tokens", "kv_heads", "group", "head_dim", "gates"),
    [(4096, 2, 16, 64, 16), (1000, 1, 16, 64, 0), (777, 8, 4, 128, 4), (129, 3, 5, 80, 5)],
)
def test_qk_norm(tokens, kv_heads, group, head_dim, gates, rotate_keys):
    width = kv_heads * ((group + 2) * head_dim + gates)
    mixed = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights = [(1 + torch.randn(head_dim, device="cuda") / 2).bfloat16().requires_grad_() for _ in range(2)]
    frequencies = 500_000.0 ** (-torch.arange(0, head_dim, 2, device="cuda") / head_dim)
    angles = torch.arange(32768, device="cuda").float()[:, None] * frequencies
    positions = torch.randint(0, 32768, (tokens,), device="cuda")
    sizes = {"num_kv_heads": kv_heads, "group_size": group, "head_dim": head_dim, "num_gates": gates}
    leaves = [mixed, *weights][: 3 if rotate_keys else 2]

    def call():
        return qkv_rope(mixed, angles, positions, **sizes, norm=QKNorm(*weights, 1e-5), rotate_keys=rotate_keys)

    found, grads, got = without_waiting(call, leaves)
    wide = [x.detach().double().requires_grad_() for x in (mixed, *weights)]
    norm = QKNorm(*wide[1:], 1e-5)
    wanted = qkv_rope_reference(wide[0], angles.double(), positions, **sizes, norm=norm, rotate_keys=rotate_keys)
    wanted = [x for x in wanted if x is not None]
    for one, exact in zip(found, wanted, strict=True):
        require_rounded(one, exact)
    want = torch.autograd.grad(wanted, wide[: len(leaves)], [g.double() for g in grads])
    for one, exact in zip(got, want, strict=True):
        require_rounded(one, exact)


@pytest.mark.parametrize(("tokens", "heads", "dim", "taps"), [(16384, 2, 64, 3), (5000, 8, 128, 5), (129, 3, 80, 3)])
def test_key_convolution_and_rope(tokens, heads, dim, taps):
    k = torch.randn(tokens, heads, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    filters = torch.randn(heads * dim, 1, taps, device="cuda").bfloat16().requires_grad_()
    scale = (1 + torch.randn(dim, device="cuda") / 2).bfloat16().requires_grad_()
    positions = torch.arange(tokens, device="cuda") % 777
    angles = torch.rand(1000, dim, device="cuda") * 40
    for call, definition, leaves in (
        (lambda: [key_convolution(k, filters, positions)], key_convolution_reference, [k, filters]),
        (lambda: [rope(k, angles, positions, weight=scale)], None, [k, scale]),
    ):
        (out,), grads, got = without_waiting(call, leaves)
        wide = [x.detach().double().requires_grad_() for x in leaves]
        if definition is None:
            want = rope_reference(wide[0], angles.double(), positions, wide[1], 1e-5)
        else:
            want = definition(*wide, positions)
        require_rounded(out, want)
        for one, exact in zip(got, torch.autograd.grad(want, wide, grads[0].double()), strict=True):
            require_rounded(one, exact)
        again = torch.autograd.grad(call()[0], leaves, grads[0])
        assert all(map(torch.equal, got, again)), "bit-identical from run to run"


@pytest.mark.parametrize("shape", [(4096, 32, 64), (77, 3, 80)])
def test_gate(shape):
    o = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    logits = torch.randn(shape[:2], device="cuda", dtype=torch.bfloat16, requires_grad=True)
    out = gate(o, logits)
    grad = torch.randn_like(out)
    wide = [x.detach().double().requires_grad_() for x in (o, logits)]
    want = wide[0] * wide[1].sigmoid()[..., None]
    require_rounded(out, want)
    for got, expected in zip(
        torch.autograd.grad(out, (o, logits), grad), torch.autograd.grad(want, wide, grad.double()), strict=True
    ):
        require_rounded(got, expected)


@pytest.mark.parametrize("shape", [(2048, 1, 16384), (33, 70)])
def test_swiglu(shape):
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = swiglu(x)
    grad = torch.randn_like(y)
    wide = x.detach().double().requires_grad_()
    a, b = wide.chunk(2, dim=-1)
    want = F.silu(a) * b
    require_rounded(y, want)
    (expected,) = torch.autograd.grad(want, wide, grad.double())
    require_rounded(torch.autograd.grad(y, x, grad)[0], expected)


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
    # Plain operations round the logits and the gradients of the logits to bf16 as well.
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    plain = F.cross_entropy((leaves[0] @ leaves[1].t()).float(), labels, reduction="none")
    plain.backward(grad)
    require_as_near(losses, plain, want, factor=1.5, name="losses")
    require_as_near(hidden.grad, leaves[0].grad, wide[0].grad, factor=1.5, name="hidden")
    got = weight.grad if buffer is None else buffer - 1.0
    require_as_near(got, leaves[1].grad, wide[1].grad, factor=1.5, name="weight")
    assert (weight.grad is None) == fused


def test_only_one_logits_buffer_is_allocated():
    tokens, columns, size = 4096, 128256, 256
    hidden = torch.randn(tokens, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(columns, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, columns, (tokens,), device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(hidden, weight, labels).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 1.2 * tokens * columns * 2 + 4 * columns * size * 2
