"""The work of each rank of a context-parallel group, run in turn on one GPU, against all queries in one call."""

import pytest
import torch

from ssa_kernels import build_layout, full_attention, query_spans, select_blocks, sparse_attention, ssa_attention
from support.errors import relative, require_as_near, require_means_as_near
from support.exact_layer import exact_layer

pytestmark = pytest.mark.gpu

TOKENS, CHUNK = 2048, 256
RANKS = [[(r * CHUNK, CHUNK), ((7 - r) * CHUNK, CHUNK)] for r in range(3)] + [[(3 * CHUNK, 2 * CHUNK)]]
DOCUMENTS = {
    "one": [0, TOKENS],
    "two": [0, TOKENS // 2, TOKENS],
    "ragged": [0, 1, 2, 250, 256, 257, 700, 700, 1024, 1535, 1537, 1900],
    "single_tokens": [0, *range(200, 1900), TOKENS],
}
ROWS = {"one": 1, "two": 2}  # equal rows, for the kernels that need to know
SELECTION = {"block_size": 16, "top_k": 8}


def make(heads=16, kv_heads=2, head_dim=64):
    sizes = ((TOKENS, heads, head_dim), (TOKENS, kv_heads, head_dim), (TOKENS, kv_heads, head_dim), (TOKENS, heads))
    return [torch.randn(size, device="cuda", dtype=torch.bfloat16).requires_grad_() for size in sizes]


def layout_of(documents):
    ends = torch.tensor(DOCUMENTS[documents], device="cuda", dtype=torch.int32)
    return build_layout(ends, num_tokens=TOKENS, block_size=16, max_length=TOKENS)


def take(x, spans):
    return torch.cat([x[first : first + length] for first, length in spans])


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("score", ["softmax_sum", "per_head"])
def test_blocks_and_sparse_stream_bit_for_bit(documents, score):
    """A query's blocks and output do not depend on the other queries of the call."""
    q, k, v, _ = (x.detach() for x in make())
    layout = layout_of(documents)
    indices = select_blocks(q, k, cu_seqlens=layout, score=score, **SELECTION)
    o, lse = sparse_attention(q, k, v, indices, block_size=16, cu_seqlens=layout)
    for spans in RANKS:
        part, mine = query_spans(layout, spans), take(q, spans)
        found = select_blocks(mine, k, cu_seqlens=part, score=score, **SELECTION)
        assert torch.equal(found, take(indices, spans))
        o_part, lse_part = sparse_attention(mine, k, v, found, block_size=16, cu_seqlens=part)
        assert torch.equal(o_part, take(o, spans)) and torch.equal(lse_part, take(lse, spans))


@pytest.mark.parametrize(
    ("documents", "num_rows"), [(name, None) for name in DOCUMENTS] + list(ROWS.items()), ids=lambda x: str(x)
)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(16, 2, 64), (8, 2, 128), (6, 1, 96)])
def test_full_stream_against_float64(documents, num_rows, heads, kv_heads, head_dim):
    """As close to float64 as one call with all queries, except for one more rounding of the keys' sums."""
    q, k, v, _ = make(heads, kv_heads, head_dim)
    layout, grad = layout_of(documents), torch.randn_like(q)
    exact_in = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact, exact_lse = full_attention(*exact_in, cu_seqlens=layout, impl="reference", return_lse=True)
    wanted = torch.autograd.grad(exact, exact_in, grad.double())
    whole, _ = full_attention(q, k, v, cu_seqlens=layout, backend="flash")
    whole_grads = torch.autograd.grad(whole, (q, k, v), grad)
    sums = [torch.zeros_like(x, dtype=torch.float32) for x in (k, v)]
    for spans in RANKS:
        mine = take(q, spans).detach().requires_grad_()
        part = query_spans(layout, spans)
        o, lse = full_attention(mine, k, v, cu_seqlens=part, return_lse=True, num_rows=num_rows)
        # bf16's own rounding is 2^-9 at most, 2^-10 in the mean.
        assert relative(o, take(exact, spans)) < 1.1 * relative(whole, exact) + 2**-10
        torch.testing.assert_close(lse.double(), take(exact_lse, spans), rtol=0, atol=1e-4)
        dq, dk, dv = torch.autograd.grad(o, (mine, k, v), take(grad, spans))
        if documents != "single_tokens":  # there nearly all of dq is exactly 0, so what is computed for it is rounding
            assert relative(dq, take(wanted[0], spans)) < 1.5 * relative(whole_grads[0], wanted[0])
        sums = [total + part.float() for total, part in zip(sums, (dk, dv), strict=True)]
    for got, whole_grad, want in zip(sums, whole_grads[1:], wanted[1:], strict=True):
        require_as_near(got, whole_grad, want, factor=1.5, floor=2**-9)


@pytest.mark.parametrize("documents", ["ragged", "two"])
@pytest.mark.parametrize("main", ["full", "sparse"])
def test_layer_with_its_gradients(main, documents):
    inputs, layout, num_rows = make(), layout_of(documents), ROWS.get(documents)
    upstream = torch.randn_like(inputs[0])
    common = {"main": main, **SELECTION}
    out, loss, mass = ssa_attention(*inputs, cu_seqlens=layout, **common)
    wanted = torch.autograd.grad((out, loss), inputs, (upstream, torch.tensor(1e4, device="cuda")))
    leaves, exact_out, exact_loss, exact_mass = exact_layer(*inputs, layout=layout, top_k=SELECTION["top_k"], main=main)
    exact = torch.autograd.grad(
        (exact_out, exact_loss), leaves, (upstream.double(), torch.tensor(1e4, device="cuda", dtype=torch.float64))
    )
    losses, masses, sums, pieces = [], [], [torch.zeros_like(x, dtype=torch.float32) for x in inputs[1:3]], []
    for spans in RANKS:
        mine = [inputs[0], *inputs[1:3], inputs[3]]
        leaves = [take(x, spans).detach().requires_grad_() if i in (0, 3) else x for i, x in enumerate(mine)]
        found = ssa_attention(*leaves, cu_seqlens=query_spans(layout, spans), num_rows=num_rows, **common)
        require_as_near(found.out, take(out, spans), take(exact_out, spans), factor=1.5)
        losses.append(found.alignment_loss)
        masses.append(found.captured_mass)
        grads = torch.autograd.grad(
            found[:2], leaves, (take(upstream, spans), torch.tensor(1e4 / len(RANKS), device="cuda"))
        )
        pieces.append((spans, grads[0], grads[3]))
        sums = [total + grad.float() for total, grad in zip(sums, grads[1:3], strict=True)]
    means = [
        torch.stack([x.detach() for x in pair])
        for pair in ((torch.stack(losses).mean(), torch.stack(masses).mean()), (loss, mass))
    ]
    require_means_as_near(*means, torch.stack([exact_loss.detach(), exact_mass.detach().to(exact_loss.dtype)]))
    for spans, dq, dgate in pieces:
        for got, number in ((dq, 0), (dgate, 3)):
            require_as_near(got, take(wanted[number], spans), take(exact[number], spans), factor=1.5)
    for got, want, right in zip(sums, wanted[1:3], exact[1:3], strict=True):
        require_as_near(got, want, right, factor=1.5)


@pytest.mark.parametrize("documents", ["ragged", "two"])
def test_host_never_waits_for_the_device(documents):
    inputs, layout = make(), layout_of(documents)
    part, spans = query_spans(layout, RANKS[0]), RANKS[0]
    leaves = [take(x, spans).detach().requires_grad_() if i in (0, 3) else x for i, x in enumerate(inputs)]
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            query_spans(layout, spans)
            found = ssa_attention(*leaves, cu_seqlens=part, main="full", num_rows=ROWS.get(documents), **SELECTION)
            torch.autograd.backward(found[:2], (torch.ones_like(found[0]), torch.ones_like(found[1])))
        finally:
            torch.cuda.set_sync_debug_mode("default")
