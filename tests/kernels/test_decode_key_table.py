"""Decoding over keys that another library wrote: a key table says where each token's key lies, with padding before and between."""

from dataclasses import replace

import pytest
import torch

from ssa_kernels import (
    KeyValueCache,
    append_to_cache,
    build_cache,
    decode_attention,
    decode_bytes,
    select_cached_blocks,
    update_block_means,
)

triton = pytest.importorskip("triton")
IMPLS = ["reference"] + ["triton"] * bool(triton.knobs.runtime.interpret)
SIZE, ROOM, HEADS, KV_HEADS, DIM = 4, 61, 4, 2, 16
LENGTHS = [41, 1, 0, 23]


def draw_cache(dtype: torch.dtype = torch.float32) -> tuple[KeyValueCache, KeyValueCache, torch.Tensor]:
    """Returns the same sequences in a contiguous cache and in one with a key table, whose other rows are NaN, and a query of each."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(len(LENGTHS), n, h, DIM, generator=generator, dtype=dtype) for n, h in
               ((1, HEADS), (44, KV_HEADS), (44, KV_HEADS)))  # fmt: skip
    plain = build_cache((len(LENGTHS), 44, KV_HEADS, DIM), block_size=SIZE, dtype=dtype)
    plain.seq_lens.copy_(torch.tensor(LENGTHS))
    append_to_cache(plain, k, v, num_new=plain.seq_lens, impl="reference")
    table = torch.full((len(LENGTHS), plain.capacity), -7, dtype=torch.int32)  # never read beyond a length
    scattered = [torch.full((len(LENGTHS), ROOM, KV_HEADS, DIM), float("nan"), dtype=dtype) for _ in range(2)]
    for b, length in enumerate(LENGTHS):
        place = torch.randperm(ROOM, generator=generator)[:length].sort().values
        table[b, :length] = place
        for to, source in zip(scattered, (k, v), strict=True):
            to[b, place] = source[b, :length]
    return plain, KeyValueCache(*scattered, plain.means, plain.seq_lens, key_table=table), q


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", ["sparse", "full"])
def test_scattered_keys_give_the_same_bits(mode, impl):
    plain, scattered, q = draw_cache()
    new = (plain.seq_lens > 0).int()
    for score in ("softmax_sum", "per_head"):
        common = {"mode": mode, "top_k": 3, "score": score, "return_lse": True, "num_new": new, "impl": impl}
        wanted, found = (decode_attention(q, cache, **common) for cache in (plain, scattered))
        for ours, theirs in zip(found, wanted, strict=True):
            assert torch.equal(ours, theirs)
        assert (found[0][2] == 0).all() and found[0][[0, 1, 3]].abs().min() > 0
    chosen = [select_cached_blocks(q, c, top_k=3, num_new=new, impl=impl) for c in (plain, scattered)]
    assert torch.equal(*chosen)


@pytest.mark.parametrize("impl", IMPLS)
def test_kv_heads_may_be_sequences_of_their_own(impl):
    """Keys [B, G, S, D], as transformers caches them, are B * G sequences of one kv head."""
    plain, scattered, q = draw_cache()
    by_head = [x.transpose(1, 2).flatten(0, 1).unsqueeze(2).contiguous() for x in (scattered.k, scattered.v)]
    means = scattered.means.transpose(1, 2).flatten(0, 1).unsqueeze(2).contiguous()
    lengths, table = (x.repeat_interleave(KV_HEADS, 0) for x in (plain.seq_lens, scattered.key_table))
    cache = KeyValueCache(*by_head, means, lengths, key_table=table)
    per_head = q.view(len(LENGTHS) * KV_HEADS, 1, HEADS // KV_HEADS, DIM)
    for mode in ("sparse", "full"):
        wanted = decode_attention(q, plain, mode=mode, top_k=3, num_new=(plain.seq_lens > 0).int(), impl=impl)[0]
        found = decode_attention(per_head, cache, mode=mode, top_k=3, num_new=(lengths > 0).int(), impl=impl)[0]
        torch.testing.assert_close(found.view_as(wanted), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_means_of_keys_that_the_owner_wrote_are_those_of_appended_ones(impl):
    plain, scattered, _ = draw_cache()
    page_table = torch.arange(plain.num_pages, dtype=torch.int32).view(len(LENGTHS), -1)
    paged = KeyValueCache(*plain.pages(), plain.seq_lens, page_table=page_table)
    new = torch.tensor([7, 1, 0, 3], dtype=torch.int32)
    for cache in (plain, scattered, paged):
        cache = replace(cache, means=torch.full_like(cache.means, float("nan")))
        update_block_means(cache, num_tokens=9, num_new=new, impl=impl)
        means = cache.means.view_as(plain.means)
        for b, (length, count) in enumerate(zip(LENGTHS, new.tolist(), strict=True)):
            written = slice((length - count) // SIZE, length // SIZE)
            assert torch.equal(means[b, written], plain.means[b, written])
            assert torch.isnan(means[b]).flatten(1).all(1).sum() == len(means[b]) - (written.stop - written.start)
    with pytest.raises(ValueError, match="num_tokens=0 must be an int of at least 1"):
        update_block_means(plain, num_tokens=0)


def test_wrong_key_tables_are_refused():
    plain, scattered, q = draw_cache()
    with pytest.raises(ValueError, match="append_to_cache takes no cache with a key_table; write keys and values"):
        append_to_cache(scattered, scattered.k[:, :1], scattered.v[:, :1], num_new=(plain.seq_lens > 0).int())
    for table, message in (
        (scattered.key_table[:, :-1], "must be contiguous"),
        (scattered.key_table.long(), "key_table of shape .* must be int32"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(scattered, key_table=table.contiguous())
    with pytest.raises(ValueError, match="page_table and key_table of a cache exclude each other"):
        replace(scattered, page_table=scattered.key_table)
    outside = scattered.key_table.clone()
    outside[0, 3] = ROOM
    with pytest.raises(ValueError, match="key_table must hold rows of k in \\[0, 61\\)"):
        decode_attention(q, replace(scattered, key_table=outside), num_new=(plain.seq_lens > 0).int())


def test_bytes_count_the_table():
    plain, scattered, q = draw_cache()
    for top_k, keys in ((None, 65), (2, (4 + 1) + 1 + (4 + 3))):  # own blocks hold 1, 1 and 3 keys
        more = decode_bytes(q, scattered, LENGTHS, top_k=top_k) - decode_bytes(q, plain, LENGTHS, top_k=top_k)
        assert more == 4 * keys
