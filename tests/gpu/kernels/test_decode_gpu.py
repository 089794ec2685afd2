"""Decoding on a GPU: blocks and values against float64, long contexts, graphs, determinism, memory beyond 2^31 elements, no waiting.

Values are judged beside torch's own attention in bf16 on the same keys. Memory that no token was written to is NaN.
"""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ssa_kernels import (
    KeyValueCache,
    append_to_cache,
    build_cache,
    build_layout,
    decode_attention,
    query_slice,
    select_blocks,
    select_cached_blocks,
    sparse_attention,
    update_block_means,
)
from ssa_kernels.select.launch import block_means
from support.errors import require_as_near

pytestmark = pytest.mark.gpu


def random(*size, scale=1.0):
    return (torch.randn(*size, device="cuda") * scale).bfloat16()


def filled_cache(lengths, kv_heads=2, dim=64, block_size=16, paged=True, spare=9):
    """Returns a cache of random tokens, and the k and v [B, longest, G, D] that were appended to it."""
    longest, batch = max(lengths), len(lengths)
    blocks = -(-(longest + spare) // block_size)
    cache = build_cache(
        (batch, longest + spare, kv_heads, dim),
        block_size=block_size,
        dtype=torch.bfloat16,
        device="cuda",
        num_pages=batch * blocks + 5 if paged else None,
    )
    for x in (cache.k, cache.v, cache.means):
        x.fill_(float("nan"))
    if paged:
        cache.page_table.copy_(torch.randperm(cache.num_pages, device="cuda")[: batch * blocks].view(batch, blocks))
    k, v = random(batch, longest, kv_heads, dim), random(batch, longest, kv_heads, dim)
    new = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    cache.seq_lens.copy_(new)
    append_to_cache(cache, k, v, num_new=new)
    return cache, k, v


def check_choice(indices, q, means, own, top_k):
    """Fails unless the choice of one token [G, top_k] is float64's, up to importance that differs by 1e-5 relative."""
    kv_heads = len(indices)
    q = q.double().view(kv_heads, -1, q.shape[-1])
    for chosen, heads, mean in zip(indices.tolist(), q, means.double().unbind(1), strict=True):
        found = [x for x in chosen if x >= 0]
        assert found == sorted(set(found)) and len(found) == min(top_k, own + 1) and found[-1] == own
        assert chosen == found + [-1] * (top_k - len(found))
        if own < top_k:
            continue
        importance = (heads @ mean[:own].T * q.shape[-1] ** -0.5).softmax(-1).sum(0)
        inside = torch.zeros(own, dtype=torch.bool, device=q.device)
        inside[found[:-1]] = True
        if top_k > 1:
            lost, kept = float(importance[~inside].max()), float(importance[inside].min())
            assert lost - kept <= 1e-5 * lost


def attention(q, k, v, keys):
    """Returns (torch's bf16 result, float64's o, float64's lse) of one token [H, D] over the keys [G, n]."""
    kv_heads, dim = k.shape[1:]
    q = q.view(kv_heads, -1, dim)
    k, v = (torch.stack([x[keys[g], g] for g in range(kv_heads)]) for x in (k, v))
    baseline = scaled_dot_product_attention(q[None], k[None], v[None])[0]
    logits = q.double() @ k.double().transpose(1, 2) * dim**-0.5
    return baseline.flatten(0, 1), (logits.softmax(-1) @ v.double()).flatten(0, 1), logits.logsumexp(-1).flatten()


def check(lengths, *, heads=32, kv_heads=2, dim=64, block_size=16, top_k=16, tokens=1, paged=True):
    cache, k, v = filled_cache(lengths, kv_heads, dim, block_size, paged)
    new = torch.tensor([min(tokens, n) for n in lengths], dtype=torch.int32, device="cuda")
    q = random(len(lengths), tokens, heads, dim, scale=1.5)
    arguments = {"num_new": new, "top_k": top_k}
    indices = select_cached_blocks(q, cache, **arguments)
    assert torch.equal(indices, select_cached_blocks(q, cache, **arguments))
    for mode in ("sparse", "full"):
        o, lse = decode_attention(q, cache, mode=mode, return_lse=True, **arguments)
        again = decode_attention(q, cache, mode=mode, return_lse=True, **arguments)
        assert torch.equal(o, again[0]) and torch.equal(lse, again[1])
        results = []
        for b, (length, n) in enumerate(zip(lengths, new.tolist(), strict=True)):
            assert (o[b, n:] == 0).all() and (lse[b, n:] == float("-inf")).all() and (indices[b, n:] == -1).all()
            layout = build_layout(torch.tensor([0, length]).cuda(), num_tokens=max(length, 1), block_size=block_size)
            for t in range(n):
                position = length - n + t
                if mode == "sparse":
                    means = block_means(k[b, :length], layout)[..., :dim]
                    check_choice(indices[b, t], q[b, t], means, position // block_size, top_k)
                    blocks = [x[x >= 0].long() for x in indices[b, t]]
                    keys = [(x[:, None] * block_size + torch.arange(block_size).cuda()).flatten() for x in blocks]
                    keys = [x[x <= position] for x in keys]
                else:
                    keys = [torch.arange(position + 1).cuda()] * kv_heads
                baseline, exact_o, exact_lse = attention(q[b, t], k[b], v[b], keys)
                assert (lse[b, t].double() - exact_lse).abs().max() < 1e-4
                results.append((o[b, t], baseline, exact_o))
        require_as_near(*(torch.stack(x) for x in zip(*results, strict=True)), factor=2.0, name=mode)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("tokens", [1, 4, 8])
def test_mixed_lengths(tokens, paged):
    check([1, 15, 16, 17, 0, 256, 257, 5000, 8192, 12_345], tokens=tokens, paged=paged)


@pytest.mark.parametrize("group", [1, 3, 4, 16, 32])
@pytest.mark.parametrize("dim", [16, 64, 80, 128, 256])
def test_every_group_and_head_dim(group, dim):
    check([900, 3001], heads=2 * group, kv_heads=2, dim=dim, tokens=2)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("top_k", [1, 4, 24, 64, 128])
def test_every_top_k_and_block_size(top_k, block_size):
    check([3000, 20_011], block_size=block_size, top_k=top_k)


@pytest.mark.parametrize(("length", "kv_heads"), [(32_768, 2), (131_072, 2), (131_072 + 7, 8), (1_048_576, 1)])
def test_long_contexts(length, kv_heads):
    check([length], heads=16 * kv_heads if kv_heads < 8 else 32, kv_heads=kv_heads)


def test_choice_equals_the_prefills():
    """By the prefill's kernels, on the same means: they differ only where importance ties within float32."""
    cache, k, v = filled_cache([4000])
    layout = build_layout(torch.tensor([0, 4000]).cuda(), num_tokens=4000, block_size=16)
    assert torch.equal(cache.means[cache.page_table[0, :250].long()], block_means(k[0], layout)[:250])
    q = random(1, 8, 32, 64)
    part = query_slice(layout, slice(3992, 4000))
    expected = select_blocks(q[0], k[0], block_size=16, top_k=16, cu_seqlens=part)
    found = select_cached_blocks(q, cache, top_k=16)[0]
    assert (found != expected).any(-1).sum() <= 1
    exact, lse = sparse_attention(
        *(x.double() for x in (q[0], k[0], v[0])), found, block_size=16, cu_seqlens=part, impl="reference"
    )
    prefill, _ = sparse_attention(q[0], k[0], v[0], found, block_size=16, cu_seqlens=part)
    o, own_lse = decode_attention(q, cache, top_k=16, return_lse=True)
    require_as_near(o[0], prefill, exact, factor=2.0)
    assert (own_lse[0] - lse).abs().max() < 1e-4


def test_graph_replays_while_sequences_grow():
    """One capture of a step (length, append, both modes) serves 40 steps over block borders, with other page tables in between."""
    lengths = [20, 511, 1, 3000]
    cache, _, _ = filled_cache(lengths, spare=60)
    eager = replace(cache, **{x: getattr(cache, x).clone() for x in ("k", "v", "means", "seq_lens", "page_table")})
    k, v, q = random(4, 1, 2, 64), random(4, 1, 2, 64), random(4, 1, 32, 64)

    def step(to):
        to.seq_lens.add_(1)
        append_to_cache(to, k, v)
        return [decode_attention(q, to, mode=mode, top_k=8, return_lse=True) for mode in ("sparse", "full")]

    spare = replace(cache, **{x: getattr(cache, x).clone() for x in ("k", "v", "means", "seq_lens")})
    step(spare)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(cache)
    for i in range(40):
        for x in (q, k, v):
            x.copy_(random(*x.shape))
        if i == 20:  # the first sequence's pages move
            pages = cache.page_table[0].long()
            free = torch.tensor(sorted(set(range(cache.num_pages)) - set(cache.page_table.flatten().tolist()))).cuda()
            for x in (cache.k, cache.v, cache.means):
                x[free[:3]] = x[pages[:3]]
                x[pages[:3]] = float("nan")
            cache.page_table[0, :3] = free[:3]
        graph.replay()
        for ours, theirs in zip(captured, step(eager), strict=True):
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    assert cache.seq_lens.tolist() == [n + 40 for n in lengths]


def test_sparse_result_does_not_depend_on_the_batch():
    cache, _, _ = filled_cache([3000, 700, 12_000], paged=False)
    q = random(3, 2, 32, 64)
    together = decode_attention(q, cache, top_k=16, return_lse=True)
    for b in range(3):
        parts = {x: getattr(cache, x)[b : b + 1] for x in ("k", "v", "means", "seq_lens")}
        alone = decode_attention(q[b : b + 1], replace(cache, **parts), top_k=16, return_lse=True)
        assert all(torch.equal(x[b : b + 1], y) for x, y in zip(together, alone, strict=True))


def test_ties_go_to_the_more_recent_block():
    cache, _, _ = filled_cache([9000], paged=False)
    cache.k.copy_(random(1, 1, 2, 64).expand_as(cache.k))
    cache.means.copy_(cache.k[:, ::16][:, : cache.means.shape[1]])
    found = select_cached_blocks(random(1, 1, 32, 64), cache, top_k=16)
    own = 8999 // 16
    assert torch.equal(found, torch.arange(own - 15, own + 1, dtype=torch.int32, device="cuda").expand_as(found))


@pytest.mark.parametrize("size", [30.0, 3000.0])
def test_large_logits(size):
    cache, _, _ = filled_cache([5000])
    q = random(1, 1, 32, 64, scale=size)
    for mode in ("sparse", "full"):
        o, lse = decode_attention(q, cache, mode=mode, return_lse=True)
        assert o.isfinite().all() and lse.isfinite().all()


def test_memory_beyond_2_to_the_31_elements():
    """The pages of one sequence are the last of 1,100,000, each with 2,048 values of k and of v."""
    pages = 1_100_000
    cache = build_cache((1, 4096, 2, 64), block_size=16, dtype=torch.bfloat16, device="cuda", num_pages=pages)
    cache.page_table.copy_(torch.arange(pages - 1, pages - 257, -1, device="cuda")[None])
    small = build_cache((1, 4096, 2, 64), block_size=16, dtype=torch.bfloat16, device="cuda")
    k, v, q = random(1, 4000, 2, 64), random(1, 4000, 2, 64), random(1, 1, 32, 64)
    for x in (cache, small):
        x.seq_lens.fill_(4000)
        append_to_cache(x, k, v)
    for mode in ("sparse", "full"):
        found, expected = (decode_attention(q, x, mode=mode, return_lse=True) for x in (cache, small))
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_calls_neither_wait_nor_recompile():
    from ssa_kernels.decode import attend_triton, select_triton

    cache, _, _ = filled_cache([5, 900, 3000])
    q, k, v = random(3, 1, 32, 64), random(3, 1, 2, 64), random(3, 1, 2, 64)

    def step():
        torch.cuda.set_sync_debug_mode("error")
        try:
            cache.seq_lens.add_(1)
            append_to_cache(cache, k, v)
            for mode in ("sparse", "full"):
                decode_attention(q, cache, mode=mode)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    kernels = (
        select_triton.block_logits_kernel,
        select_triton.candidates_kernel,
        attend_triton.chosen_kernel,
        attend_triton.split_kernel,
        attend_triton.combine_kernel,
    )
    step()
    before = [len(kernel.device_caches[0][0]) for kernel in kernels]
    for lengths in ([1, 2, 3], [0, 3000, 17], [15, 16, 255]):
        cache.seq_lens.copy_(torch.tensor(lengths))
        step()
    assert [len(kernel.device_caches[0][0]) for kernel in kernels] == before


def test_wrong_values_stay_inside_the_cache():
    """Lengths and pages that a CPU would refuse: results are undefined, but nothing is accessed outside the tensors."""
    cache, _, _ = filled_cache([100, 200])
    q, k, v = random(2, 1, 32, 64), random(2, 1, 2, 64), random(2, 1, 2, 64)
    cache.page_table[0] = 2**30
    cache.page_table[1] = -5
    cache.seq_lens.copy_(torch.tensor([10**9, -7]))
    append_to_cache(cache, k, v)
    for mode in ("sparse", "full"):
        decode_attention(q, cache, mode=mode)
    torch.cuda.synchronize()


def scattered(plain, rows):
    """Returns a cache with a key table over the sequences of a contiguous one: keys in random rows, NaN in all others."""
    table = torch.full((len(plain.seq_lens), plain.capacity), 2**30, dtype=torch.int32, device="cuda")
    moved = [
        torch.full((len(table), rows, *x.shape[2:]), float("nan"), dtype=x.dtype, device="cuda")
        for x in (plain.k, plain.v)
    ]
    for b, length in enumerate(plain.seq_lens.tolist()):
        place = torch.randperm(rows, device="cuda")[:length].sort().values
        table[b, :length] = place.int()
        for to, source in zip(moved, (plain.k, plain.v), strict=True):
            to[b, place] = source[b, :length]
    return KeyValueCache(*moved, plain.means, plain.seq_lens, key_table=table)


def test_keys_anywhere_in_their_row_give_the_same_bits():
    """Also that means are those of appended keys, and that wrong entries of the table stay inside the keys."""
    plain, _, _ = filled_cache([4001, 17, 300, 1], paged=False)
    cache, q = scattered(plain, 5003), random(4, 1, 32, 64)
    for mode in ("sparse", "full"):
        found, wanted = (decode_attention(q, x, mode=mode, return_lse=True) for x in (cache, plain))
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True)), mode
    again = replace(cache, means=torch.full_like(cache.means, float("nan")))
    update_block_means(again, num_tokens=64, num_new=cache.seq_lens.clamp(max=64))
    assert torch.equal(again.means[0, 247:250], plain.means[0, 247:250]) and torch.equal(
        again.means[1, 0], plain.means[1, 0]
    )
    assert again.means[0, :246].isnan().all() and again.means[0, 250:].isnan().all() and again.means[3].isnan().all()
    for wrong in (2**30, -7):
        for mode in ("sparse", "full"):
            decode_attention(q, replace(cache, key_table=torch.full_like(cache.key_table, wrong)), mode=mode)
    torch.cuda.synchronize()
