"""Selection on a GPU: exact against float64 over the sweep, ties, documents, large logits, long rows, workspace, no waiting."""

import pytest
import torch

from ssa_kernels import build_layout, query_slice, select_blocks
from ssa_kernels.documents import ARRAYS
from ssa_kernels.select import importance, launch, reference, topk
from ssa_kernels.select.long_documents import longest_seen

pytestmark = pytest.mark.gpu


def make(tokens, heads=32, kv_heads=2, dim=64, size=1.0):
    q = (torch.randn(tokens, heads, dim, device="cuda") * size).bfloat16()
    return q, torch.randn(tokens, kv_heads, dim, device="cuda").bfloat16()


def bounds(*values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def check(q, k, cu_seqlens, block_size, top_k, score="softmax_sum", tolerance=1e-5, differing=0.01):
    """Fails unless the choice differs from float64's for only a few tokens, and there by blocks whose importance is within `tolerance`."""
    layout = build_layout(cu_seqlens, num_tokens=k.shape[0], block_size=block_size)
    ours = select_blocks(q, k, block_size=block_size, top_k=top_k, cu_seqlens=layout, score=score)
    assert torch.equal(ours, select_blocks(q, k, block_size=block_size, top_k=top_k, cu_seqlens=layout, score=score))
    means, scale = reference.block_means(k, layout).double(), q.shape[-1] ** -0.5
    exact = reference.choose_blocks(q.double(), means, layout=layout, top_k=top_k, scale=scale, score=score)
    assert torch.equal(ours < 0, exact < 0)
    different = (ours != exact).any(-1).any(-1).nonzero()[:, 0]
    own = layout.query_position // block_size
    counted = (layout.query_position + 1) // block_size if score == "official_compat" else own
    for token in different.tolist():
        one = slice(token, token + 1)
        ranges = (layout.query_first_block_row[one], own[one], counted[one])
        row = reference._importance(q[one].double(), means.permute(1, 2, 0), ranges, scale, score)[0]
        first = int(layout.query_first_block_row[token])
        for mine, theirs, values in zip(ours[token].tolist(), exact[token].tolist(), row, strict=True):
            assert int(own[token]) in mine and mine == sorted(x for x in mine if x >= 0) + [x for x in mine if x < 0]
            lost = [float(values[first + block]) for block in set(theirs) - set(mine)]
            gained = [float(values[first + block]) for block in set(mine) - set(theirs)]
            assert not lost or max(lost) - min(gained) <= tolerance * max(map(abs, lost + gained)), token
    assert len(different) <= max(2, differing * len(ours))


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("top_k", [1, 4, 8, 12, 16, 24, 32, 64])
def test_every_top_k_and_block_size(top_k, block_size):
    q, k = make(2500)
    check(q, k, bounds(0, 700, 2400), block_size, top_k)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 6, 8, 16, 32])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
def test_every_group_and_head_dim(group, dim):
    q, k = make(1500, 2 * group, 2, dim)
    check(q, k, bounds(0, 1, 16, 16, 33, 1500), 16, 16)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(16, 2, 64), (8, 8, 128), (12, 2, 96), (16, 2, 256)])
def test_per_head(heads, kv_heads, dim):
    q, k = make(1500, heads, kv_heads, dim)
    check(q, k, bounds(0, 1, 900), 16, 8, "per_head")


@pytest.mark.parametrize(("block_size", "top_k"), [(16, 16), (16, 12), (32, 16), (64, 64), (128, 24)])
def test_official_rule(block_size, top_k):
    q, k = make(3000)
    check(q, k, bounds(0, 100, 3000), block_size, top_k, "official_compat")


@pytest.mark.parametrize("size", [5.0, 30.0, 3000.0])
def test_large_logits(size):
    """Importance is as exact as float32's logits: a rounding of the largest one is a relative error of that much times log(2).

    Where softmax is nearly one-hot, many blocks have equal importance in float32, so many tokens may differ.
    """
    q, k = make(3000, size=size)
    means = reference.block_means(k, build_layout(bounds(0, 2900), num_tokens=3000, block_size=16)).double()
    largest = torch.einsum("thd,rd->thr", q[:, :16].double(), means[:, 0]).abs().max() / 8
    check(
        q,
        k,
        bounds(0, 2900),
        16,
        16,
        tolerance=max(1e-5, float(largest) * 2**-22),
        differing=0.01 if size < 100 else 0.3,
    )


@pytest.mark.parametrize("tokens", [20_000, 70_000])
def test_rows_with_many_top_k_passes(tokens):
    """Every token's candidates take several full passes of top-k and a remainder. Only the last queries are checked, because float64 is slow."""
    q, k = make(tokens, 16, 1)
    layout = build_layout(bounds(0, tokens), num_tokens=tokens, block_size=16)
    last = query_slice(layout, slice(tokens - 512, tokens))
    ours = select_blocks(q, k, block_size=16, top_k=16, cu_seqlens=layout)[-512:]
    assert torch.equal(ours, select_blocks(q[-512:], k, block_size=16, top_k=16, cu_seqlens=last))
    means = reference.block_means(k, layout).double()
    exact = reference.choose_blocks(q[-512:].double(), means, layout=last, top_k=16, scale=0.125, score="softmax_sum")
    assert (ours != exact).any(-1).sum() <= 5  # neighbours in rank closer than 1e-5, a few in a thousand rows


@pytest.mark.parametrize("score", ["softmax_sum", "per_head"])
def test_ties_go_to_the_more_recent_block(score):
    q, k = make(4000)
    k = k[:1].expand_as(k).contiguous()
    indices = select_blocks(q, k, block_size=16, top_k=16, cu_seqlens=bounds(0, 4000), score=score)
    own = torch.arange(4000, device="cuda") // 16
    late = own >= 15
    expected = own[:, None] - 15 + torch.arange(16, device="cuda")
    assert torch.equal(indices[late], expected[late, None].expand(-1, indices.shape[1], -1).int())


def test_values_that_share_a_bin():
    """The best candidates lie 128 blocks apart, so that one bin of the top-k's first pass holds them all."""
    q, k = make(16 * 2600, 2, 1)
    q[:, :, 0] = 8.0
    k[:, :, 0] = 0.0
    k.view(2600, 16, 1, 64)[5::128, :, :, 0] = 4.0
    check(q[-64:].repeat(650, 1, 1), k, bounds(0, 16 * 2600), 16, 16)


def test_result_ignores_other_documents_and_future_tokens():
    q, k = make(4000)
    cu_seqlens = bounds(0, 1, 16, 31, 48, 48, 1500, 3001)
    base = select_blocks(q, k, block_size=16, top_k=8, cu_seqlens=cu_seqlens)
    q2, k2 = q.clone(), k.clone()
    q2[48:1500], k2[48:1500] = 7.0, float("nan")
    changed = select_blocks(q2, k2, block_size=16, top_k=8, cu_seqlens=cu_seqlens)
    assert torch.equal(changed[:48], base[:48]) and torch.equal(changed[1500:], base[1500:])
    k2 = k.clone()
    k2[2500:] = 9.0
    changed = select_blocks(q, k2, block_size=16, top_k=8, cu_seqlens=cu_seqlens)
    assert torch.equal(changed[:2500], base[:2500])


def test_queries_far_apart():
    """One query from each of many documents, as in a decoding batch: a tile of queries visits the block rows of all of them."""
    q, k = make(60_000, 16, 1)
    layout = build_layout(
        torch.arange(0, 60_001, 600, device="cuda", dtype=torch.int32), num_tokens=60_000, block_size=16
    )
    queries = torch.arange(599, 60_000, 600, device="cuda")
    arguments = {"block_size": 16, "top_k": 8}
    alone = select_blocks(q[queries], k, cu_seqlens=query_slice(layout, queries), **arguments)
    assert torch.equal(alone, select_blocks(q, k, cu_seqlens=layout, **arguments)[queries])


def test_workspace_is_bounded():
    tokens = 131_072
    q, k = make(tokens, 32, 2)
    layout = build_layout(bounds(0, tokens), num_tokens=tokens, block_size=16)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    indices = select_blocks(q, k, block_size=16, top_k=16, cu_seqlens=layout)
    beside = torch.cuda.max_memory_allocated() - before - indices.nbytes
    sums, means = tokens * 32 * 4, layout.num_block_rows * 2 * 64 * 2
    assert beside <= launch.WORKSPACE_BYTES + sums + means + 2**20


def test_calls_neither_wait_nor_recompile():
    def call(*ends):
        q, k = make(3000)
        cu_seqlens = bounds(0, *ends)
        torch.cuda.set_sync_debug_mode("error")
        try:
            layout = build_layout(cu_seqlens, num_tokens=3000, block_size=16)
            select_blocks(q, k, block_size=16, top_k=16, cu_seqlens=layout)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    kernels = (
        importance.block_means_kernel,
        importance.softmax_sums_kernel,
        importance.importance_kernel,
        topk.top_k_kernel,
    )
    call(3000)
    before = [len(kernel.device_caches[0][0]) for kernel in kernels]
    for ends in ((1, 3000), (16, 32, 1000, 2999), (0, 0, 7), tuple(range(10, 3000, 10))):
        call(*ends)
    assert [len(kernel.device_caches[0][0]) for kernel in kernels] == before


def test_tensors_beyond_2_to_the_31_elements():
    rows, length = 520, 2048  # 1,064,960 tokens x 2,048 values
    q, k = make(rows * length)
    ends = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device="cuda")
    layout = build_layout(ends, num_tokens=rows * length, block_size=16, max_length=length)
    indices = select_blocks(q, k, block_size=16, top_k=8, cu_seqlens=layout)
    alone = select_blocks(q[-length:], k[-length:], block_size=16, top_k=8, cu_seqlens=bounds(0, length))
    assert torch.equal(indices[-length:], alone)


def documents(*lengths):
    return bounds(0, *torch.tensor(lengths).cumsum(0).tolist())


@pytest.mark.parametrize("score", ["softmax_sum", "per_head", "official_compat"])
def test_boundaries_alone_choose_the_same_blocks(score):
    """Whatever documents a call expects from the calls before, including far shorter ones. Boundaries may change behind the same tensor."""
    torch.cuda.synchronize()
    longest_seen.cache_clear()
    tokens = 40_000
    q, k = make(tokens, 16, 2)
    arguments = {"block_size": 16, "top_k": 16, "score": score}
    cu_seqlens = documents(*[5000] * 8)
    hidden = torch.from_dlpack(cu_seqlens)  # writes through it leave the version of cu_seqlens as it is
    for lengths in ([5000] * 8, [5000] * 8, [100, 5000, 30_001, 899, 1, 999, 1, 1999], [1] * 7 + [39_993], [5000] * 8):
        hidden.copy_(documents(*lengths))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            alone = select_blocks(q, k, cu_seqlens=cu_seqlens, **arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        layout = build_layout(cu_seqlens, num_tokens=tokens, block_size=16, max_length=max(lengths))
        assert torch.equal(alone, select_blocks(q, k, cu_seqlens=layout, **arguments))


def test_boundaries_change_between_replays_of_a_graph():
    tokens = 20_000
    q, k = make(tokens, 16, 2)
    cu_seqlens = documents(*[2500] * 8)
    arguments = {"block_size": 16, "top_k": 16}
    select_blocks(q, k, cu_seqlens=cu_seqlens, **arguments)
    torch.cuda.synchronize()
    select_blocks(q, k, cu_seqlens=cu_seqlens, **arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = select_blocks(q, k, cu_seqlens=cu_seqlens, **arguments)
    for lengths in ([2500] * 8, [100] * 7 + [19_300]):
        cu_seqlens.copy_(documents(*lengths))
        graph.replay()
        layout = build_layout(cu_seqlens, num_tokens=tokens, block_size=16, max_length=max(lengths))
        assert torch.equal(replayed, select_blocks(q, k, cu_seqlens=layout, **arguments))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("lengths", [(5, 0, 3, 40), (0,), (1,) * 2500, (0, 1, 2) * 700, (8192,) * 8])
def test_layouts_equal_those_of_a_cpu(lengths, dtype):
    cu_seqlens = documents(*lengths).to(dtype)
    tokens = sum(lengths) + 3
    ours = build_layout(cu_seqlens, num_tokens=tokens, block_size=16)
    theirs = build_layout(cu_seqlens.cpu(), num_tokens=tokens, block_size=16)
    assert all(torch.equal(getattr(ours, name).cpu(), getattr(theirs, name)) for name in ARRAYS)
