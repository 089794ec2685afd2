"""One stream of a sample of queries on a GPU: full attention in one batch of segments, and the layer against float64 and its parts."""

import pytest
import torch

from ssa_kernels import build_layout, full_attention, sample_queries, select_blocks, ssa_attention
from ssa_kernels.full_attention import te
from ssa_kernels.full_attention.fused import WIDEST_CUDNN_HEAD
from ssa_kernels.ssa_attention.api import Selection, composed
from support.errors import relative, require_as_near, require_means_as_near

pytestmark = pytest.mark.gpu

TOKENS = 2048
DOCUMENTS = {
    "rows": [0, 1024, 2048],
    "ragged": [0, 1, 2, 250, 256, 257, 700, 700, 1024, 1535, 1537, 1900],
    "single_tokens": [0, *range(200, 1900), TOKENS],
}
SAMPLES = {
    "aligned": [(128, 128), (768, 256), (1664, 128)],
    "any": [(3, 20), (250, 7), (300, 411), (1023, 2), (1500, 548)],
}
SELECTION = {"block_size": 16, "top_k": 8}
SHAPES = [(16, 2, 64), (8, 2, 128), (6, 1, 96), (16, 2, 256)]


def make(heads=16, kv_heads=2, head_dim=64):
    sizes = ((TOKENS, heads, head_dim), (TOKENS, kv_heads, head_dim), (TOKENS, kv_heads, head_dim), (TOKENS, heads))
    return [torch.randn(size, device="cuda", dtype=torch.bfloat16).requires_grad_() for size in sizes]


def layout_of(documents, max_length=TOKENS):
    ends = torch.tensor(DOCUMENTS[documents], device="cuda", dtype=torch.int32)
    return build_layout(ends, num_tokens=TOKENS, block_size=16, max_length=max_length)


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_full_stream_of_a_sample(documents, sample, shape):
    """Each backend is as close to float64 as FlashAttention with all queries, except for one rounding of the keys' sums."""
    q, k, v, _ = make(*shape)
    layout = layout_of(documents)
    picked = sample_queries(layout, SAMPLES[sample])
    grad = torch.randn_like(picked.take(q))
    exact_in = [
        picked.take(q).detach().double().requires_grad_(),
        *(x.detach().double().requires_grad_() for x in (k, v)),
    ]
    exact, exact_lse = full_attention(*exact_in, cu_seqlens=picked.layout, impl="reference", return_lse=True)
    wanted = torch.autograd.grad(exact, exact_in, grad.double())
    whole, _ = full_attention(q, k, v, cu_seqlens=layout, backend="flash")
    everywhere = torch.zeros_like(q)
    picked.add(everywhere, grad)
    whole_grads = list(torch.autograd.grad(whole, (q, k, v), everywhere))
    whole, whole_grads[0] = picked.take(whole), picked.take(whole_grads[0])
    for backend in ("flash", "te") if te.is_usable() and shape[2] <= WIDEST_CUDNN_HEAD else ("flash",):
        mine = picked.take(q).detach().requires_grad_()
        o, lse = full_attention(mine, k, v, cu_seqlens=picked.layout, return_lse=True, backend=backend)
        assert relative(o, exact) < 1.1 * relative(whole, exact) + 2**-10, backend
        torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-4)
        dq, dk, dv = torch.autograd.grad(o, (mine, k, v), grad)
        if documents != "single_tokens":  # there nearly all of dq is exactly 0, so what is computed for it is rounding
            assert relative(dq, wanted[0]) < 1.5 * relative(whole_grads[0], wanted[0]), backend
        for name, got, whole_grad, want in zip(("dk", "dv"), (dk, dv), whole_grads[1:], wanted[1:], strict=True):
            require_as_near(got, whole_grad, want, factor=1.5, floor=2**-9, name=f"{name} of {backend}")


@pytest.mark.parametrize("documents", ["rows", "ragged"])
@pytest.mark.parametrize("sample", SAMPLES)
def test_blocks_of_a_sample_are_those_of_its_queries(documents, sample):
    q, k, _, _ = (x.detach() for x in make())
    layout = layout_of(documents)
    picked = sample_queries(layout, SAMPLES[sample])
    all_blocks = select_blocks(q, k, cu_seqlens=layout, **SELECTION)
    assert torch.equal(select_blocks(picked.take(q), k, cu_seqlens=picked.layout, **SELECTION), picked.take(all_blocks))


@pytest.mark.parametrize("documents", ["rows", "ragged"])
@pytest.mark.parametrize("main", ["full", "sparse"])
@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_layer_with_its_gradients(documents, main, sample, shape):
    """As close to float64 as the same layer by the public operators, which differentiate each slice alone."""
    inputs, layout = make(*shape), layout_of(documents)
    picked = sample_queries(layout, SAMPLES[sample])
    upstream, weight = torch.randn_like(inputs[0]), torch.tensor(3e3, device="cuda")
    options = {"layout": layout, "sample": picked, "main": main, "weights": (0.7, 1.3), "scale": shape[2] ** -0.5}

    def blocks(q, k, of):  # float64 takes the blocks that bf16 chooses
        return select_blocks(q.bfloat16(), k.bfloat16(), cu_seqlens=of, **SELECTION)

    def run(found, leaves):
        gradients = torch.autograd.grad(found[:2], leaves, (upstream.to(found.out.dtype), weight))
        return (
            found.out,
            *gradients,
            torch.stack([found.alignment_loss.double(), found.captured_mass.double()]).detach(),
        )

    exact_leaves = [x.detach().double().requires_grad_() for x in inputs]
    selection = Selection(16, 8, "softmax_sum", blocks)
    *exact, exact_means = run(
        composed(*exact_leaves, selection=selection, num_rows=None, impl="reference", **options), exact_leaves
    )
    *parts, part_means = run(composed(*inputs, selection=selection, num_rows=None, impl=None, **options), inputs)
    common = {"cu_seqlens": layout, "sample": picked, "main": main, "weights": (0.7, 1.3), **SELECTION}
    rows = 2 if documents == "rows" else None
    *found, means = run(ssa_attention(*inputs, num_rows=rows, **common), inputs)
    for name, got, part, want in zip(("out", "dq", "dk", "dv", "dlogits"), found, parts, exact, strict=True):
        require_as_near(got, part, want, factor=1.1, name=name)
    require_means_as_near(means, part_means, exact_means)


def test_host_never_waits_for_the_device():
    inputs, layout = make(), layout_of("ragged")
    for main in ("full", "sparse"):
        for mode in ("default", "error"):
            torch.cuda.set_sync_debug_mode(mode)
            try:
                picked = sample_queries(layout, SAMPLES["any"])
                found = ssa_attention(*inputs, cu_seqlens=layout, sample=picked, main=main, **SELECTION)
                torch.autograd.backward(found[:2], (torch.ones_like(found[0]), torch.ones_like(found[1])))
            finally:
                torch.cuda.set_sync_debug_mode("default")
