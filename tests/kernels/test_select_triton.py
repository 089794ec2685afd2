"""The selection kernels in Triton's interpreter, small: a few queries of each case, against the reference and the oracle.

The interpreter takes some 50 ms a query, so queries are sliced out of longer rows. float32 throughout: its bfloat16 product is wrong.
"""

import pytest
import torch

from ssa_kernels import build_layout, query_slice, query_spans, select_blocks
from ssa_kernels.select import reference
from support import oracle

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1 before Triton is imported"
)


def make(tokens, heads=4, kv_heads=2, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, h, dim, generator=generator) for h in (heads, kv_heads)]


def both(q, k, cu_seqlens, block_size, top_k, queries, score="softmax_sum"):
    """Returns the kernels' and the reference's choice for some of the queries."""
    layout = build_layout(torch.tensor(cu_seqlens), num_tokens=k.shape[0], block_size=block_size)
    part = query_slice(layout, torch.tensor(queries))
    arguments = {"block_size": block_size, "top_k": top_k, "cu_seqlens": part, "score": score}
    return [select_blocks(q[queries], k, impl=impl, **arguments) for impl in ("triton", "reference")]


@pytest.mark.parametrize("score", ["softmax_sum", "per_head"])
def test_ragged_documents(score):
    bounds = [0, 1, 16, 16, 33, 70]
    q, k = make(80)
    ours, theirs = both(q, k, bounds, 4, 4, [0, 1, 15, 16, 17, 31, 32, 33, 34, 50, 60, 69, 70, 79], score)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size", "top_k"),
    [
        (1, 1, 16, 4, 3),
        (2, 1, 16, 4, 5),
        (3, 1, 24, 5, 3),
        (8, 1, 16, 4, 3),
        (32, 2, 16, 4, 3),
        (32, 1, 16, 4, 1),
        (8, 1, 256, 4, 3),
    ],
)
def test_group_sizes_and_head_dims(heads, kv_heads, dim, block_size, top_k):
    q, k = make(70, heads, kv_heads, dim)
    ours, theirs = both(q, k, [0, 70], block_size, top_k, [3, 20, 44, 69])
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("top_k", "bins"), [(3, False), (40, False), (3, True)])
def test_rows_longer_than_a_pass(monkeypatch, top_k, bins):
    """1,300 candidates: two passes of 1,024, and more survivors than fit 32. Blocks of one key are their own means.

    The bins of top-k's threshold come from a pass over the row, or, as with rows of 64k and more, from the importance kernel.
    """
    from ssa_kernels.select import launch
    from ssa_kernels.select.launch import choose_blocks_triton

    monkeypatch.setattr(launch, "BINS_FROM_SLICES", 1 if bins else 100)
    q, k = make(1400, 2, 1)
    queries = torch.tensor([1024, 1399])
    layout = query_slice(build_layout(torch.tensor([0, 1400]), num_tokens=1400, block_size=1), queries)
    arguments = {"layout": layout, "top_k": top_k, "scale": 0.25, "score": "softmax_sum"}
    ours = choose_blocks_triton(q[queries], k, **arguments)
    assert torch.equal(ours, reference.choose_blocks(q[queries], k, **arguments))


def test_ties_go_to_the_more_recent_block():
    """All candidates tie, more than the scratch row can hold, which takes the slow path. Small integers keep the interpreter's products exact."""
    q, k = make(64, 2, 1)
    q, k = (q * 4).round(), (k[:1] * 4).round().expand_as(k).contiguous()
    ours, theirs = both(q, k, [0, 64], 1, 4, [40, 63])
    assert torch.equal(ours, theirs)
    assert ours[1, 0].tolist() == [60, 61, 62, 63]


def test_official_rule():
    """Tokens at the end of a block and within one, of documents that end with a complete block and without."""
    q, k = make(48, 2, 1)
    ours, theirs = both(q, k, [0, 48], 4, 4, [10, 47], "official_compat")
    assert torch.equal(ours, theirs)
    q, k = make(84, 4, 2, seed=1)
    queries = [7, 19, 22, 23, 39, 62, 63, 64, 79, 82, 83]
    ours, theirs = both(q * 3, k, [0, 24, 64, 84], 4, 2, queries, "official_compat")
    assert torch.equal(ours, theirs)


def test_official_softmax_counts_the_own_block_once_it_is_complete():
    """Two heads disagree about blocks 0 and 1 of the second document; at the last token of block 2 one of them looks at its own block."""
    q, k = torch.zeros(34, 2, 16), torch.zeros(34, 1, 16)
    k[22:26, 0, 0], k[26:30, 0, 1], k[30:, 0, 2] = 1.0, 1.0, 1.0
    q[:, 0, 0], q[:, 1, 1], q[:, 1, 2] = 4.0, 6.0, 16.0
    ours, theirs = both(q, k, [0, 22, 34], 4, 2, [31, 32, 33], "official_compat")
    assert torch.equal(ours, theirs)
    assert ours[:, 0].tolist() == [[1, 2], [1, 2], [0, 2]]


@pytest.mark.parametrize("factor", [300.0, -300.0])
def test_logits_beyond_the_range_of_exp(factor):
    q, k = make(60)
    k = k + 1.0
    ours, _ = both(q.abs() * factor, k, [0, 60], 4, 3, [30, 59])
    found = torch.full((60, 2, 3), -1, dtype=torch.int32)
    found[[30, 59]] = ours
    expected = oracle.select(q.abs() * factor, k, [0, 60], 4, 3, 16**-0.5)
    assert torch.equal(found[[30, 59]], expected[[30, 59]])


def test_result_does_not_depend_on_token_chunks(monkeypatch):
    q, k = make(90, 32, 1)
    whole, theirs = both(q, k, [0, 20, 90], 4, 3, list(range(0, 90, 7)))
    monkeypatch.setattr("ssa_kernels.select.launch.WORKSPACE_BYTES", 4 * (512 + 32) * 4)
    chunked, _ = both(q, k, [0, 20, 90], 4, 3, list(range(0, 90, 7)))
    assert torch.equal(whole, theirs) and torch.equal(chunked, whole)


@pytest.mark.parametrize("share", [2, 4])
def test_exponentials_by_polynomial(monkeypatch, share):
    monkeypatch.setattr("ssa_kernels.select.launch.FMA_SHARE", share)
    q, k = make(300, 8, 1)
    ours, _ = both(q, k, [0, 300], 1, 5, [250])
    layout = query_slice(build_layout(torch.tensor([0, 300]), num_tokens=300, block_size=1), torch.tensor([250]))
    exact = reference.choose_blocks(
        q[250:251].double(), k.double(), layout=layout, top_k=5, scale=0.25, score="softmax_sum"
    )
    assert torch.equal(ours, exact)


def test_nan_in_other_documents():
    q, k = make(60)
    q2, k2 = q.clone(), k.clone()
    q2[40:], k2[40:] = float("nan"), float("nan")
    base, _ = both(q, k, [0, 40, 60], 4, 3, [20, 39])
    with_nan, _ = both(q2, k2, [0, 40, 60], 4, 3, [20, 39])
    assert torch.equal(base, with_nan)


def test_decoding_from_cached_means_equals_prefill():
    from ssa_kernels.select.launch import block_means, choose_blocks_triton

    q, k = make(40)
    prefill, _ = both(q, k, [0, 40], 4, 3, [21, 39])
    for row, position in enumerate((21, 39)):
        layout = build_layout(torch.tensor([0, position + 1]), num_tokens=position + 1, block_size=4)
        means = block_means(k[: position + 1], layout)
        step = choose_blocks_triton(
            q[position : position + 1],
            means,
            layout=query_slice(layout, slice(position, position + 1)),
            top_k=3,
            scale=0.25,
            score="softmax_sum",
        )
        assert torch.equal(step[0], prefill[row])


def test_queries_far_apart():
    """Queries given by number: a tile visits all block rows between their documents."""
    tokens, queries = 1400, torch.tensor([2, 3, 1396, 1399])
    layout = build_layout(torch.arange(0, tokens + 1, 4), num_tokens=tokens, block_size=1, max_length=4)
    q, k = make(tokens, 2, 1)
    arguments = {"block_size": 1, "top_k": 2, "cu_seqlens": query_slice(layout, queries)}
    ours, theirs = (select_blocks(q[queries], k, impl=impl, **arguments) for impl in ("triton", "reference"))
    assert torch.equal(ours, theirs)


def test_query_spans_far_apart():
    """A tile of queries from both spans would visit all block rows between their documents, more than its program has slices for."""
    tokens, spans = 1400, [(2, 2), (1396, 4)]
    layout = build_layout(torch.arange(0, tokens + 1, 4), num_tokens=tokens, block_size=1, max_length=4)
    q, k = make(tokens, 2, 1)
    part = query_spans(layout, spans)
    queries = torch.cat([torch.arange(first, first + length) for first, length in spans])
    arguments = {"block_size": 1, "top_k": 2, "cu_seqlens": part}
    ours, theirs = (select_blocks(q[queries], k, impl=impl, **arguments) for impl in ("triton", "reference"))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("score", "block_size", "top_k", "width"),
    [("softmax_sum", 1, 5, 512), ("per_head", 1, 5, 128), ("official_compat", 4, 3, 128)],
)
@pytest.mark.parametrize("together", [True, False])
def test_longer_documents_than_expected(monkeypatch, score, block_size, top_k, width, together):
    """The choice does not depend on the documents that a call expects, and the longest one reaches the next call.

    Short passes of top-k make a short document longer than the one pass that is expected.
    """
    from ssa_kernels.select import launch
    from ssa_kernels.select.long_documents import LongestSeen

    monkeypatch.setattr(launch, "TOP_K_WIDTH", width)
    end = 20 + width + 28
    bounds = [block_size * x for x in (0, 3, 20, end)]
    tokens = (end + 16) * block_size
    layout = build_layout(torch.tensor(bounds), num_tokens=tokens, block_size=block_size)
    q, k = make(tokens, 32 if score == "softmax_sum" else 8, 1)
    near = slice((end - 4) * block_size, (end - 4) * block_size + 6, 1)
    numbers = torch.tensor([5, 19, 80, 19 + width, 20 + width, end - 1, end, end + 15]) * block_size
    queries = near if together else numbers
    arguments = {"block_size": block_size, "top_k": top_k, "cu_seqlens": query_slice(layout, queries), "score": score}
    seen = LongestSeen(torch.device("cpu"))
    monkeypatch.setattr(launch, "longest_seen", lambda *_: seen)
    unknown = select_blocks(q[queries], k, impl="triton", **arguments)
    position = int(arguments["cu_seqlens"].query_position.max())
    assert seen.tokens == position + 1 > width * block_size
    for expected in (seen.tokens, 100):
        seen.on_host.fill_(expected)
        assert torch.equal(select_blocks(q[queries], k, impl="triton", **arguments), unknown)
    assert torch.equal(unknown, select_blocks(q[queries], k, impl="reference", **arguments))


def test_what_was_seen_reaches_the_host_in_any_mode(monkeypatch):
    """Also if the host's value is behind the device's, as after two programs that stored in the wrong order."""
    from ssa_kernels.select import launch
    from ssa_kernels.select.long_documents import LongestSeen

    with torch.inference_mode():
        seen = LongestSeen(torch.device("cpu"))
    assert seen.tokens == 0
    monkeypatch.setattr(launch, "longest_seen", lambda *_: seen)
    monkeypatch.setattr(launch, "TOP_K_WIDTH", 128)
    layout = build_layout(torch.tensor([0, 16, 140]), num_tokens=140, block_size=1)
    q, k = make(140, 8, 1)
    first = slice(0, 32, 1)
    arguments = {"block_size": 1, "top_k": 4, "cu_seqlens": query_slice(layout, first)}
    for mode in (torch.inference_mode(), torch.no_grad(), torch.enable_grad()):
        seen.on_host.zero_()
        with mode:
            select_blocks(q[first], k, impl="triton", **arguments)
        assert seen.tokens == 16


def test_a_layout_with_a_bound_expects_nothing(monkeypatch):
    from ssa_kernels.select import launch

    layouts = [
        build_layout(torch.tensor([0, 700]), num_tokens=700, block_size=1),
        build_layout(torch.tensor([0, 500, 700]), num_tokens=700, block_size=1, max_length=600),
        build_layout(torch.tensor([0, 500, 700]), num_tokens=700, block_size=2),  # one pass of top-k holds any document
    ]
    assert [launch._longest_seen(layout, 4) for layout in layouts] == [None, None, None]
    unknown = build_layout(torch.tensor([0, 500, 700]), num_tokens=700, block_size=1)
    assert launch._longest_seen(unknown, 1) is None and launch._longest_seen(unknown, 4) is not None
