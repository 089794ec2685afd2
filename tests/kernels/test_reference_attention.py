"""Both streams' references against the oracle: outputs, gradients, isolation, causality, and how the streams relate."""

import pytest
import torch

from ssa_kernels import build_layout, captured_mass, full_attention, query_slice, select_blocks, sparse_attention
from support import oracle
from support.errors import require_as_near

RAGGED = [0, 1, 16, 16, 32, 49, 49, 110]
SCALE = 8**-0.5


def make(tokens=125, heads=4, kv_heads=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(tokens, h, 8, generator=generator, dtype=torch.float64).to(dtype)
        for h in (heads, kv_heads, kv_heads)
    ]


def choose(q, k, cu_seqlens, block_size=8, top_k=3, score="softmax_sum"):
    return select_blocks(q, k, block_size=block_size, top_k=top_k, cu_seqlens=cu_seqlens, score=score)


@pytest.mark.parametrize("score", ["softmax_sum", "per_head"])
@pytest.mark.parametrize("tokens", [125, 300])
def test_sparse_equals_the_oracle_with_gradients(score, tokens):
    q, k, v = (x.requires_grad_() for x in make(tokens))
    cu_seqlens = torch.tensor(RAGGED)
    indices = choose(q, k, cu_seqlens, score=score)
    o, lse = sparse_attention(q, k, v, indices, block_size=8, cu_seqlens=cu_seqlens)
    expected, expected_lse = oracle.attention(q, k, v, oracle.visible(indices, RAGGED, tokens, 4, 8), SCALE)
    torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)
    assert not lse.requires_grad
    grad = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=o.dtype)
    for ours, theirs in zip(
        torch.autograd.grad(o, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_full_equals_the_oracle_with_gradients():
    q, k, v = (x.requires_grad_() for x in make())
    o, lse = full_attention(q, k, v, cu_seqlens=torch.tensor(RAGGED), return_lse=True)
    expected, expected_lse = oracle.attention(q, k, v, oracle.visible(None, RAGGED, 125, 4, 8), SCALE)
    torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(o.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    assert full_attention(q, k, v, cu_seqlens=torch.tensor(RAGGED))[1] is None


def test_gradcheck_of_both_streams():
    q, k, v = (x.requires_grad_() for x in make(21, heads=2, kv_heads=1))
    cu_seqlens = torch.tensor([0, 5, 21])
    indices = choose(q, k, cu_seqlens, block_size=4, top_k=2)
    assert torch.autograd.gradcheck(
        lambda q, k, v: sparse_attention(q, k, v, indices, block_size=4, cu_seqlens=cu_seqlens)[0], (q, k, v)
    )
    assert torch.autograd.gradcheck(lambda q, k, v: full_attention(q, k, v, cu_seqlens=cu_seqlens)[0], (q, k, v))


def plain_attention(q, k, v, mask):
    """Returns o and lse of attention as plain torch operations in the inputs' dtype, head by head."""
    outs, lses = [], []
    for head in range(q.shape[1]):
        logits = (q[:, head] @ k[:, head // 2].T * SCALE).masked_fill(~mask[head], -torch.inf)
        outs.append(logits.softmax(-1) @ v[:, head // 2])
        lses.append(logits.logsumexp(-1))
    return torch.stack(outs, 1), torch.stack(lses, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_error_is_at_most_that_of_plain_operations(dtype):
    """At most twice the error in float32, where both are a few roundings."""
    q, k, v = make(dtype=dtype)
    indices = choose(q, k, torch.tensor(RAGGED))
    mask = oracle.visible(indices, RAGGED, 125, 4, 8)
    found = sparse_attention(q, k, v, indices, block_size=8, cu_seqlens=torch.tensor(RAGGED))
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    for got, plain, exact in zip(
        found, plain_attention(q, k, v, mask), oracle.attention(q, k, v, mask, SCALE), strict=True
    ):
        require_as_near(got, plain, exact, factor=1.0 if dtype == torch.bfloat16 else 2.0)


def test_documents_are_isolated():
    q, k, v = make(dtype=torch.float32)
    cu_seqlens = torch.tensor(RAGGED)

    def streams(q, k, v):
        indices = choose(q, k, cu_seqlens)
        sparse = sparse_attention(q, k, v, indices, block_size=8, cu_seqlens=cu_seqlens)
        full = full_attention(q, k, v, cu_seqlens=cu_seqlens, return_lse=True)
        return [*sparse, *full]

    base = streams(q, k, v)
    for start, end in oracle.document_spans(RAGGED, 125):
        changed = streams(*(torch.cat([x[:start], x[start:end] * -7 + 1, x[end:]]) for x in (q, k, v)))
        for new, old in zip(changed, base, strict=True):
            assert torch.equal(new[:start], old[:start]) and torch.equal(new[end:], old[end:])
            assert not torch.equal(new[start:end], old[start:end])


def test_attention_is_causal():
    q, k, v = make(dtype=torch.float32)
    cu_seqlens = torch.tensor([0, 125])
    indices = choose(q, k, cu_seqlens)
    o, _ = sparse_attention(q, k, v, indices, block_size=8, cu_seqlens=cu_seqlens)
    f, _ = full_attention(q, k, v, cu_seqlens=cu_seqlens)
    cut = 77
    later = [torch.cat([x[:cut], x[cut:] + 3]) for x in (q, k, v)]
    indices2 = choose(later[0], later[1], cu_seqlens)
    o2, _ = sparse_attention(*later, indices2, block_size=8, cu_seqlens=cu_seqlens)
    f2, _ = full_attention(*later, cu_seqlens=cu_seqlens)
    assert torch.equal(indices2[:cut], indices[:cut])
    assert torch.equal(o2[:cut], o[:cut]) and torch.equal(f2[:cut], f[:cut])
    assert not torch.equal(o2[cut:], o[cut:])


def test_choosing_all_blocks_equals_full_attention():
    q, k, v = make()
    cu_seqlens = torch.tensor(RAGGED)
    indices = choose(q, k, cu_seqlens, top_k=16)
    o, lse = sparse_attention(q, k, v, indices, block_size=8, cu_seqlens=cu_seqlens)
    f, lse_full = full_attention(q, k, v, cu_seqlens=cu_seqlens, return_lse=True)
    torch.testing.assert_close(o, f, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(captured_mass(lse_full, lse), torch.ones(125, 4), rtol=0, atol=1e-6)


def test_captured_mass_is_in_range_and_bounds_the_gap():
    q, k, v = make(300)
    cu_seqlens = torch.tensor([0, 300])
    indices = choose(q * 2, k, cu_seqlens)
    o, lse = sparse_attention(q, k, v, indices, block_size=8, cu_seqlens=cu_seqlens)
    f, lse_full = full_attention(q, k, v, cu_seqlens=cu_seqlens, return_lse=True)
    mass = captured_mass(lse_full, lse)
    assert mass.min() > 0 and mass.max() < 1 + 1e-3
    assert mass[-100:].max() < 0.9
    bound = (1 - mass.double()) * (v.norm(dim=-1).max() + o.norm(dim=-1))
    assert ((f - o).norm(dim=-1) <= bound + 1e-5).all()
    with pytest.raises(ValueError, match="lse_full's"):
        captured_mass(lse_full, lse[:-1])


def test_decoding_one_query_equals_prefill():
    q, k, v = make(90)
    indices = choose(q, k, torch.tensor([0, 90]))
    o, _ = sparse_attention(q, k, v, indices, block_size=8, cu_seqlens=torch.tensor([0, 90]))
    for position in (0, 7, 8, 50, 89):
        layout = build_layout(torch.tensor([0, position + 1]), num_tokens=position + 1, block_size=8)
        one = slice(position, position + 1)
        step, _ = sparse_attention(
            q[one],
            k[: position + 1],
            v[: position + 1],
            indices[one],
            block_size=8,
            cu_seqlens=query_slice(layout, one),
        )
        torch.testing.assert_close(step[0], o[position], rtol=1e-12, atol=1e-12)


def test_subset_of_queries_gets_the_same_result():
    """A context-parallel rank has some of the queries and all keys."""
    q, k, v = make(125)
    layout = build_layout(torch.tensor(RAGGED), num_tokens=125, block_size=8)
    mine = torch.cat([torch.arange(0, 30), torch.arange(95, 125)])
    part = query_slice(layout, mine)
    indices = choose(q, k, layout)
    assert torch.equal(choose(q[mine], k, part), indices[mine])
    o, _ = sparse_attention(q, k, v, indices, block_size=8, cu_seqlens=layout)
    o_part, _ = sparse_attention(q[mine], k, v, indices[mine], block_size=8, cu_seqlens=part)
    torch.testing.assert_close(o_part, o[mine], rtol=1e-12, atol=1e-12)


def test_bad_indices_are_refused():
    q, k, v = make(40)
    with pytest.raises(ValueError, match="indices of shape"):
        sparse_attention(
            q, k, v, torch.zeros(40, 3, 2, dtype=torch.int32), block_size=8, cu_seqlens=torch.tensor([0, 40])
        )
