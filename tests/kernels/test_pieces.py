"""Full attention of spans of queries in equal rows, as pieces of dense attention, without cuDNN: the dense calls run in float64."""

import pytest
import torch

from ssa_kernels import build_layout, full_attention, query_spans
from ssa_kernels.full_attention import pieces as module
from ssa_kernels.full_attention.fused import fused_backward, fused_forward, plan_fused
from ssa_kernels.full_attention.pieces import Piece, pieces_of
from ssa_pretrain.parallel.context import chunk_spans

TOKENS, HEADS, KV_HEADS, HEAD_DIM = 64, 4, 2, 8


@pytest.fixture
def dense(monkeypatch):
    """Replaces cuDNN's two operators by float64 mathematics, and lets pieces be short. Returns the (rows, queries, causal) of their calls."""

    def scores(q, k, causal, scale):
        logits = scale * torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(HEADS // KV_HEADS, 2))
        return logits.masked_fill(torch.ones_like(logits[0, 0]).triu(1).bool(), -torch.inf) if causal else logits

    def forward(q, k, v, *, causal, scale):
        logits = scores(q, k, causal, scale)
        o = torch.einsum("bhts,bshd->bthd", logits.softmax(-1), v.repeat_interleave(HEADS // KV_HEADS, 2))
        return o, logits.logsumexp(-1), torch.zeros(()), torch.zeros(())

    def backward(grad_o, q, o, k, v, lse_BHT, states, *, causal, scale):
        p = (scores(q, k, causal, scale) - lse_BHT[..., None]).exp()
        by_key = lambda x: x.unflatten(2, (KV_HEADS, -1)).sum(3)  # noqa: E731
        wide = [x.repeat_interleave(HEADS // KV_HEADS, 2) for x in (k, v)]
        dp = torch.einsum("bthd,bshd->bhts", grad_o, wide[1])
        ds = scale * p * (dp - (grad_o * o).sum(-1).transpose(1, 2)[..., None])
        dq = torch.einsum("bhts,bshd->bthd", ds, wide[0])
        dk, dv = (by_key(torch.einsum("bhts,bthd->bshd", *pair)) for pair in ((ds, q), (p, grad_o)))
        return dq, dk, dv

    calls = {"forward": [], "backward": []}

    def counted(name, act):
        def call(*args, causal, scale):
            calls[name].append((*args[0].shape[:2], causal))
            return act(*args, causal=causal, scale=scale)

        return call

    monkeypatch.setattr(module, "dense_forward", counted("forward", forward))
    monkeypatch.setattr(module, "dense_backward", counted("backward", backward))
    monkeypatch.setattr(module, "SHORTEST", 1)
    return calls


def spans_of(cp, rank, rows):
    ends = torch.arange(0, TOKENS + 1, TOKENS // rows)
    layout = build_layout(ends, num_tokens=TOKENS, block_size=4, max_length=TOKENS // rows)
    return layout, query_spans(layout, chunk_spans(TOKENS, cp, rank))


def attend(mine, rows, grad, q, k, v):
    """Returns (o, lse, dq, dk, dv) of the queries of spans, as the choice of the kernel calls the pieces."""
    # The plan is made for bf16, which fused kernels take; the mathematics runs in float64.
    plan, ends = plan_fused(q.bfloat16(), k.bfloat16(), mine, num_rows=rows, backend=None, scale=HEAD_DIM**-0.5)
    assert plan.backend == "cudnn" and not plan.spans
    o, lse, *states = fused_forward(q, k, v, ends, plan)
    return o, lse[0], *fused_backward(grad, q, k, v, o, lse, tuple(states), ends, plan)


def inputs():
    """Returns (q, k, v, gradient of the output) of TOKENS tokens."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(TOKENS, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("cp", [2, 4])
def test_pieces_equal_the_whole_rows(dense, cp, rows):
    """Outputs, log-sum-exps and gradients of all ranks, as the choice of the kernel calls them, against one call with all queries."""
    q, k, v, grad = inputs()
    layout, _ = spans_of(cp, 0, rows)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    whole, whole_lse = full_attention(*leaves, cu_seqlens=layout, return_lse=True)
    wanted = torch.autograd.grad(whole, leaves, grad)
    sums = [torch.zeros_like(k), torch.zeros_like(v)]
    for rank in range(cp):
        _, mine = spans_of(cp, rank, rows)
        places = torch.cat([torch.arange(span.first, span.end) for span in mine.spans])
        o, lse, dq, dk, dv = attend(mine, rows, grad[places], q[places], k, v)
        torch.testing.assert_close(o, whole[places], rtol=1e-6, atol=1e-6)  # merged in float32
        torch.testing.assert_close(lse.double(), whole_lse[places], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(dq, wanted[0][places], rtol=1e-5, atol=1e-6)
        sums = [total + part for total, part in zip(sums, (dk, dv), strict=True)]
    torch.testing.assert_close(sums, list(wanted[1:]), rtol=1e-5, atol=2e-6)


def test_triangles_of_one_length_are_one_call(dense):
    """Spans as a sample of the queries has them: two of a length in each row; then one of each of two others."""
    q, k, v, grad = inputs()
    spans = [(4, 4), (12, 4), (16, 4), (28, 4), (36, 8), (52, 10)]
    mine = query_spans(spans_of(2, 0, 4)[0], spans)
    places = torch.cat([torch.arange(span.first, span.end) for span in mine.spans])
    outside = torch.ones(TOKENS, dtype=torch.bool).index_fill(0, places, False)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    whole, whole_lse = full_attention(*leaves, cu_seqlens=spans_of(2, 0, 4)[0], return_lse=True)
    wanted = torch.autograd.grad(whole, leaves, grad.masked_fill(outside[:, None, None], 0.0))
    o, lse, *grads = attend(mine, 4, grad[places], q[places], k, v)
    found = [x.double() for x in grads]  # those of keys are summed in float32
    torch.testing.assert_close(o, whole[places], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse.double(), whole_lse[places], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, [wanted[0][places], *wanted[1:]], rtol=1e-5, atol=2e-6)
    triangles = [(4, 4, True), (1, 8, True), (1, 10, True)]
    rectangles = [(1, 4, False)] * 3 + [(1, 8, False), (1, 10, False)]  # the third span begins a row
    assert sorted(dense["forward"]) == sorted(dense["backward"]) == sorted(triangles + rectangles)


def test_pieces_of_two_ranks():
    """Rank 0 has the first and the last quarter, rank 1 the middle: equal work, and one rectangle and one triangle or two."""
    assert pieces_of(spans_of(2, 0, 1)[1].spans, TOKENS, 1) == ()  # 16 queries are too few for cuDNN
    found = [scaled(2, rank, 1) for rank in (0, 1)]
    assert found[0] == (Piece(0, 1, 128, 0, 0), Piece(128, 1, 128, 0, 384))
    assert found[1] == (Piece(0, 1, 256, 0, 128),)
    work = [sum(p.length * p.before + p.length * p.length / 2 for p in pieces) for pieces in found]
    assert work[0] == work[1]
    assert scaled(2, 0, 2) == (Piece(0, 1, 128, 0, 0), Piece(128, 1, 128, 256, 128))
    assert scaled(2, 1, 2) == (Piece(0, 1, 128, 0, 128), Piece(128, 1, 128, 256, 0))


def test_whole_rows_are_one_piece():
    assert scaled(1, 0, 4) == (Piece(0, 4, 128, 0, 0),)


def scaled(cp, rank, rows):
    """Returns the pieces of 512 tokens."""
    ends = torch.arange(0, 513, 512 // rows)
    layout = build_layout(ends, num_tokens=512, block_size=16, max_length=512 // rows)
    return pieces_of(query_spans(layout, chunk_spans(512, cp, rank)).spans, 512, rows)


def test_deterministic_mode_and_packed_documents_take_other_kernels():
    layout, mine = spans_of(2, 0, 1)
    q, k = (torch.zeros(tokens, heads, 64, dtype=torch.bfloat16) for tokens, heads in ((32, 4), (64, 2)))
    plan = {"num_rows": None, "backend": None, "scale": 0.125}
    assert plan_fused(q, k, mine, **plan)[0].spans, "without num_rows"
    assert plan_fused(q, k, mine, **plan | {"num_rows": 1})[0].spans, "too short"
    with pytest.raises(ValueError, match="at least 128 queries"):
        plan_fused(q, k, mine, **plan | {"num_rows": 1, "backend": "cudnn"})
    assert layout.num_tokens == 64


@pytest.mark.parametrize("head_dim", [8, 24])
def test_merge_kernel_equals_one_softmax(head_dim):
    """In Triton's interpreter: outputs of two calls, whose log-sum-exps come by head, against one softmax over all keys."""
    from ssa_kernels.full_attention.merge_triton import merge

    generator = torch.Generator().manual_seed(1)
    logits = 30 * torch.randn(HEADS, 5, 12, dtype=torch.float64, generator=generator)
    v = torch.randn(HEADS, 12, head_dim, dtype=torch.float64, generator=generator)
    parts = [(logits[..., keys], v[:, keys]) for keys in (slice(0, 7), slice(7, 12))]
    outs = [(part.softmax(-1) @ values).transpose(0, 1).float().contiguous() for part, values in parts]
    lses = [part.logsumexp(-1).float() for part, _ in parts]
    out, lse = torch.empty(5, HEADS, head_dim), torch.empty(5, HEADS)
    merge(*outs, *lses, out, lse)
    torch.testing.assert_close(out, (logits.softmax(-1) @ v).transpose(0, 1).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, logits.logsumexp(-1).T.float(), rtol=1e-5, atol=1e-5)
