"""One whole layer against the oracle, assembled from its parts: output, loss, captured mass, every gradient."""

import pytest
import torch

from ssa_kernels import build_layout, full_attention, select_blocks, ssa_attention
from ssa_kernels.ssa_attention.api import Selection, composed, covered
from support import oracle


def interpreting():
    try:
        import triton
    except ImportError:
        return False
    return triton.knobs.runtime.interpret


ENDS = torch.tensor([0, 19, 20, 45])


def make(dim=8):
    generator = torch.Generator().manual_seed(11)
    sizes = ((45, 4, dim), (45, 2, dim), (45, 2, dim), (45, 4))
    return [(2 * torch.randn(size, generator=generator, dtype=torch.float64)).requires_grad_() for size in sizes]


@pytest.mark.parametrize("main", ["full", "sparse", 1, 0])
def test_layer_equals_the_oracle(main):
    q, k, v, logits = inputs = make()
    given = main if isinstance(main, str) else torch.tensor(main)
    result = ssa_attention(*inputs, block_size=4, top_k=3, cu_seqlens=ENDS, main=given, weights=(0.7, 1.3), scale=0.4)
    grad_out = torch.randn(result.out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad((result.out * grad_out).sum() + 900.0 * result.alignment_loss, inputs)

    indices = oracle.select(q.detach(), k.detach(), ENDS, 4, 3, 0.4)
    o_full, lse_full = oracle.attention(q, k, v, oracle.visible(None, ENDS, 45, 4, 4), 0.4)
    o_sparse, lse_sparse = oracle.attention(q, k, v, oracle.visible(indices, ENDS, 45, 4, 4), 0.4)
    name = main if isinstance(main, str) else ("full" if main else "sparse")
    streams = (o_full.detach(), o_sparse.detach())
    out, loss, do_full, do_sparse, dz = oracle.gate_and_align(
        *streams, logits.detach(), name, (0.7, 1.3), grad_out, 900.0
    )
    want = torch.autograd.grad((o_full, o_sparse), (q, k, v), (do_full, do_sparse))
    torch.testing.assert_close(result.out, out)
    torch.testing.assert_close(result.alignment_loss.double(), loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        result.captured_mass.double(), torch.exp(lse_sparse - lse_full).mean(), rtol=1e-6, atol=0
    )
    for got, expected in zip(grads, (*want, dz), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_streams_are_equal_where_blocks_cover_every_document():
    inputs = make()
    layout = build_layout(ENDS, num_tokens=45, block_size=4, max_length=25)
    common = {"layout": layout, "main": "sparse", "scale": 0.4, "num_rows": None, "impl": None}
    one = covered(*inputs, **common)
    both = composed(*inputs, selection=Selection(4, 7, "softmax_sum"), weights=(1.0, 1.0), **common)
    for got, want in zip(one, both, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-12)
    grad = torch.randn(one.out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    sums = ((result.out * grad).sum() + result.alignment_loss for result in (one, both))
    for got, want in zip(*(torch.autograd.grad(x, inputs) for x in sums), strict=True):
        torch.testing.assert_close(got, want)


def test_select_replaces_select_blocks():
    """The sparse stream uses the blocks that `select` returns. Invalid blocks are refused."""
    inputs = make()
    common = {"block_size": 4, "cu_seqlens": ENDS, "main": "sparse"}

    def newest(q, k, layout):
        return select_blocks(q, k, block_size=4, top_k=1, cu_seqlens=layout)

    chosen = ssa_attention(*inputs, top_k=3, select=newest, **common)
    for got, want in zip(chosen, ssa_attention(*inputs, top_k=1, **common), strict=True):
        assert torch.equal(got, want)
    assert not torch.equal(chosen.out, ssa_attention(*inputs, top_k=3, **common).out)
    with pytest.raises(ValueError, match="indices of query 0"):
        ssa_attention(*inputs, top_k=3, select=lambda *given: newest(*given) + 1, **common)


def test_output_without_a_gate_is_the_stream():
    q, k, v, _ = make()
    result = ssa_attention(q, k, v, None, block_size=4, top_k=3, cu_seqlens=ENDS, main="full")
    assert torch.equal(result.out, full_attention(q, k, v, cu_seqlens=ENDS)[0])


def test_unequal_rows_are_refused():
    q, k, v, _ = make()
    equal = torch.tensor([0, 15, 30, 45])
    assert torch.equal(
        full_attention(q, k, v, cu_seqlens=equal, num_rows=3)[0], full_attention(q, k, v, cu_seqlens=equal)[0]
    )
    with pytest.raises(ValueError, match="num_rows=3 must mean"):
        full_attention(q, k, v, cu_seqlens=ENDS, num_rows=3)
    with pytest.raises(ValueError, match="num_rows=2 must divide tokens=45"):
        full_attention(q, k, v, cu_seqlens=ENDS, num_rows=2)
    with pytest.raises(ValueError, match="with G dividing H"):
        full_attention(q[:, :3], k, v, cu_seqlens=ENDS)


@pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1 before Triton is imported")
@pytest.mark.parametrize("main", ["full", 0])
def test_layer_with_interpreted_kernels(main):
    """All the package's Triton kernels behind one call, in float32, against the references in float64."""
    inputs = make(dim=16)
    given = main if isinstance(main, str) else torch.tensor([main])
    common = {"block_size": 4, "top_k": 3, "cu_seqlens": ENDS, "main": given, "scale": 0.4}
    exact = ssa_attention(*inputs, impl="reference", **common)
    low = [x.detach().float().requires_grad_() for x in inputs]
    ours = ssa_attention(*low, impl="triton", **common)
    upstream = torch.randn(exact.out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    want = torch.autograd.grad((exact.out * upstream).sum() + 900.0 * exact.alignment_loss, inputs)
    got = torch.autograd.grad((ours.out * upstream.float()).sum() + 900.0 * ours.alignment_loss, low)
    # float32 sums of tens of terms of size 10: some 1e-6 relative to the largest.
    for a, b in zip((ours.out, ours.alignment_loss, ours.captured_mass, *got), (*exact, *want), strict=True):
        assert float((a.double() - b).abs().max()) < 1e-5 * float(b.abs().max())
