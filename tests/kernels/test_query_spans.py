"""Spans of queries over all keys, as a context-parallel rank computes them: the references, and the calls of the fused kernel.

`flash` stands for the library's kernel in plain torch and float64: packed documents with boundaries of their own for queries and keys, the
causal mask aligned at the bottom right, and keys without queries that get no gradient.
"""

from itertools import pairwise

import pytest
import torch

from ssa_kernels import (
    build_layout,
    captured_mass,
    full_attention,
    query_slice,
    query_spans,
    select_blocks,
    sparse_attention,
    ssa_attention,
)
from ssa_kernels.documents import layout_to
from ssa_kernels.full_attention import spans as span_calls
from ssa_kernels.full_attention import te
from ssa_kernels.full_attention.fused import FusedPlan, fused_backward, fused_forward, plan_fused

TOKENS, SCALE = 120, 8**-0.5
DOCUMENTS = {
    "one": [0, TOKENS],
    "ragged": [
        0,
        1,
        16,
        16,
        29,
        30,
        31,
        60,
        61,
        110,
    ],  # cuts at 30, 60 and 90: beside, at and inside documents; the rest is one more
    "single_tokens": list(range(TOKENS + 1)),
}
# Two ranks and four, and one whose two chunks touch.
RANKS = {
    "2": [[(0, 30), (90, 30)], [(30, 60)]],
    "4": [[(0, 15), (105, 15)], [(15, 15), (90, 15)], [(30, 15), (75, 15)], [(45, 30)]],
}


def make(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(TOKENS, h, 8, generator=generator, dtype=torch.float64) for h in (4, 2, 2)]


def take(x, spans):
    return torch.cat([x[first : first + length] for first, length in spans])


def layout_of(documents):
    return build_layout(torch.tensor(DOCUMENTS[documents]), num_tokens=TOKENS, block_size=8)


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("ranks", RANKS)
def test_layout_of_spans_equals_that_of_its_queries(documents, ranks):
    layout = layout_of(documents)
    for spans in RANKS[ranks]:
        part, same = query_spans(layout, spans), query_slice(layout, take(torch.arange(TOKENS), spans))
        for name in ("query_start", "query_position", "query_first_block_row", "block_start", "cu_seqlens"):
            assert torch.equal(getattr(part, name), getattr(same, name)), name
        assert [(span.first, span.length) for span in part.spans] == spans and not same.spans
        piece = query_slice(part, slice(0, 3))
        assert not piece.spans, "a slice of a layout by spans has no spans"
        assert piece.scattered == (len(spans) > 1), "and may reach from one into the next"
        for span in part.spans:
            assert span.cu_seqlens_q[-1] == span.length and span.cu_seqlens_k[-1] == span.end
            for name in ("cu_seqlens_q", "cu_seqlens_k"):
                array = getattr(span, name)
                assert array.dtype == torch.int32 and array[0] == 0 and (array.diff() >= 0).all()
            keys_before = layout.query_start[span.first : span.end]
            for query, start in enumerate(
                keys_before.tolist()
            ):  # each query's document, and its place counted from the end
                document = int(torch.searchsorted(span.cu_seqlens_q, query, right=True)) - 1
                assert span.cu_seqlens_k[document] == start
                from_end = int(span.cu_seqlens_q[document + 1]) - query
                assert int(span.cu_seqlens_k[document + 1]) - from_end == span.first + query
    moved = layout_to(query_spans(layout, RANKS["2"][0]), "meta")
    assert all(span.cu_seqlens_q.is_meta and span.cu_seqlens_k.is_meta for span in moved.spans)


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("score", ["softmax_sum", "per_head"])
def test_references_of_all_ranks_equal_the_unsplit_result(documents, ranks, score):
    """Chosen blocks are equal. Outputs, log-sum-exps and gradients agree to float64's rounding. Keys' gradients are sums over the ranks."""
    layout = layout_of(documents)
    q, k, v = (x.requires_grad_() for x in make())
    grads = torch.randn(2, TOKENS, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def streams(q, spans, layout):
        indices = select_blocks(q, k, block_size=8, top_k=3, cu_seqlens=layout, score=score)
        full, lse_full = full_attention(q, k, v, cu_seqlens=layout, return_lse=True)
        sparse, lse_sparse = sparse_attention(q, k, v, indices, block_size=8, cu_seqlens=layout)
        loss = (full * take(grads[0], spans)).sum() + (sparse * take(grads[1], spans)).sum()
        found = torch.autograd.grad(loss, (q, k, v))
        return (indices, full, lse_full, sparse, lse_sparse, captured_mass(lse_full, lse_sparse)), found

    wanted, (dq, dk, dv) = streams(q, [(0, TOKENS)], layout)
    sums = [torch.zeros_like(k), torch.zeros_like(v)]
    for spans in RANKS[ranks]:
        mine = take(q, spans).detach().requires_grad_()
        found, (dq_part, *key_parts) = streams(mine, spans, query_spans(layout, spans))
        assert torch.equal(found[0], take(wanted[0], spans))
        for ours, theirs in zip(found[1:], wanted[1:], strict=True):
            torch.testing.assert_close(ours, take(theirs, spans), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(dq_part, take(dq, spans), rtol=1e-12, atol=1e-12)
        sums = [a + b for a, b in zip(sums, key_parts, strict=True)]
    torch.testing.assert_close(sums, [dk, dv], rtol=1e-12, atol=1e-12)


def test_layer_means_over_ranks_equal_means_over_all_tokens():
    layout = layout_of("ragged")
    q, k, v = make()
    gate = torch.randn(TOKENS, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    arguments = {"block_size": 8, "top_k": 2, "main": "sparse"}
    out, loss, mass = ssa_attention(q, k, v, gate, cu_seqlens=layout, **arguments)
    parts = [
        ssa_attention(take(q, spans), k, v, take(gate, spans), cu_seqlens=query_spans(layout, spans), **arguments)
        for spans in RANKS["4"]
    ]
    for spans, part in zip(RANKS["4"], parts, strict=True):
        torch.testing.assert_close(part.out, take(out, spans), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.stack([p.alignment_loss for p in parts]).mean(), loss, rtol=1e-12, atol=0)
    # The log-sum-exps' difference is exponentiated in float32.
    torch.testing.assert_close(torch.stack([p.captured_mass for p in parts]).mean(), mass, rtol=1e-6, atol=0)
    assert loss > 1e-3 and mass < 0.99


def flash(q, k, v, span, max_length, scale):
    """Returns (o, lse [H, queries]) of the library's forward, differentiable."""
    outs, lses = [], []
    for (q0, q1), (k0, k1) in zip(
        pairwise(span.cu_seqlens_q.tolist()), pairwise(span.cu_seqlens_k.tolist()), strict=True
    ):
        assert q1 - q0 <= min(span.length, max_length) and k1 - k0 <= min(span.end, max_length)
        if q0 == q1:
            continue
        rows, keys = q[q0:q1].transpose(0, 1), k[k0:k1].transpose(0, 1).repeat_interleave(2, 0)
        mask = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(k1 - k0 - (q1 - q0))
        logits = (rows @ keys.transpose(1, 2) * scale).masked_fill(~mask, -torch.inf)
        outs.append((logits.softmax(-1) @ v[k0:k1].transpose(0, 1).repeat_interleave(2, 0)).transpose(0, 1))
        lses.append(logits.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses, 1)


@pytest.fixture
def plain_flash(monkeypatch):
    """Replaces the library's kernel by `flash`."""

    def forward(q, k, v, span, max_length, scale):
        o, lse = flash(q, k, v, span, max_length, scale)
        return o.detach(), lse.detach(), torch.zeros(2), torch.zeros(())

    def backward(grad_o, q, k, v, o, lse, states, span, max_length, scale):
        assert lse.is_contiguous() and len(states) == 2
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        again, lse_again = flash(q, k, v, span, max_length, scale)
        assert torch.equal(again, o) and torch.equal(lse_again, lse), "the backward must get what the forward gave"
        return torch.autograd.grad(again, (q, k, v), grad_o)

    monkeypatch.setattr(span_calls, "flash_forward", forward)
    monkeypatch.setattr(span_calls, "flash_backward", backward)


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.usefixtures("plain_flash")
def test_fused_calls_of_a_rank_equal_the_reference(documents, ranks):
    layout = layout_of(documents)
    q, k, v = make()
    grad = torch.randn(TOKENS, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for spans in RANKS[ranks]:
        part = query_spans(layout, spans)
        plan = FusedPlan("flash", 0, layout.max_length, SCALE, part.spans)
        leaves = [x.clone().requires_grad_() for x in (take(q, spans), k, v)]
        wanted, wanted_lse = full_attention(*leaves, cu_seqlens=part, return_lse=True)
        plain = [x.detach() for x in leaves]
        o, lse, *states = fused_forward(*plain, part.cu_seqlens, plan)
        torch.testing.assert_close(o, wanted, rtol=1e-13, atol=1e-13)
        assert lse.shape == (1, *wanted_lse.shape)
        torch.testing.assert_close(lse[0], wanted_lse, rtol=1e-13, atol=1e-13)
        found = fused_backward(take(grad, spans), *plain, o, lse, tuple(states), part.cu_seqlens, plan)
        gradients = torch.autograd.grad(wanted, leaves, take(grad, spans))
        torch.testing.assert_close(list(found), list(gradients), rtol=1e-12, atol=1e-12)


def test_shapes_of_the_library_operators():
    """Meta tensors run the operators' own shape rules."""
    layout = query_spans(layout_of("ragged"), RANKS["2"][0])
    q, k, v = (
        torch.empty(n, h, 64, device="meta", dtype=torch.bfloat16) for n, h in ((60, 4), (TOKENS, 2), (TOKENS, 2))
    )
    layout = layout_to(layout, "meta")
    plan, ends = plan_fused(q, k, layout, num_rows=None, backend=None, scale=SCALE)
    assert plan.backend == "flash"
    o, lse, *states = fused_forward(q, k, v, ends, plan)
    assert o.shape == q.shape and lse.shape == (1, 60, 4) and lse.dtype == torch.float32
    grads = fused_backward(o, q, k, v, o, lse, tuple(states), ends, plan)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


def test_bad_spans_are_refused():
    layout = layout_of("one")
    for spans in ([], [(0, 0)], [(30, 10), (0, 10)], [(0, 20), (10, 20)], [(100, 30)], [(-1, 5)]):
        with pytest.raises(ValueError, match="must be \\(first, length\\) of spans"):
            query_spans(layout, spans)
    part = query_spans(layout, [(0, 30), (90, 30)])
    with pytest.raises(ValueError, match="must have all 120"):
        query_spans(part, [(0, 10)])
    q, k = (torch.empty(n, 2, 64, dtype=torch.bfloat16) for n in (60, TOKENS))
    with pytest.raises(ValueError, match="the layout's spans 60; pass"):
        plan_fused(q[:50], k, part, num_rows=None, backend=None, scale=SCALE)
    # Of one row, 30 queries are too few.
    for num_rows, message in ((None, "needs num_rows"), (1, "at least 128 queries and keys of each row")):
        with pytest.raises(ValueError, match=message):
            plan_fused(q, k, part, num_rows=num_rows, backend="cudnn", scale=SCALE)
    if not te.is_usable():
        with pytest.raises(ValueError, match="needs transformer_engine"):
            plan_fused(q, k, part, num_rows=None, backend="te", scale=SCALE)
    with pytest.raises(ValueError, match="or a layout by query_spans"):
        plan_fused(q, k, query_slice(layout, slice(0, 60)), num_rows=None, backend="flash", scale=SCALE)
