"""The kernels around attention (projection split with RoPE, gate, SwiGLU, output layer with cross entropy) in Triton's interpreter against float64."""

import pytest
import torch
import torch.nn.functional as F

from ssa_kernels import gate, linear_cross_entropy, qkv_rope, swiglu
from support.errors import require_as_near

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1 before Triton is imported"
)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Makes torch.empty return NaN, so that every element that a kernel does not write is visible."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def close(got, want, dtype):
    """Fails unless float32 is off by only a few roundings of 2^-24 in sums of some hundred terms, and float16 by one rounding of the exact result."""
    assert got.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(got.double(), want.double(), rtol=2e-5, atol=2e-5)
    else:
        require_as_near(got, want.to(dtype), want, factor=1.05)


def rotated_reference(x, angle):
    """Returns [tokens, heads, D] in float64, rotated pair by pair."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for i in range(half):
        cos, sin = angle[:, i : i + 1].cos(), angle[:, i : i + 1].sin()
        out[..., i] = x[..., i] * cos - x[..., i + half] * sin
        out[..., i + half] = x[..., i + half] * cos + x[..., i] * sin
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "kv_heads", "group", "head_dim", "gates"),
    [(37, 2, 4, 16, 4), (33, 1, 3, 24, 0), (5, 3, 1, 8, 1), (70, 2, 2, 64, 2), (9, 1, 2, 256, 2)],
)
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_qkv_rope(tokens, kv_heads, group, head_dim, gates, dtype, impl):
    generator = torch.Generator().manual_seed(tokens)
    width = (group + 2) * head_dim + gates
    mixed = torch.randn(tokens, kv_heads * width, generator=generator).to(dtype).requires_grad_()
    angles = torch.rand(50, head_dim, generator=generator) * 40
    positions = torch.randint(0, 50, (tokens,), generator=generator)
    sizes = {"num_kv_heads": kv_heads, "group_size": group, "head_dim": head_dim, "num_gates": gates}
    found = [x for x in qkv_rope(mixed, angles, positions, **sizes, impl=impl) if x is not None]
    assert all(x.is_contiguous() or impl == "reference" for x in found) and len(found) == 3 + bool(gates)
    grads = [torch.randn(x.shape, generator=generator).to(dtype) for x in found]

    wide = mixed.detach().double().requires_grad_()
    parts = wide.view(tokens, kv_heads, width)
    rows, angle = group * head_dim, angles[positions].double()
    q = rotated_reference(parts[..., :rows].reshape(tokens, kv_heads * group, head_dim), angle)
    k = rotated_reference(parts[..., rows : rows + head_dim], angle)
    wanted = [q, k, parts[..., rows + head_dim : rows + 2 * head_dim]]
    if gates:
        wanted.append(parts[..., rows + 2 * head_dim :].reshape(tokens, -1))
    for got, want in zip(found, wanted, strict=True):
        close(got, want, dtype)
    (grad,) = torch.autograd.grad(found, mixed, grads)
    (want,) = torch.autograd.grad(wanted, wide, [g.double() for g in grads])
    close(grad, want, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(9, 4, 64), (1, 1, 8), (70, 3, 80)])
def test_gate(shape, dtype):
    generator = torch.Generator().manual_seed(3)
    o = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    logits = (3 * torch.randn(shape[:2], generator=generator)).to(dtype).requires_grad_()
    grad = torch.randn(shape, generator=generator).to(dtype)
    wide = [x.detach().double().requires_grad_() for x in (o, logits)]
    want = wide[0] * wide[1].sigmoid()[..., None]
    for impl in ("triton", "reference"):
        out = gate(o, logits, impl=impl)
        close(out, want, dtype)
        for got, expected in zip(
            torch.autograd.grad(out, (o, logits), grad),
            torch.autograd.grad(want, wide, grad.double(), retain_graph=True),
            strict=True,
        ):
            close(got, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(5, 1, 64), (3, 2, 6), (2, 4100)])
def test_swiglu(shape, dtype):
    generator = torch.Generator().manual_seed(4)
    x = (2 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    a, b = wide.chunk(2, dim=-1)
    want = F.silu(a) * b
    grad = torch.randn(want.shape, generator=generator).to(dtype)
    (want_grad,) = torch.autograd.grad(want, wide, grad.double())
    out = swiglu(x, impl="triton")
    close(out, want, dtype)
    close(torch.autograd.grad(out, x, grad)[0], want_grad, dtype)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize(("tokens", "columns", "size"), [(7, 33, 8), (3, 5000, 16), (12, 128, 24)])
@pytest.mark.parametrize("spread", [1.0, 40.0])  # logits far apart, where a softmax without its maximum overflows
def test_linear_cross_entropy(tokens, columns, size, spread, impl):
    generator = torch.Generator().manual_seed(columns)
    hidden = torch.randn(tokens, size, generator=generator).requires_grad_()
    weight = (spread * torch.randn(columns, size, generator=generator) / size**0.5).requires_grad_()
    labels = torch.randint(0, columns, (tokens,), generator=generator)
    grad = torch.rand(tokens, generator=generator) * (torch.rand(tokens, generator=generator) > 0.3)
    losses = linear_cross_entropy(hidden, weight, labels, impl=impl)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want = F.cross_entropy(wide[0] @ wide[1].t(), labels, reduction="none")
    torch.testing.assert_close(losses.double(), want, rtol=1e-5, atol=3e-5 * spread)
    found = torch.autograd.grad(losses, (hidden, weight), grad)
    for got, expected in zip(found, torch.autograd.grad(want, wide, grad.double()), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=3e-5 * spread)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_weights_gradient_is_added_to_a_buffer(impl):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(6, 8, generator=generator).requires_grad_()
    weight = torch.randn(40, 8, generator=generator).requires_grad_()
    labels = torch.randint(0, 40, (6,), generator=generator)
    wanted = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, impl=impl).sum(), (hidden, weight))
    buffer = torch.ones(40, 8)
    losses = linear_cross_entropy(hidden, weight, labels, accumulate_into=buffer, impl=impl)
    losses.sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(hidden.grad, wanted[0])
    torch.testing.assert_close(buffer, 1 + wanted[1])


def test_logits_are_unchanged_without_a_gradient():
    hidden, weight = torch.randn(4, 8), torch.randn(20, 8)
    labels = torch.arange(4)
    want = F.cross_entropy(hidden @ weight.t(), labels, reduction="none")
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, impl="triton"), want)


def test_kernels_over_two_spans_of_the_vocabulary():
    """The work of two tensor ranks in turn: their combined statistics, and P from the combined log-sum-exp."""
    from ssa_kernels.linear_cross_entropy.triton import probabilities_in_place, statistics

    logits = 3 * torch.randn(9, 60)
    labels = torch.randint(0, 60, (9,))
    spans = [logits[:, :30].contiguous(), logits[:, 30:].contiguous()]
    found = [statistics(span, labels, 30 * rank, overwrite=False) for rank, span in enumerate(spans)]
    lse = torch.logsumexp(torch.stack([lse for lse, _ in found]), dim=0)
    loss = lse - sum(target for _, target in found)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, reduction="none"), rtol=1e-5, atol=1e-5)
    for rank, span in enumerate(spans):
        probabilities_in_place(span, labels, 30 * rank, lse)
    want = logits.softmax(-1) - F.one_hot(labels, 60)
    torch.testing.assert_close(torch.cat(spans, dim=1), want, rtol=1e-5, atol=1e-6)


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match=r"mixed \(4, 10\) must be \[tokens, 52\]"):
        qkv_rope(
            torch.zeros(4, 10),
            torch.zeros(4, 8),
            torch.zeros(4, dtype=torch.int64),
            num_kv_heads=1,
            group_size=4,
            head_dim=8,
            num_gates=4,
        )
    with pytest.raises(ValueError, match="must be even"):
        qkv_rope(
            torch.zeros(4, 10),
            torch.zeros(4, 8),
            torch.zeros(4, dtype=torch.int64),
            num_kv_heads=1,
            group_size=4,
            head_dim=7,
            num_gates=0,
        )
    with pytest.raises(ValueError, match="one integer for each of 4 tokens"):
        linear_cross_entropy(torch.zeros(4, 8), torch.zeros(20, 8), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="of one dtype"):
        linear_cross_entropy(torch.zeros(4, 8), torch.zeros(20, 9), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="float32 of the weight's shape"):
        linear_cross_entropy(
            torch.zeros(4, 8), torch.zeros(20, 8), torch.zeros(4, dtype=torch.int64), accumulate_into=torch.zeros(2, 8)
        )
    with pytest.raises(ValueError, match="its first two sizes"):
        gate(torch.zeros(4, 2, 8), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="even last size"):
        swiglu(torch.zeros(4, 7))


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("z_loss", [1e-4, 0.3])
def test_z_loss(z_loss, impl):
    """Losses, z-losses and both gradients against fp64; an ignored token has none of them."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(7, 16, generator=generator).requires_grad_()
    weight = torch.randn(5000, 16, generator=generator).requires_grad_()
    labels = torch.randint(0, 5000, (7,), generator=generator)
    labels[3] = -100
    grad = torch.rand(7, generator=generator)
    losses, z_losses = linear_cross_entropy(hidden, weight, labels, z_loss=z_loss, impl=impl)
    assert not z_losses.requires_grad
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logits = wide[0] @ wide[1].t()
    want_z = z_loss * logits.logsumexp(-1).square() * (labels >= 0)
    want = F.cross_entropy(logits, labels, reduction="none") + want_z
    for got, expected in ((losses, want), (z_losses, want_z)):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(losses, (hidden, weight), grad)
    for got, expected in zip(found, torch.autograd.grad(want, wide, grad.double()), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=3e-5)
    buffer = torch.ones(5000, 16)
    both = linear_cross_entropy(hidden, weight, labels, accumulate_into=buffer, z_loss=z_loss, impl=impl)
    both[0].backward(grad)
    assert weight.grad is None
    torch.testing.assert_close(buffer - 1, found[1], rtol=1e-4, atol=1e-5)


def test_z_loss_over_two_spans_of_the_vocabulary():
    """The second kernel of a tensor rank, whose P is scaled by the log-sum-exp of all ranks."""
    from ssa_kernels.linear_cross_entropy.triton import probabilities_in_place

    logits = (3 * torch.randn(9, 60)).requires_grad_()
    labels = torch.randint(0, 60, (9,))
    lse = logits.logsumexp(-1)
    (F.cross_entropy(logits, labels, reduction="sum") + 0.1 * lse.square().sum()).backward()
    spans = [logits.detach()[:, :30].contiguous(), logits.detach()[:, 30:].contiguous()]
    for rank, span in enumerate(spans):
        probabilities_in_place(span, labels, 30 * rank, lse.detach(), 0.1)
    torch.testing.assert_close(torch.cat(spans, dim=1), logits.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("z_loss", [-1e-4, float("nan"), float("inf"), True, "1"])
def test_bad_z_loss_is_refused(z_loss):
    with pytest.raises(ValueError, match="must be a finite number, at least 0"):
        linear_cross_entropy(torch.zeros(4, 8), torch.zeros(20, 8), torch.zeros(4, dtype=torch.int64), z_loss=z_loss)
