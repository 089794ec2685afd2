"""Decoding against the prefill: the reference token by token in float64, the kernels in Triton's interpreter, and compiled for Hopper.

Memory that no token was written to is NaN in every test, and pages lie in random order with spare ones between them.
"""

from dataclasses import replace

import pytest
import torch

from ssa_kernels import (
    KeyValueCache,
    append_to_cache,
    build_cache,
    build_layout,
    decode_attention,
    decode_bytes,
    full_attention,
    query_slice,
    select_blocks,
    select_cached_blocks,
    sparse_attention,
)
from ssa_kernels.select.reference import block_means
from support.errors import relative, require_as_near

triton = pytest.importorskip("triton")
interpreted = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1 before Triton is imported"
)
FLOAT32 = 1e-6
MIXED = [37, 1, 0, 15, 16, 17]


def tokens_of(lengths, heads, kv_heads, dim, dtype=torch.float32, seed=0):
    """Returns q, k and v of each sequence."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(n, h, dim, generator=generator).to(dtype) for h in (heads, kv_heads, kv_heads)] for n in lengths
    ]


def empty_cache(batch, length, k, block_size, paged):
    generator = torch.Generator().manual_seed(batch)
    blocks = -(-length // block_size)
    cache = build_cache(
        (batch, length, *k.shape[1:]),
        block_size=block_size,
        dtype=k.dtype,
        num_pages=batch * blocks + 3 if paged else None,
    )
    for x in (cache.k, cache.v, cache.means):
        x.fill_(float("nan"))
    if paged:
        pages = torch.randperm(cache.num_pages, generator=generator)[: batch * blocks]
        cache.page_table.copy_(pages.view(batch, blocks))
    return cache


def rows_of(sequences, which, first, last):
    """Returns [B, T, heads, D] of the tokens [first, last) of each sequence, NaN beyond its end."""
    rows = torch.full((len(sequences), last - first, *sequences[0][which].shape[1:]), float("nan"))
    rows = rows.to(sequences[0][which].dtype)
    for row, sequence in zip(rows, sequences, strict=True):
        part = sequence[which][first:last]
        row[: len(part)] = part
    return rows


def filled_cache(sequences, block_size, paged, impl="reference", spare=5):
    """Returns a cache of whole sequences, appended as prompts."""
    lengths = torch.tensor([len(s[0]) for s in sequences], dtype=torch.int32)
    longest = int(lengths.max())
    cache = empty_cache(len(sequences), longest + spare, sequences[0][1], block_size, paged)
    cache.seq_lens.copy_(lengths)
    append_to_cache(
        cache, rows_of(sequences, 1, 0, longest), rows_of(sequences, 2, 0, longest), num_new=lengths, impl=impl
    )
    return cache


def last_queries(sequences, tokens):
    """Returns q [B, tokens, H, D] of each sequence's last tokens, and how many it has."""
    new = torch.tensor([min(tokens, len(s[0])) for s in sequences], dtype=torch.int32)
    q = torch.full((len(sequences), tokens, *sequences[0][0].shape[1:]), float("nan")).to(sequences[0][0].dtype)
    for row, sequence, n in zip(q, sequences, new.tolist(), strict=True):
        row[:n] = sequence[0][len(sequence[0]) - n :]
    return q, new


def prefill(sequence, tokens, block_size, top_k, score="softmax_sum", wide=True):
    """Returns (indices, sparse o and lse, full o and lse) of a sequence's last tokens by the prefill's references."""
    q, k, v = (x.double() for x in sequence) if wide else sequence
    length = len(q)
    layout = query_slice(
        build_layout(torch.tensor([0, length]), num_tokens=length, block_size=block_size),
        slice(length - tokens, length),
    )
    arguments = {"block_size": block_size, "cu_seqlens": layout, "impl": "reference"}
    indices = select_blocks(q[-tokens:], k, top_k=top_k, score=score, **arguments)
    sparse = sparse_attention(q[-tokens:], k, v, indices, **arguments)
    full = full_attention(q[-tokens:], k, v, cu_seqlens=layout, return_lse=True, impl="reference")
    return indices, sparse, full


def check(sequences, *, block_size, top_k, tokens, paged, score="softmax_sum", tolerance=FLOAT32):
    """Compares the kernels with the prefill's references on the same tokens, in float64."""
    cache = filled_cache(sequences, block_size, paged, "triton")
    q, new = last_queries(sequences, tokens)
    arguments = {"num_new": new, "top_k": top_k, "score": score, "impl": "triton"}
    indices = select_cached_blocks(q, cache, **arguments)
    results = {mode: decode_attention(q, cache, mode=mode, return_lse=True, **arguments) for mode in ("sparse", "full")}
    for b, (sequence, n) in enumerate(zip(sequences, new.tolist(), strict=True)):
        assert (indices[b, n:] == -1).all()
        for o, lse in results.values():
            assert (o[b, n:] == 0).all() and (lse[b, n:] == float("-inf")).all()
        if n == 0:
            continue
        expected, *exact = prefill(sequence, n, block_size, top_k, score)
        assert torch.equal(indices[b, :n], expected)
        for (o, lse), (exact_o, exact_lse) in zip(results.values(), exact, strict=True):
            assert relative(o[b, :n], exact_o) < tolerance
            assert (lse[b, :n] - exact_lse).abs().max() < 10 * tolerance


@pytest.mark.parametrize("paged", [False, True])
def test_reference_equals_prefill_token_by_token(paged):
    """From the first token over two block borders: the same means to the bit, the same blocks, values to float64's rounding."""
    [sequence] = sequences = tokens_of([19], 4, 2, 16, torch.float64)
    cache = empty_cache(1, 20, sequence[1], 4, paged)
    for t in range(19):
        cache.seq_lens.add_(1)
        append_to_cache(cache, *(rows_of(sequences, which, t, t + 1) for which in (1, 2)), impl="reference")
        so_far = [x[: t + 1] for x in sequence]
        layout = build_layout(torch.tensor([0, t + 1]), num_tokens=t + 1, block_size=4)
        complete = (t + 1) // 4
        held = cache.pages()[2][cache.block_pages()[0, :complete].long()]
        assert torch.equal(held, block_means(so_far[1], layout)[:complete])
        expected, sparse, full = prefill(so_far, 1, 4, 3)
        q = sequence[0][None, t : t + 1]
        assert torch.equal(select_cached_blocks(q, cache, top_k=3, impl="reference")[0], expected)
        for mode, (o, lse) in (("sparse", sparse), ("full", full)):
            found = decode_attention(q, cache, mode=mode, top_k=3, return_lse=True, impl="reference")
            assert relative(found[0][0], o) < 1e-14 and relative(found[1][0], lse) < 1e-14


@pytest.mark.parametrize("score", ["per_head", "official_compat"])
def test_reference_takes_every_score(score):
    sequences = tokens_of([60], 4, 2, 16, torch.float64)
    cache = filled_cache(sequences, 4, True)
    q, _ = last_queries(sequences, 3)
    found = select_cached_blocks(q, cache, top_k=4, score=score, impl="reference")[0]
    expected, sparse, _ = prefill(sequences[0], 3, 4, 4, score)
    assert torch.equal(found, expected)
    o, lse = decode_attention(q, cache, top_k=4, score=score, impl="reference")
    assert relative(o[0], sparse[0]) < 1e-14 and lse is None


@interpreted
def test_kernels_equal_prefill_token_by_token():
    [sequence] = sequences = tokens_of([19], 4, 2, 16)
    cache = empty_cache(1, 20, sequence[1], 4, True)
    for t in range(19):
        cache.seq_lens.add_(1)
        append_to_cache(cache, *(rows_of(sequences, which, t, t + 1) for which in (1, 2)), impl="triton")
        q = sequence[0][None, t : t + 1]
        so_far = [x[: t + 1] for x in sequence]
        expected, *exact = prefill(so_far, 1, 4, 3)
        assert torch.equal(select_cached_blocks(q, cache, top_k=3, impl="triton")[0], expected)
        for mode, (o, _) in zip(("sparse", "full"), exact, strict=True):
            assert relative(decode_attention(q, cache, mode=mode, top_k=3, impl="triton")[0][0], o) < FLOAT32
    plain = filled_cache(sequences, 4, False)
    complete = cache.block_pages()[0, :4].long()
    assert torch.equal(cache.means[complete], plain.means[0, :4])


@interpreted
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
def test_mixed_lengths(tokens, paged):
    check(tokens_of(MIXED, 4, 2, 16), block_size=4, top_k=3, tokens=tokens, paged=paged)


@interpreted
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size", "top_k"),
    [(1, 1, 16, 4, 1), (6, 2, 24, 5, 4), (8, 8, 32, 16, 2), (32, 1, 16, 4, 5), (4, 2, 16, 4, 40), (8, 1, 256, 32, 2)],
)
def test_shapes(heads, kv_heads, dim, block_size, top_k):
    check(tokens_of([70, 33], heads, kv_heads, dim), block_size=block_size, top_k=top_k, tokens=2, paged=heads % 4 == 0)


@interpreted
def test_every_query_head_chooses_for_itself():
    check(tokens_of([70, 9], 4, 2, 16), block_size=4, top_k=4, tokens=2, paged=True, score="per_head")


@interpreted
def test_several_tiles_slices_and_splits(monkeypatch):
    """Small tiles, so that each loop runs more than once and its last round is not full; 8 tokens of 16 heads take two tiles of rows."""
    from ssa_kernels.decode import launch

    small = {
        "TILE": 32,
        "SLICE_BLOCKS": 32,
        "CANDIDATE_CHUNK": 16,
        "MERGE_CHUNK": 16,
        "MAX_SLICES": 5,
        "CHOSEN_KEYS": 16,
    }
    for name, size in {**small, "SPLIT_KEYS": 16, "MIN_KEYS_PER_SPLIT": 64, "PROGRAMS_PER_MULTIPROCESSOR": 99}.items():
        monkeypatch.setattr(launch, name, size)
    check(tokens_of([170, 101], 16, 1, 16), block_size=2, top_k=12, tokens=8, paged=True)


@interpreted
def test_ties_go_to_the_more_recent_block():
    [(q, k, v)] = tokens_of([203], 2, 1, 16)
    sequences = [[(q * 4).round(), (k[:1] * 4).round().expand_as(k).contiguous(), v]]
    cache = filled_cache(sequences, 1, False, "triton")
    found = select_cached_blocks(last_queries(sequences, 1)[0], cache, top_k=4, impl="triton")
    assert found.flatten().tolist() == [199, 200, 201, 202]


@interpreted
@pytest.mark.parametrize("factor", [300.0, -300.0])
def test_logits_beyond_the_range_of_exp(factor):
    [(q, k, v)] = tokens_of([60], 4, 2, 16)
    check([[q.abs() * factor, k + 1.0, v]], block_size=4, top_k=3, tokens=1, paged=False, tolerance=1e-4)


@interpreted
def test_float16_is_as_near_as_the_reference():
    sequences = tokens_of([90, 41], 8, 2, 32, torch.float16)
    cache = filled_cache(sequences, 4, True, "triton")
    q, _ = last_queries(sequences, 2)
    for mode in ("sparse", "full"):
        found, theirs = (
            decode_attention(q, cache, mode=mode, top_k=30, impl=impl)[0] for impl in ("triton", "reference")
        )
        exact = torch.stack([prefill(s, 2, 4, 30)[1 if mode == "sparse" else 2][0] for s in sequences])
        require_as_near(found, theirs, exact, factor=2.0, name=mode)


@interpreted
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_drafts_may_be_taken_back(impl):
    """Four tokens over a block border, of which one stays: what follows is as if the others had never been there."""
    sequences = tokens_of([30], 4, 2, 16)
    drafts = tokens_of([34], 4, 2, 16, seed=1)
    cache = filled_cache([[x[:17] for x in sequences[0]]], 4, True, impl, spare=17)
    cache.seq_lens.add_(4)
    append_to_cache(cache, *(rows_of(drafts, which, 17, 21) for which in (1, 2)), impl=impl)
    cache.seq_lens.sub_(4)
    cache.seq_lens.add_(13)
    append_to_cache(cache, *(rows_of(sequences, which, 17, 30) for which in (1, 2)), impl=impl)
    expected = filled_cache(sequences, 4, False, impl, spare=4)
    pages = cache.page_table[0, :7].long()
    assert torch.equal(cache.means[pages], expected.means[0, :7])
    assert torch.equal(cache.k[pages].flatten(0, 1), expected.k[0, :28])


@interpreted
def test_appending_touches_nothing_else():
    """Sequences get 0, 1 and 3 of 3 tokens; every other key, value and mean keeps its bits."""
    sequences = tokens_of([9, 8, 7], 4, 2, 16)
    fresh = tokens_of([3, 3, 3], 4, 2, 16, seed=1)
    results = {}
    for impl in ("triton", "reference"):
        cache = filled_cache(sequences, 4, True, "reference")
        new = torch.tensor([0, 1, 3], dtype=torch.int32)
        cache.seq_lens.add_(new)
        append_to_cache(cache, *(rows_of(fresh, which, 0, 3) for which in (1, 2)), num_new=new, impl=impl)
        results[impl] = [x.clone() for x in (cache.k, cache.v)] + [cache.means]
    for ours, theirs in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, equal_nan=True)
    k, v, _ = results["triton"]
    assert not torch.isnan(k[cache.page_table[2, 2]][1]).any()  # token 9 of the third sequence
    assert torch.isnan(k[cache.page_table[0, 2]][1:]).all() and torch.isnan(v[cache.page_table[0, 2]][1:]).all()


@interpreted
def test_result_does_not_depend_on_the_batch_or_the_plan():
    sequences = tokens_of(MIXED, 4, 2, 16)
    cache = filled_cache(sequences, 4, False, "triton")
    q, new = last_queries(sequences, 1)
    alone = filled_cache(sequences[:1], 4, False, "triton")
    for mode in ("sparse", "full"):
        both = decode_attention(q, cache, mode=mode, top_k=3, num_new=new, impl="triton")[0]
        one = decode_attention(q[:1], alone, mode=mode, top_k=3, impl="triton")[0]
        bounded = decode_attention(
            q[:1], replace(alone, max_length=37), mode=mode, top_k=3, return_lse=True, impl="triton"
        )[0]
        assert torch.equal(both[:1], one) and torch.equal(bounded, one)


def test_wrong_arguments_are_refused():
    sequences = tokens_of([9, 4], 4, 2, 16)
    cache = filled_cache(sequences, 4, True)
    q, new = last_queries(sequences, 2)

    def refuses(message, call, *args, **named):
        with pytest.raises(ValueError, match=message):
            call(*args, **named)

    refuses("mode='both' must be one of sparse, full; try sparse", decode_attention, q, cache, mode="both")
    refuses(
        "at most 8; try select_blocks and sparse_attention", decode_attention, q.repeat(1, 5, 1, 1), cache, num_new=new
    )
    refuses("must be \\[B, T, heads, D\\].* with the cache's B=2", decode_attention, q[:1], cache)
    refuses("H a multiple of its G=2", decode_attention, q[:, :, :3], cache)
    refuses("q of torch.float64 must have cache's dtype", decode_attention, q.double(), cache)
    refuses("top_k=0 must be an int of at least 1", decode_attention, q, cache, top_k=0)
    refuses("must be int32 \\[2\\], tokens per sequence", decode_attention, q, cache, num_new=torch.tensor([1, 1]))
    refuses(
        "num_new=\\[2, 5\\].* must lie in \\[0, 2\\]", decode_attention, q, cache, num_new=torch.tensor([2, 5]).int()
    )
    refuses("must be a KeyValueCache by build_cache, got list", decode_attention, q, [cache])
    refuses("the cache's G and D \\(2, 16\\)", append_to_cache, cache, q, q)
    refuses(
        "seq_lens=\\[99, 4\\].* the capacity", decode_attention, q, replace(cache, seq_lens=torch.tensor([99, 4]).int())
    )
    refuses("\\[0, 8\\], max_length", decode_attention, q, replace(cache, max_length=8))
    refuses("max_length=0 must be an int", replace, cache, max_length=0)
    refuses("must hold pages in", decode_attention, q, replace(cache, page_table=cache.page_table + 90))
    refuses("must be contiguous: \\[B, R \\* K, G, D\\] twice", replace, cache, means=cache.means[:1])
    refuses("seq_lens of shape .* must be int32", replace, cache, seq_lens=cache.seq_lens.long())
    refuses("num_pages=0 must be an int", build_cache, (1, 4, 1, 8), block_size=4, dtype=torch.float32, num_pages=0)
    refuses("block_size=0 must be an int", build_cache, (1, 4, 1, 8), block_size=0, dtype=torch.float32)
    refuses("must be bfloat16", build_cache, (1, 4, 1, 8), block_size=4, dtype=torch.int32)
    if triton.knobs.runtime.interpret:
        compat = {"score": "official_compat", "top_k": 3, "impl": "triton"}
        refuses("has no decoding kernel; try impl='reference'", decode_attention, q, cache, **compat)
        refuses("top_k=200 must be at most 128", select_cached_blocks, q, cache, top_k=200, impl="triton")
        exact = filled_cache(tokens_of([9, 4], 4, 2, 16, torch.float64), 4, True)
        refuses("so they do not take float64", decode_attention, q.double(), exact, impl="triton")


def test_bytes_are_those_of_the_keys_that_must_be_read():
    """Two kv heads of 16 bf16 values: 64 bytes per key, value or mean. Blocks of 4."""
    cache = build_cache((2, 40, 2, 16), block_size=4, dtype=torch.bfloat16)
    q = torch.zeros(2, 1, 4, 16, dtype=torch.bfloat16)
    queries = 2 * 2 * 4 * 16 * 2
    assert decode_bytes(q, cache, [30, 5], top_k=None) == queries + 2 * 64 * (30 + 5)
    # 30 tokens: own block 7 has 2 keys, two more blocks of 4, and 7 means; 5 tokens: 2 blocks, all chosen
    assert decode_bytes(q, cache, [30, 5], top_k=3) == queries + 2 * 64 * (2 + 8) + 7 * 64 + 2 * 64 * 5
    paged = build_cache((2, 40, 2, 16), block_size=4, dtype=torch.bfloat16, num_pages=20)
    more = decode_bytes(q, paged, [30, 5], top_k=3) - decode_bytes(q, cache, [30, 5], top_k=3)
    assert more == 4 * (7 + 3 + 2)
    with pytest.raises(ValueError, match="lengths of 1 sequences"):
        decode_bytes(q, cache, [30], top_k=None)


def test_a_cache_knows_its_sizes():
    cache = build_cache((2, 37, 2, 16), block_size=16, dtype=torch.float32)
    assert (cache.block_size, cache.blocks_per_sequence, cache.capacity, cache.num_pages) == (16, 3, 48, 6)
    assert replace(cache, max_length=20).longest == 20
    assert isinstance(cache, KeyValueCache) and cache.pages()[0].data_ptr() == cache.k.data_ptr()
