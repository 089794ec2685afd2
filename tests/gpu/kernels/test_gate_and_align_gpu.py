"""Gate and alignment on a GPU: bf16 against the oracle, sizes past 2^31 elements, no waiting, CUDA graphs, one compilation."""

import pytest
import torch

from ssa_kernels import gate_and_align
from support import oracle
from support.errors import relative, require_as_near

pytestmark = pytest.mark.gpu


def make(tokens, heads, head_dim, size=1.0, dtype=torch.bfloat16):
    outs = [(torch.randn(tokens, heads, head_dim, device="cuda") * size).to(dtype).requires_grad_() for _ in range(2)]
    return [*outs, torch.randn(tokens, heads, device="cuda", dtype=dtype).requires_grad_()]


@pytest.mark.parametrize("main", ["full", "sparse", 1, 0])
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim"),
    [
        (1, 1, 64),
        (1000, 3, 64),
        (333, 32, 64),
        (77, 64, 80),
        (129, 8, 96),
        (4096, 32, 128),
        (5000, 6, 64),
        (777, 16, 256),
    ],
)
def test_values_and_gradients_against_float64(tokens, heads, head_dim, main):
    """No worse than 1.2 times the exact results rounded once to bf16; the logits' gradient sums products with rounded gradients."""
    inputs = make(tokens, heads, head_dim, 3.0)
    given = main if isinstance(main, str) else torch.tensor([main], device="cuda")
    out, loss = gate_and_align(*inputs, main=given, weights=(0.7, 1.3))
    grad_out = torch.randn_like(out)
    loss_grad = float(out.numel())
    grads = torch.autograd.grad((out, loss), inputs, (grad_out, torch.tensor(loss_grad, device="cuda")))
    name = main if isinstance(main, str) else ("full" if main else "sparse")
    expected = oracle.gate_and_align(*(x.detach() for x in inputs), name, (0.7, 1.3), grad_out.double(), loss_grad)
    assert relative(loss, expected[1]) < 1e-5
    for got, want in ((out.detach(), expected[0]), (grads[0], expected[2]), (grads[1], expected[3])):
        require_as_near(got, want.bfloat16(), want, factor=1.2)
        assert not got.isnan().any()
    require_as_near(grads[2], expected[4].bfloat16(), expected[4], factor=1.2, floor=2**-9)


def test_repeated_calls_are_bit_identical():
    inputs = make(20000, 32, 64)
    results = []
    for _ in range(3):
        out, loss = gate_and_align(*inputs, main="sparse")
        results.append(
            (out, loss, *torch.autograd.grad((out, loss), inputs, (torch.ones_like(out), torch.ones_like(loss))))
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_more_than_2_to_the_31_elements():
    """Addresses are 64-bit: the last rows of a tensor of 2^31 + 2^20 elements are correct."""
    tokens = (2**31 + 2**20) // (32 * 64)
    inputs = [
        torch.empty(tokens, 32, 64, device="cuda", dtype=torch.bfloat16).normal_().requires_grad_() for _ in range(2)
    ]
    inputs.append(torch.randn(tokens, 32, device="cuda", dtype=torch.bfloat16).requires_grad_())
    out, loss = gate_and_align(*inputs, main="full")
    grad_out = torch.ones_like(out)
    grads = torch.autograd.grad((out, loss), inputs, (grad_out, torch.ones_like(loss)))
    tail = [x.detach()[-100:] for x in inputs]
    expected = oracle.gate_and_align(*tail, "full", (1.0, 1.0), grad_out[-100:].double(), 100 / tokens)
    for got, want in ((out[-100:], expected[0]), (grads[0][-100:], expected[2]), (grads[2][-100:], expected[4])):
        require_as_near(got, want.bfloat16(), want, factor=1.5)


def test_calls_neither_wait_nor_recompile():
    """Any number of tokens and either stream use the same two compiled kernels, and the host never waits for the device."""
    from ssa_kernels.gate_and_align.triton import gate_backward_kernel, gate_forward_kernel

    def call(tokens):
        inputs = make(tokens, 4, 64)
        main = torch.randint(2, (1,), device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            out, loss = gate_and_align(*inputs, main=main)
            torch.autograd.grad((out.sum(), loss), inputs, (torch.ones_like(loss), torch.ones_like(loss)))
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def compiled():
        return [len(kernel.device_caches[0][0]) for kernel in (gate_forward_kernel, gate_backward_kernel)]

    call(64)
    before = compiled()
    for tokens in (1, 16, 63, 100, 1024, 4097):
        call(tokens)
    assert compiled() == before


def test_replayed_cuda_graph_uses_the_drawn_stream():
    full, sparse, logits = (x.detach() for x in make(500, 4, 64))
    main = torch.ones(1, dtype=torch.int32, device="cuda")
    gate_and_align(full, sparse, logits, main=main)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = gate_and_align(full, sparse, logits, main=main)
    for drawn, name in ((0, "sparse"), (1, "full"), (0, "sparse")):
        main.fill_(drawn)
        graph.replay()
        assert torch.equal(out, gate_and_align(full, sparse, logits, main=name)[0])
