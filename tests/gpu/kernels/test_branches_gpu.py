"""NSA's branches on a GPU: bf16 against float64, spans, no waiting, repeated calls, long rows, the layer's parts at the 1B model's size."""

import pytest
import torch

from ssa_kernels import (
    build_layout,
    compressed_attention,
    gated_sum,
    query_spans,
    select_blocks,
    window_attention,
)
from ssa_kernels.select.reference import mean_of_blocks
from support.errors import relative, require_as_near
from support.rounded_attention import rounded_attention

pytestmark = pytest.mark.gpu

RAGGED = (1, 15, 16, 17, 0, 100, 300, 3, 700)
BLOCK, WINDOW = 16, 128


def cumulative(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")


def draw(tokens, heads, kv_heads, head_dim, dtype=torch.bfloat16):
    shapes = [(tokens, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]


def operator(name, layout, impl=None):
    if name == "window":
        return lambda *qkv: window_attention(*qkv, window=WINDOW, cu_seqlens=layout, impl=impl)
    return lambda *qkv: compressed_attention(*qkv, block_size=BLOCK, cu_seqlens=layout, impl=impl)


def results(attend, q, k, v, do):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o, lse = attend(*leaves)
    return [o.detach(), lse, *torch.autograd.grad(o, leaves, do.to(o.dtype))]


def rounded_results(name, layout, q, k, v, do):
    """Returns o, dq, dk, dv of the definition, rounded where a fused kernel must."""
    place, scale = layout.query_position[:, None], q.shape[-1] ** -0.5
    if name == "window":
        key = torch.arange(len(k), device="cuda") - layout.query_start[:, None]
        seen = (key >= 0) & (key <= place) & (key > place - WINDOW)
        o, dq, *sums = rounded_attention(q, k, v, do, seen, scale)
    else:
        block = torch.arange(layout.num_block_rows, device="cuda") - layout.query_first_block_row[:, None]
        seen = (block >= 0) & (block < (place + 1) // BLOCK)
        means = (mean_of_blocks(x, layout) for x in (k, v))
        o, dq, *sums = rounded_attention(q, *means, do, seen, scale)
        own = layout.query_first_block_row + layout.query_position // BLOCK
        sums = [(x / layout.block_length[:, None, None])[own] for x in sums]
    return o, dq, *(x.to(k.dtype) for x in sums)


@pytest.mark.parametrize("name", ["window", "compressed"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dtype"),
    [
        (32, 2, 64, torch.bfloat16),
        (32, 1, 64, torch.bfloat16),
        (4, 4, 64, torch.float16),
        (12, 4, 80, torch.bfloat16),
        (32, 8, 128, torch.bfloat16),
        (6, 2, 128, torch.float32),
    ],
)
def test_values_and_gradients_against_float64(name, heads, kv_heads, head_dim, dtype):
    """At most 1.1 times as far from float64 as the definition with the roundings that every fused kernel in 16 bits needs; float32 to its sums."""
    layout = build_layout(cumulative(RAGGED), num_tokens=sum(RAGGED) + 5, block_size=BLOCK)
    inputs = draw(sum(RAGGED) + 5, heads, kv_heads, head_dim, dtype)
    o, lse, *grads = results(operator(name, layout), *inputs)
    exact_o, exact_lse, *exact = results(operator(name, layout, "reference"), *(x.double() for x in inputs))
    seen = exact_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    torch.testing.assert_close(lse[seen].double(), exact_lse[seen], rtol=0.0, atol=2e-2)
    baseline = rounded_results(name, layout, *inputs)
    names = ("o", "dq", "dk", "dv")
    for label, got, low, right in zip(names, (o, *grads), baseline, (exact_o, *exact), strict=True):
        if dtype == torch.float32:
            assert relative(got, right) < 1e-5, label
        else:
            require_as_near(got, low, right, factor=1.1, name=label)


@pytest.mark.parametrize("name", ["window", "compressed"])
def test_spans_of_queries_get_what_all_get(name):
    """As context parallelism asks for: two chunks of a row."""
    tokens = 4096
    layout = build_layout(cumulative((1000, 3096)), num_tokens=tokens, block_size=BLOCK)
    q, k, v, do = draw(tokens, 32, 2, 64)
    whole = results(operator(name, layout), q, k, v, do)
    dk = dv = 0.0
    for spans in ([(0, 1024), (3072, 1024)], [(1024, 2048)]):
        chosen = torch.cat([torch.arange(first, first + length, device="cuda") for first, length in spans])
        found = results(operator(name, query_spans(layout, spans)), q[chosen], k, v, do[chosen])
        for got, wanted in zip(found[:3], whole[:3], strict=True):
            torch.testing.assert_close(got, wanted[chosen], rtol=2e-2, atol=2e-2)
        dk, dv = dk + found[3].double(), dv + found[4].double()
    assert relative(dk, whole[3]) < 6e-3
    assert relative(dv, whole[4]) < 6e-3


@pytest.mark.parametrize("name", ["window", "compressed"])
def test_repeated_calls_are_bit_identical_and_do_not_wait(name):
    layout = build_layout(cumulative((8192, 3000, 5192)), num_tokens=16384, block_size=BLOCK, max_length=8192)
    inputs = draw(16384, 32, 2, 64)
    first = results(operator(name, layout), *inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [results(operator(name, layout), *inputs) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for other in again:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_long_row_against_the_reference():
    """One document of 32k: 2,048 block rows, the queries of each tile of them cut into parts."""
    tokens = 32768
    layout = build_layout(cumulative((tokens,)), num_tokens=tokens, block_size=BLOCK, max_length=tokens)
    q, k, v, do = draw(tokens, 4, 1, 64)
    for name in ("window", "compressed"):
        found = results(operator(name, layout), q, k, v, do)
        wanted = results(operator(name, layout, "reference"), *(x.float() for x in (q, k, v, do)))
        for label, got, right in zip(("o", "", "dq", "dk", "dv"), found, wanted, strict=True):
            if label:
                assert relative(got, right) < 1e-2, (name, label)


@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(1, 1, 64), (1000, 3, 64), (777, 32, 80), (4096, 32, 128)])
def test_gated_sum_against_float64(tokens, heads, head_dim):
    branches = [torch.randn(tokens, heads, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    logits = torch.randn(tokens, heads, 3, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn_like(branches[0])

    def run(impl, dtype):
        leaves = [x.to(dtype).detach().requires_grad_() for x in (*branches, logits)]
        out = gated_sum(leaves[:3], leaves[3], impl=impl)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    for got, right in zip(run(None, torch.bfloat16), run("reference", torch.float64), strict=True):
        require_as_near(got, right.bfloat16(), right, factor=1.2, floor=2**-9)


@pytest.mark.parametrize("length", [700, 9000])
def test_blocks_are_scored_by_the_compressed_branch(length):
    """As the reference scores them, but for near ties; also where top-k uses bins, and without a bound on the documents."""
    layout = build_layout(cumulative((length, 33)), num_tokens=length + 33, block_size=BLOCK)
    q, k, _, _ = draw(length + 33, 32, 2, 64)
    found, wanted = (
        select_blocks(q, k, block_size=BLOCK, top_k=8, cu_seqlens=layout, score="compressed", impl=impl)
        for impl in (None, "reference")
    )
    assert (found != wanted).any(-1).double().mean().item() < 2e-3
