"""The Triton kernels of gate and alignment in Triton's interpreter, small, against the float64 oracle."""

import pytest
import torch

from ssa_kernels import gate_and_align
from support import oracle
from support.errors import require_as_near

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1 before Triton is imported"
)

FLOAT32 = {"rtol": 2e-5, "atol": 2e-5}  # sums of at most 128 features, each a few rounding errors of 2^-24


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Makes torch.empty return NaN, so that every element that a kernel does not write is visible."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make(tokens=9, heads=4, head_dim=64, size=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens + heads)
    outs = [
        (torch.randn(tokens, heads, head_dim, generator=generator) * size).to(dtype).requires_grad_() for _ in range(2)
    ]
    return [*outs, torch.randn(tokens, heads, generator=generator).to(dtype).requires_grad_()]


def run(inputs, main, weights=(1.0, 1.0), loss_grad=1.0):
    """Returns out, loss, the three gradients, and the gradient of out that was used."""
    out, loss = gate_and_align(*inputs, main=main, weights=weights, impl="triton")
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    grads = torch.autograd.grad((out, loss), inputs, (grad_out, torch.tensor(loss_grad)))
    return [out.detach(), loss.detach(), *grads], grad_out


@pytest.mark.parametrize("main", ["full", "sparse", 1, 0, True])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("size", [0.2, 5.0])  # only the quadratic branch, and both
def test_values_and_gradients(main, weights, size):
    inputs = make(size=size)
    difference = (torch.sigmoid(inputs[2])[..., None] * (inputs[0] - inputs[1])).abs()
    assert bool((difference > 1).any()) == (size > 1)
    given = main if isinstance(main, str) else torch.tensor([main])
    loss_grad = float(inputs[0].numel())  # so that the loss's term is as large as the output's
    ours, grad_out = run(inputs, given, weights, loss_grad)
    name = main if isinstance(main, str) else ("full" if main else "sparse")
    expected = oracle.gate_and_align(*(x.detach() for x in inputs), name, weights, grad_out.double(), loss_grad)
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got.double(), want, **FLOAT32)


@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim"),
    [(1, 1, 64), (7, 3, 64), (33, 1, 80), (5, 64, 128), (11, 6, 96), (65, 2, 64), (3, 1, 8), (9, 2, 256)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ragged_sizes(tokens, heads, head_dim, dtype):
    inputs = make(tokens, heads, head_dim, 2.0, dtype)
    loss_grad = float(inputs[0].numel())
    ours, grad_out = run(inputs, "sparse", loss_grad=loss_grad)
    expected = oracle.gate_and_align(*(x.detach() for x in inputs), "sparse", (1.0, 1.0), grad_out.double(), loss_grad)
    for name, got, want in zip(("out", "loss", "full", "sparse", "logits"), ours, expected, strict=True):
        if got.dtype == torch.float32:
            torch.testing.assert_close(got.double(), want, **FLOAT32)
        else:  # one rounding of the exact result; the logits' gradient is a sum of products with rounded gradients
            factor = 1.5 if name == "logits" else 1.05
            require_as_near(got, want.to(dtype), want, factor=factor, name=name)
    assert ours[1].dtype == torch.float32 and ours[0].dtype == dtype


def test_each_stream_gets_only_its_own_term():
    inputs = make(size=5.0)
    n = inputs[0].numel()
    gate = torch.sigmoid(inputs[2].detach())[..., None]
    pull = (gate * (inputs[0] - inputs[1])).detach().clamp(-1, 1) / n * gate
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        _, loss = gate_and_align(*inputs, main="full", weights=weights, impl="triton")
        full, sparse, _ = torch.autograd.grad(loss, inputs)
        torch.testing.assert_close(full, weights[0] * pull, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(sparse, -weights[1] * pull, rtol=1e-5, atol=1e-9)


def test_deltas_are_row_sums_of_the_rounded_gradients():
    from ssa_kernels.gate_and_align.triton import gate_backward

    inputs = [x.detach() for x in make(dtype=torch.float16, size=3.0)]
    grad_out = torch.randn_like(inputs[0])
    do_full, do_sparse, delta_full, delta_sparse, _ = gate_backward(
        *inputs, grad_out, torch.tensor(50.0), "full", (1.0, 0.5)
    )
    for gradient, out, delta in ((do_full, inputs[0], delta_full), (do_sparse, inputs[1], delta_sparse)):
        torch.testing.assert_close(delta.double(), (gradient.double() * out.double()).sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_captured_mass_for_any_lse_layout(rows):
    from ssa_kernels.gate_and_align.triton import gate_forward

    inputs = [x.detach() for x in make(tokens=21)]
    lse_full = torch.randn(rows, 4, 21 // rows).transpose(1, 2)  # [rows, tokens / rows, H], in a library's layout
    lse_sparse = (lse_full.reshape(21, 4) - torch.rand(21, 4)).contiguous()
    out, loss, mass = gate_forward(*inputs, "full", (1.0, 1.0), (lse_full, lse_sparse))
    torch.testing.assert_close(mass, torch.exp(lse_sparse - lse_full.reshape(21, 4)).mean(), rtol=1e-5, atol=0)
    without = gate_forward(*inputs, "full", (1.0, 1.0))
    assert torch.equal(out, without[0]) and torch.equal(loss, without[1]) and without[2] is None


def test_any_number_of_partials_is_summed():
    from ssa_kernels.gate_and_align.triton import REDUCE_BLOCK, sum_partials_kernel

    for count in (1, REDUCE_BLOCK - 1, REDUCE_BLOCK, 2 * REDUCE_BLOCK + 5):
        partials = torch.rand(2, count)
        result = torch.empty(2)
        sum_partials_kernel[(2,)](partials, result, count, 2.0, 0.5, BLOCK=REDUCE_BLOCK)
        torch.testing.assert_close(
            result, partials.double().sum(1).float() * torch.tensor([2.0, 0.5]), rtol=1e-5, atol=0
        )


def test_rows_are_independent_and_calls_are_deterministic():
    inputs = make(tokens=70)
    first, _ = run(inputs, "full", (1.0, 0.0), loss_grad=0.0)
    again, _ = run(inputs, "full", (1.0, 0.0), loss_grad=0.0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    head = [x.detach()[:13].requires_grad_() for x in inputs]
    out, _ = gate_and_align(*head, main="full", impl="triton")
    assert torch.equal(out, first[0][:13])


def test_no_gate_equals_a_gate_of_one():
    full, sparse, logits = make()
    logits = torch.full_like(logits, torch.inf).requires_grad_()
    out, loss = gate_and_align(full, sparse, logits, main="full", impl="triton")
    assert torch.equal(out, full)
    torch.testing.assert_close(loss, 2 * torch.nn.functional.smooth_l1_loss(full, sparse))
    (grad,) = torch.autograd.grad(out.sum() + loss, logits)
    assert torch.equal(grad, torch.zeros_like(grad))


def test_zero_tokens_give_zero_loss():
    out, loss = gate_and_align(
        torch.empty(0, 2, 64), torch.empty(0, 2, 64), torch.empty(0, 2), main="full", impl="triton"
    )
    assert out.shape == (0, 2, 64) and float(loss) == 0


def test_bad_main_tensor_is_refused():
    full, sparse, logits = make()
    with pytest.raises(ValueError, match="one integer or bool"):
        gate_and_align(full, sparse, logits, main=torch.tensor([1, 0]), impl="triton")
    with pytest.raises(ValueError, match="one integer or bool"):
        gate_and_align(full, sparse, logits, main=torch.tensor(1.0), impl="triton")
