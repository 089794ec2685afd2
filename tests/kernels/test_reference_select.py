"""Block selection's reference against the oracle: exactness, form, ties, documents, causality, decoding."""

import pytest
import torch

from ssa_kernels import build_layout, query_slice, select_blocks
from ssa_kernels.select.reference import block_means, choose_blocks
from support import oracle

RAGGED = [0, 1, 16, 16, 32, 49, 49, 110]  # documents of 1, 15, 0, 16, 17, 0 and 61 tokens, and what is left


def make(tokens, heads=4, kv_heads=2, dim=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(tokens, heads, dim, generator=generator, dtype=torch.float64)
    k = torch.randn(tokens, kv_heads, dim, generator=generator, dtype=torch.float64)
    return q.to(dtype), k.to(dtype)


@pytest.mark.parametrize("score", ["softmax_sum", "per_head"])
@pytest.mark.parametrize(("block_size", "top_k"), [(16, 1), (16, 4), (4, 8), (4, 5), (7, 3), (16, 64), (128, 4)])
def test_equals_the_oracle(block_size, top_k, score):
    cu_seqlens = torch.tensor(RAGGED, dtype=torch.int32)
    q, k = make(125, dtype=torch.float64)
    indices = select_blocks(q, k, block_size=block_size, top_k=top_k, cu_seqlens=cu_seqlens, score=score)
    assert indices.dtype == torch.int32
    assert torch.equal(indices, oracle.select(q, k, RAGGED, block_size, top_k, 8**-0.5, score))


@pytest.mark.parametrize(("block_size", "top_k"), [(4, 4), (4, 3), (8, 4), (8, 6)])
def test_official_rule(block_size, top_k):
    q, k = make(150, dtype=torch.float64)
    indices = select_blocks(
        q, k, block_size=block_size, top_k=top_k, cu_seqlens=torch.tensor([0, 150]), score="official_compat"
    )
    assert torch.equal(indices, oracle.select(q, k, [0, 150], block_size, top_k, 8**-0.5, "official_compat"))
    exact = select_blocks(q, k, block_size=block_size, top_k=top_k, cu_seqlens=torch.tensor([0, 150]))
    complete = torch.arange(1, 151) % block_size == 0
    assert torch.equal(indices[~complete], exact[~complete]) == (block_size >= 2 * top_k)


def test_official_softmax_counts_the_own_block_once_it_is_complete():
    """Two heads disagree about blocks 0 and 1. At the last token of block 2 the head that prefers block 1 looks at its own block."""
    q, k = torch.zeros(48, 2, 4, dtype=torch.float64), torch.zeros(48, 1, 4, dtype=torch.float64)
    k[:16, 0, 0], k[16:32, 0, 1], k[32:, 0, 2] = 1.0, 1.0, 1.0
    q[:, 0, 0], q[:, 1, 1], q[:, 1, 2] = 2.0, 3.0, 8.0
    common = {"block_size": 16, "top_k": 2, "cu_seqlens": torch.tensor([0, 48])}
    official, ours = (select_blocks(q, k, **common, score=score) for score in ("official_compat", "softmax_sum"))
    assert ours[40:, 0].tolist() == [[1, 2]] * 8
    assert official[40:, 0].tolist() == [[1, 2]] * 7 + [[0, 2]]


def test_official_rule_with_fewer_than_half_a_chunk():
    """A query early in its chunk has few candidates there, and no earlier block replaces the missing ones."""
    q, k = make(1100, heads=2, kv_heads=1, dtype=torch.float64)
    indices = select_blocks(q, k, block_size=16, top_k=16, cu_seqlens=torch.tensor([0, 1100]), score="official_compat")
    own = torch.arange(1100) // 16
    late = own >= 16
    assert torch.equal((indices[late, 0] >= 0).sum(-1), (8 + (own[late] % 16).clamp(max=7) + 1))


def test_importance_below_the_smallest_float32_is_zero():
    """Both far blocks underflow: they tie, and the more recent is chosen, in float64 as in float32."""
    q = torch.zeros(64, 1, 8, dtype=torch.float64)
    k = torch.zeros(64, 1, 8, dtype=torch.float64)
    q[:, :, 0], k[:16, :, 0], k[16:32, :, 0], k[32:48, :, 0] = 1000.0, -0.5, -0.6, 1.0
    for kind in (torch.float64, torch.float32):
        chosen = select_blocks(q.to(kind), k.to(kind), block_size=16, top_k=3, cu_seqlens=torch.tensor([0, 64]))
        assert chosen[63, 0].tolist() == [1, 2, 3]


def test_official_rule_loses_blocks_where_the_official_code_does():
    """At block_size = top_k = 16: at most 8 blocks of the own 256-token chunk and at most 8 earlier ones."""
    q, k = make(1200, heads=2, kv_heads=1)
    indices = select_blocks(q, k, block_size=16, top_k=16, cu_seqlens=torch.tensor([0, 1200]), score="official_compat")
    chunk = torch.arange(1200)[:, None] // 256 * 16
    inside = ((indices[:, 0] >= chunk) & (indices[:, 0] >= 0)).sum(-1)
    before = ((indices[:, 0] < chunk) & (indices[:, 0] >= 0)).sum(-1)
    late = torch.arange(1200) >= 256
    assert (before[late] == 8).all()
    assert torch.equal(inside[late], torch.minimum(torch.arange(1200) // 16 % 16 + 1, torch.tensor(8))[late])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_agrees_wherever_importance_differs(dtype):
    q, k = make(200, dtype=dtype)
    indices = select_blocks(q, k, block_size=8, top_k=5, cu_seqlens=torch.tensor([0, 77, 200]))
    oracle.check_selection(indices, q, k, [0, 77, 200], 8, 5, 8**-0.5)


def test_ties_go_to_the_more_recent_block():
    """With small integers, products and sums are exact in any order, so equal keys tie."""
    q, k = (x.mul(4).round() for x in make(80))
    k = k[:1].expand_as(k).contiguous()
    for score in ("softmax_sum", "per_head"):
        indices = select_blocks(q, k, block_size=8, top_k=4, cu_seqlens=torch.tensor([0, 80]), score=score)
        own = torch.arange(80) // 8
        expected = torch.stack([own - 3, own - 2, own - 1, own], -1)
        late = own >= 3
        assert torch.equal(indices[late], expected[late][:, None].expand(-1, indices.shape[1], -1).int())


def test_large_logits_keep_the_order():
    q, k = make(120, dtype=torch.float64)
    indices = select_blocks(q * 1000, k, block_size=8, top_k=3, cu_seqlens=torch.tensor([0, 120]))
    oracle.check_selection(indices, q * 1000, k, [0, 120], 8, 3, 8**-0.5)


def test_documents_are_isolated():
    q, k = make(125)
    cu_seqlens = torch.tensor(RAGGED, dtype=torch.int32)
    base = select_blocks(q, k, block_size=4, top_k=3, cu_seqlens=cu_seqlens)
    for start, end in oracle.document_spans(RAGGED, 125):
        q2, k2 = q.clone(), k.clone()
        q2[start:end] *= -3
        k2[start:end] += 5
        changed = select_blocks(q2, k2, block_size=4, top_k=3, cu_seqlens=cu_seqlens)
        assert torch.equal(changed[:start], base[:start])
        assert torch.equal(changed[end:], base[end:])


def test_selection_ignores_future_tokens_and_the_own_block():
    q, k = make(100)
    base = select_blocks(q, k, block_size=8, top_k=3, cu_seqlens=torch.tensor([0, 100]))
    k2 = k.clone()
    k2[48:] = 9.0
    changed = select_blocks(q, k2, block_size=8, top_k=3, cu_seqlens=torch.tensor([0, 100]))
    assert torch.equal(changed[:56], base[:56])
    assert not torch.equal(changed[56:], base[56:])


def test_decoding_from_cached_means_equals_prefill():
    q, k = make(90)
    prefill = select_blocks(q, k, block_size=8, top_k=4, cu_seqlens=torch.tensor([0, 90]))
    cache = torch.zeros(0, 2, 8)
    for position in range(90):
        if position % 8 == 0 and position:
            cache = torch.cat([cache, k[position - 8 : position].float().mean(0, keepdim=True).to(k.dtype)])
        layout = build_layout(torch.tensor([0, position + 1]), num_tokens=position + 1, block_size=8)
        means = torch.zeros(layout.num_block_rows, 2, 8)
        means[: len(cache)] = cache
        step = choose_blocks(
            q[position : position + 1],
            means,
            layout=query_slice(layout, slice(position, position + 1)),
            top_k=4,
            scale=8**-0.5,
            score="softmax_sum",
        )
        assert torch.equal(step[0], prefill[position])


def test_block_means_use_the_true_length_and_are_rounded_once():
    _, k = make(37, dtype=torch.bfloat16)
    layout = build_layout(torch.tensor([0, 20, 37]), num_tokens=37, block_size=8)
    means = block_means(k, layout)
    assert means.dtype == torch.bfloat16
    spans = [(0, 8), (8, 16), (16, 20), (20, 28), (28, 36), (36, 37)]
    expected = torch.stack([k[a:b].double().mean(0) for a, b in spans]).to(torch.bfloat16)
    assert torch.equal(means[:6], expected)
    assert not means[6:].any()


def test_selection_has_no_gradient():
    q, k = make(40)
    assert not select_blocks(
        q.requires_grad_(), k.requires_grad_(), block_size=8, top_k=2, cu_seqlens=torch.tensor([0, 40])
    ).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 0}, "top_k=0"),
        ({"score": "nsa"}, "score='nsa'"),
        ({"block_size": 0}, "block_size=0"),
        ({"score": "official_compat", "top_k": 16}, "block_size=8"),
        ({"impl": "cuda"}, "impl='cuda'"),
        ({"cu_seqlens": torch.tensor([0, 30, 20, 40])}, "never decrease"),
        ({"cu_seqlens": torch.tensor([0.0, 40.0])}, "int32"),
        ({"cu_seqlens": build_layout(torch.tensor([0, 40]), num_tokens=40, block_size=4)}, "layout's 4"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    q, k = make(40)
    arguments = {"block_size": 8, "top_k": 4, "cu_seqlens": torch.tensor([0, 40])} | change
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        select_blocks(q, k, **arguments)
