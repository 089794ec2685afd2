"""Gate and alignment: values, each stream's own term, the linear branch of SmoothL1, the gate's gradient."""

import pytest
import torch

from ssa_kernels import gate_and_align
from support import oracle


def make(size=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    full, sparse = (torch.randn(9, 4, 8, generator=generator, dtype=torch.float64) * size for _ in range(2))
    return [
        x.to(dtype).requires_grad_()
        for x in (full, sparse, torch.randn(9, 4, generator=generator, dtype=torch.float64))
    ]


@pytest.mark.parametrize("size", [0.2, 5.0])  # only the quadratic branch, and both
@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("main", ["full", "sparse"])
def test_values_and_gradients(main, weights, size):
    inputs = make(size)
    difference = torch.sigmoid(inputs[2])[..., None] * (inputs[0] - inputs[1])
    assert bool((difference.abs() > 1).any()) == (size > 1)
    out, loss = gate_and_align(*inputs, main=main, weights=weights)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
    grads = torch.autograd.grad((out * grad_out).sum() + 3.0 * loss, inputs)
    expected = oracle.gate_and_align(*(x.detach() for x in inputs), main, weights, grad_out, 3.0)
    for ours, theirs in zip([out, loss, *grads], expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-12, atol=1e-14)


def test_each_stream_gets_only_its_own_term():
    inputs = make(5.0)
    n = inputs[0].numel()
    gate = torch.sigmoid(inputs[2].detach())[..., None]
    pull = (gate * (inputs[0] - inputs[1])).detach().clamp(-1, 1) / n * gate
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        _, loss = gate_and_align(*inputs, main="full", weights=weights)
        full, sparse, _ = torch.autograd.grad(loss, inputs)
        torch.testing.assert_close(full, weights[0] * pull)
        torch.testing.assert_close(sparse, -weights[1] * pull)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)])
def test_gradcheck_of_the_side_with_a_gradient(weights):
    """One term at a time, differentiated into its own stream: only these derivatives can be checked by finite differences."""
    full, sparse, gate = make(5.0)
    if weights[0]:
        assert torch.autograd.gradcheck(
            lambda x: gate_and_align(x, sparse.detach(), gate.detach(), main="full", weights=weights), full
        )
    else:
        assert torch.autograd.gradcheck(
            lambda x: gate_and_align(full.detach(), x, gate.detach(), main="sparse", weights=weights), sparse
        )


def test_low_precision_is_accumulated_in_float32():
    full, sparse, gate = (x.detach().to(torch.bfloat16) for x in make())
    out, loss = gate_and_align(full, sparse, gate, main="sparse")
    expected = oracle.gate_and_align(full, sparse, gate, "sparse", (1.0, 1.0), 0.0, 0.0)
    assert out.dtype == torch.bfloat16 and loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected[1], rtol=1e-6, atol=0)
    assert torch.equal(out, expected[0].to(torch.bfloat16))


def test_bad_arguments_are_refused():
    full, sparse, gate = make()
    with pytest.raises(ValueError, match="main='both'"):
        gate_and_align(full, sparse, gate, main="both")
    with pytest.raises(ValueError, match=r"gate_logits.*\(9, 2\)"):
        gate_and_align(full, sparse, gate[..., :2], main="full")
