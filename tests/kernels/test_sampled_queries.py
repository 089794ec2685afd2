"""A sample of queries: its layout, its segments as the library's kernel takes them, and the layer that computes one stream for it."""

import sys
import types

import pytest
import torch

from ssa_kernels import build_layout, gate, gate_and_align, query_slice, query_spans, sample_queries, ssa_attention
from ssa_kernels.documents import layout_to
from ssa_kernels.full_attention import fused, te

TOKENS, SCALE = 120, 8**-0.5
DOCUMENTS = {
    "one": [0, TOKENS],
    "ragged": [0, 1, 16, 16, 29, 30, 31, 60, 61, 110],
    "single_tokens": list(range(TOKENS + 1)),
}
SLICES = {"all": [(0, TOKENS)], "some": [(3, 20), (29, 1), (40, 30), (100, 20)], "one": [(61, 49)]}


def make(heads=(4, 2, 2), dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(TOKENS, h, dim, generator=generator, dtype=torch.float64).requires_grad_() for h in heads]


def layout_of(documents, max_length=None):
    ends = torch.tensor(DOCUMENTS[documents])
    return build_layout(ends, num_tokens=TOKENS, block_size=8, max_length=max_length)


def queries_of(slices):
    return torch.cat([torch.arange(first, first + length) for first, length in slices])


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("slices", SLICES)
def test_layout_of_a_sample_is_that_of_its_queries(documents, slices):
    layout = layout_of(documents)
    sample, same = sample_queries(layout, SLICES[slices]), query_slice(layout, queries_of(SLICES[slices]))
    for name in ("query_start", "query_position", "query_first_block_row"):
        assert torch.equal(getattr(sample.layout, name), getattr(same, name)), name
    x = torch.randn(TOKENS, 3)
    assert torch.equal(sample.take(x), x[queries_of(SLICES[slices])])
    part = torch.randn(sample.layout.num_queries, 3)
    added, rows = x.clone(), queries_of(SLICES[slices])
    sample.add(added, part)
    assert torch.equal(added, x.index_add(0, rows, part))
    assert torch.equal(sample.places[rows], torch.arange(len(rows), dtype=torch.int32))
    assert (sample.places >= 0).sum() == len(rows)
    assert layout_to(sample.layout, "meta").segments.first_key.is_meta


def test_sample_of_spans_is_split_at_their_borders():
    spans = query_spans(layout_of("ragged"), [(10, 30), (80, 30)])
    sample = sample_queries(spans, [(5, 10), (25, 20)])
    assert sample.slices == ((5, 10), (25, 5), (30, 15)) and sample.num_queries == 60
    assert [(span.first, span.length) for span in sample.layout.spans] == [(15, 10), (35, 5), (80, 15)]


def test_samples_that_do_not_fit_are_refused():
    layout, inputs = layout_of("one"), (*make(), torch.zeros(TOKENS, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="ascend within 120 queries"):
        sample_queries(layout, [(110, 20)])
    with pytest.raises(ValueError, match="must have all 120 or be one by query_spans"):
        sample_queries(query_slice(layout, slice(0, 10)), [(0, 5)])
    common = {"block_size": 8, "top_k": 2, "cu_seqlens": layout}
    with pytest.raises(ValueError, match="must be None or a SampledQueries"):
        ssa_attention(*inputs, main="full", sample=[(0, 5)], **common)
    with pytest.raises(ValueError, match="must be 'full' or 'sparse' with a sample"):
        ssa_attention(*inputs, main=torch.tensor(1), sample=sample_queries(layout, [(0, 5)]), **common)
    other = sample_queries(query_spans(layout, [(0, 60)]), [(0, 5)])
    with pytest.raises(ValueError, match="must be of the layout's"):
        ssa_attention(*inputs, main="full", sample=other, **common)


@pytest.mark.parametrize("main", ["full", "sparse"])
def test_a_sample_of_all_queries_is_the_whole_layer(main):
    inputs = (*make(), torch.randn(TOKENS, 4, dtype=torch.float64, requires_grad=True))
    layout = layout_of("ragged")
    common = {"block_size": 8, "top_k": 3, "cu_seqlens": layout, "main": main, "weights": (0.7, 1.3)}
    results = [ssa_attention(*inputs, sample=s, **common) for s in (None, sample_queries(layout, [(0, TOKENS)]))]
    upstream = torch.randn_like(results[0].out)
    gradients = [torch.autograd.grad((r.out * upstream).sum() + 500 * r.alignment_loss, inputs) for r in results]
    torch.testing.assert_close(tuple(results[1]), tuple(results[0]))
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("main", ["full", "sparse"])
def test_samples_that_make_up_all_queries_average_to_the_whole_layer(main):
    """Loss and mass are means over the sample, so is their gradient; the output does not depend on it."""
    inputs = (*make(), torch.randn(TOKENS, 4, dtype=torch.float64, requires_grad=True))
    layout = layout_of("ragged")
    common = {"block_size": 8, "top_k": 3, "cu_seqlens": layout, "main": main, "weights": (0.7, 1.3)}
    whole = ssa_attention(*inputs, **common)
    wanted = torch.autograd.grad(whole.alignment_loss, inputs)
    halves = [[(0, 20), (60, 40)], [(20, 40), (100, 20)]]
    parts = [ssa_attention(*inputs, sample=sample_queries(layout, half), **common) for half in halves]
    found = torch.autograd.grad(sum(p.alignment_loss for p in parts) / 2, inputs)
    for part in parts:
        torch.testing.assert_close(part.out, whole.out)
    torch.testing.assert_close(sum(p.alignment_loss for p in parts) / 2, whole.alignment_loss)
    torch.testing.assert_close(sum(p.captured_mass for p in parts) / 2, whole.captured_mass)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-12)


@pytest.fixture
def library(monkeypatch):
    """Transformer Engine's two calls on packed segments, in plain torch: boundaries and places as its documentation defines them."""

    def streams(lengths_q, lengths_k, cu_q, cu_k, q, k, v, places, scale):
        out, lse = torch.zeros_like(q), torch.zeros(*q.shape[:2], 1, dtype=q.dtype)
        for number in range(len(cu_q) - 1):
            (first_q, end_q), count_k = cu_q[number : number + 2].tolist(), int(cu_k[number + 1] - cu_k[number])
            count_q, first_k = end_q - first_q, int(places[number])
            assert count_q <= lengths_q and count_k <= lengths_k
            if count_q == 0:
                continue
            rows, keys = slice(first_q, end_q), slice(first_k, first_k + count_k)
            group = q.shape[1] // k.shape[1]
            k_H, v_H = (x[keys].repeat_interleave(group, 1) for x in (k, v))
            hidden = torch.ones(count_q, count_k).triu(count_k - count_q + 1).bool()
            logits = (scale * torch.einsum("qhd,khd->hqk", q[rows], k_H)).masked_fill(hidden, -torch.inf)
            out = out.index_copy(0, torch.arange(first_q, end_q), torch.einsum("hqk,khd->qhd", logits.softmax(-1), v_H))
            lse[rows] = logits.logsumexp(-1).transpose(0, 1)[..., None].detach()
        return out, lse

    def forward(training, longest_q, longest_k, cu_q, cu_k, q, k, v, dtype, backend, *, attn_scale, **layout):
        assert layout["attn_mask_type"] == "padding_causal_bottom_right" and layout["qkv_layout"] == "thd_thd_thd"
        assert torch.equal(layout["cu_seqlens_q_padded"], cu_q)
        o, lse = streams(longest_q, longest_k, cu_q, cu_k, q, k, v, layout["cu_seqlens_kv_padded"], attn_scale)
        return o.detach(), [lse, torch.zeros(2)]

    def backward(longest_q, longest_k, cu_q, cu_k, q, k, v, o, do, dtype, saved, backend, *, attn_scale, **layout):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            found, _ = streams(longest_q, longest_k, cu_q, cu_k, *leaves, layout["cu_seqlens_kv_padded"], attn_scale)
        torch.testing.assert_close(found.detach(), o)
        return torch.autograd.grad(found, leaves, do)

    module = types.SimpleNamespace(
        fused_attn_fwd=forward, fused_attn_bwd=backward, FusedAttnBackend={"F16_arbitrary_seqlen": None}
    )
    package = types.ModuleType("transformer_engine.pytorch.cpp_extensions")
    package.fused_attn = module
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setattr(te, "is_usable", lambda: True)


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("slices", SLICES)
@pytest.mark.parametrize("max_length", [None, TOKENS])
def test_one_batch_of_segments_equals_the_reference(library, documents, slices, max_length):
    q, k, v = make()
    sample = sample_queries(layout_of(documents, max_length), SLICES[slices])
    part, layout = sample.take(q).detach(), sample.layout
    leaves = [part.clone().requires_grad_(), k, v]
    wanted, wanted_lse = fused_reference(*leaves, layout)
    plan = fused.FusedPlan("te", 0, layout.max_length, SCALE, layout.spans, layout.segments)
    plain = [x.detach() for x in leaves]
    o, lse, *states = fused.fused_forward(*plain, layout.cu_seqlens, plan)
    torch.testing.assert_close((o, lse[0]), (wanted, wanted_lse))
    grad = torch.randn_like(o)
    found = fused.fused_backward(grad, *plain, o, lse, tuple(states), layout.cu_seqlens, plan)
    gradients = torch.autograd.grad(wanted, leaves, grad)
    torch.testing.assert_close([x.double() for x in found], list(gradients), rtol=1e-5, atol=1e-5)


def fused_reference(q, k, v, layout):
    from ssa_kernels import full_attention

    return full_attention(q, k, v, cu_seqlens=layout, scale=SCALE, return_lse=True, impl="reference")


@pytest.mark.parametrize("main", ["full", "sparse"])
@pytest.mark.parametrize("dim", [8, 12])
def test_gate_of_all_and_alignment_of_a_sample(main, dim):
    """The kernels, interpreted, against the public operators in float64 on the copied rows."""
    pytest.importorskip("triton")
    from ssa_kernels.gate_and_align.sampled import sampled_backward, sampled_forward

    sample = sample_queries(layout_of("ragged"), SLICES["some"])
    generator = torch.Generator().manual_seed(3)
    size = sample.layout.num_queries
    o_main, o_other = (2 * torch.randn(n, 4, dim, generator=generator) for n in (TOKENS, size))
    logits, grad_out = torch.randn(TOKENS, 4, generator=generator), torch.randn(TOKENS, 4, dim, generator=generator)
    lse_main, lse_other = (torch.randn(n, 4, generator=generator) for n in (TOKENS, size))
    weights, grad_loss = (0.7, 1.3), torch.tensor(900.0)

    leaves = [x.double().requires_grad_() for x in (o_main, o_other, logits)]
    wanted = gate(leaves[0], leaves[2])
    streams = (sample.take(leaves[0]), leaves[1])
    full, sparse = streams if main == "full" else streams[::-1]
    _, loss = gate_and_align(full, sparse, sample.take(leaves[2]), main=main, weights=weights)
    gradients = torch.autograd.grad((wanted, loss), leaves, (grad_out.double(), grad_loss.to(loss.dtype)))
    mass = torch.exp((lse_other - sample.take(lse_main)) * (1 if main == "full" else -1)).mean()

    rows = lse_main.view(2, 60, 4).transpose(1, 2).contiguous().transpose(1, 2)  # as a library may lay it out
    other = lse_other.t().contiguous().t()
    out, found_loss, found_mass = sampled_forward(o_main, o_other, logits, sample.places, main, weights, rows, other)
    do_main, do_other, delta_main, delta_other, grad_logits = sampled_backward(
        o_main, o_other, logits, sample.places, grad_out, grad_loss, main, weights
    )
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(out.double(), wanted.detach(), **close)
    torch.testing.assert_close(found_loss.double(), loss.detach().double(), **close)
    torch.testing.assert_close(found_mass, mass, **close)
    for got, want in zip((do_main, do_other, grad_logits), gradients, strict=True):
        torch.testing.assert_close(got.double(), want, **close)
    torch.testing.assert_close(delta_main, (do_main * o_main).sum(-1), **close)
    torch.testing.assert_close(delta_other, (do_other * o_other).sum(-1), **close)
