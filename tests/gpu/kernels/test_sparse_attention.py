"""Sparse attention's kernels on a GPU, against float64 on the same inputs and against the same mathematics in low precision.

Tolerance: a kernel's error (relative, in the norm, against float64) may be at most twice that of plain PyTorch in the kernel's dtype for
the output and 2.5 times for the gradients. PyTorch rounds the logits and weights to that dtype, the kernels only the weights, so a right
kernel stays well below.
"""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssa_kernels import build_layout, query_slice, sparse_attention
from ssa_kernels.sparse_attention.autograd import sparse_attention_backward, sparse_attention_forward
from support.errors import require_as_near

pytestmark = pytest.mark.gpu

RAGGED = (1, 15, 16, 17, 0, 100, 300, 3, 64)


def cumulative(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")


def random_choices(layout, lists, top_k, seed=0, kind="random"):
    """Returns indices [T, lists, top_k]: the own block and earlier ones, ascending, padded with -1."""
    generator = torch.Generator("cuda").manual_seed(seed)
    own = (layout.query_position // layout.block_size)[:, None, None]
    blocks = max(int(own.max()) + 1, top_k)
    number = torch.arange(blocks, device="cuda")
    score = torch.rand(len(own), lists, blocks, device="cuda", generator=generator)
    if kind == "sink":
        score[..., 0] = 2.0
    if kind == "recent":
        score = score * 0 + number
    score = torch.where(number < own, score, -1.0).masked_fill(number == own, 3.0)
    if kind == "own":
        score = torch.where(number == own, score, -1.0)
    value, chosen = score.topk(top_k, -1)
    chosen = torch.where(value >= 0, chosen, blocks).sort(-1).values
    return torch.where(chosen == blocks, -1, chosen).to(torch.int32).contiguous()


def visible(indices, layout, heads):
    """Returns bool [H, T, T]."""
    tokens = indices.shape[0]
    key = torch.arange(tokens, device="cuda")
    start, position = layout.query_start[:, None], layout.query_position[:, None]
    place = key[None] - start
    causal = (place >= 0) & (place <= position)
    block = place.clamp(min=0) // layout.block_size
    chosen = torch.zeros(tokens, indices.shape[1], int(block.max()) + 2, dtype=torch.bool, device="cuda")
    chosen.scatter_(2, torch.where(indices < 0, chosen.shape[2] - 1, indices).long(), True)
    chosen[..., -1] = False
    mask = torch.gather(chosen, 2, block[:, None].expand(-1, indices.shape[1], -1)) & causal[:, None]
    return mask.permute(1, 0, 2).repeat_interleave(heads // indices.shape[1], 0)


def dense(q, k, v, mask, scale):
    """Returns (o, lse) in the inputs' precision (lse float64); differentiable; queries without a key give o = 0."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
    logits = (q.transpose(0, 1) @ k.transpose(1, 2)).mul(scale).masked_fill(~mask, float("-inf"))
    weights = torch.nan_to_num(logits.softmax(-1))
    return (weights @ v).transpose(0, 1), logits.detach().double().logsumexp(-1).T


def plain_attention(q, k, v, do, mask):
    """Returns o, lse, dq, dk, dv of plain operations in the inputs' precision."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o, lse = dense(*leaves, mask, q.shape[-1] ** -0.5)
    return [o.detach(), lse, *torch.autograd.grad(o, leaves, do)]


def make(lengths, heads, kv_heads, head_dim, dtype=torch.bfloat16, seed=1, size=1.0):
    generator = torch.Generator("cuda").manual_seed(seed)
    tokens = sum(lengths)
    shapes = [
        (tokens, heads, head_dim),
        (tokens, kv_heads, head_dim),
        (tokens, kv_heads, head_dim),
        (tokens, heads, head_dim),
    ]
    q, k, v, do = (torch.randn(s, device="cuda", generator=generator).to(dtype) for s in shapes)
    return q * size, k, v, do


def run(q, k, v, do, indices, layout, scale=None):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o, lse = sparse_attention(q, k, v, indices, block_size=layout.block_size, cu_seqlens=layout, scale=scale)
    return o.detach(), lse, *torch.autograd.grad(o, (q, k, v), do)


def check(
    lengths, heads, kv_heads, head_dim, block_size, top_k, lists=None, kind="random", dtype=torch.bfloat16, size=1.0
):
    layout = build_layout(cumulative(lengths), num_tokens=sum(lengths), block_size=block_size)
    q, k, v, do = make(lengths, heads, kv_heads, head_dim, dtype, size=size)
    indices = random_choices(layout, lists or kv_heads, top_k, kind=kind)
    mask = visible(indices, layout, heads)
    ours = run(q, k, v, do, indices, layout)
    exact, plain = (plain_attention(*inputs, mask) for inputs in ([x.double() for x in (q, k, v, do)], (q, k, v, do)))
    for name, got, low, right in zip(("o", "lse", "dq", "dk", "dv"), ours, plain, exact, strict=True):
        if name == "lse":
            torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=2e-5)
        else:
            require_as_near(got, low, right, factor=2.0 if name == "o" else 2.5, floor=1e-6, name=name)


@pytest.mark.parametrize("group", [1, 2, 4, 6, 8, 16, 32])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_heads(group, head_dim):
    check(RAGGED, 2 * group, 2, head_dim, 16, 8)


@pytest.mark.parametrize("top_k", [1, 4, 8, 12, 16, 24, 32, 64])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_choices(top_k, block_size):
    check(RAGGED, 16, 2, 64, block_size, top_k)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"),
    [(8, 2, 64, 16), (6, 2, 128, 64), (4, 4, 80, 32), (8, 1, 256, 16), (32, 2, 256, 128)],
)
def test_heads_choose_independently(heads, kv_heads, head_dim, block_size):
    check(RAGGED, heads, kv_heads, head_dim, block_size, 3, lists=heads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("block_size", [16, 24])
def test_other_dtypes_and_block_sizes(dtype, block_size):
    check(RAGGED, 8, 2, 64, block_size, 4, dtype=dtype)


@pytest.mark.parametrize("kind", ["sink", "recent", "own"])
def test_skewed_choices(kind):
    check((3000,), 16, 1, 64, 16, 16, kind=kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [30.0, 300.0])
def test_large_logits(dtype, size):
    # The reference is the own tile's maximum: at these sizes later logits exceed it by hundreds.
    check((700, 33), 16, 1, 64, 16, 16, dtype=dtype, size=size)


def test_one_logit_far_above_the_rest_of_its_tile():
    layout = build_layout(cumulative((64,)), num_tokens=64, block_size=16)
    q, k, v, do = make((64,), 16, 1, 64)
    q, k = q.abs(), -k.abs()
    k[3] = 40.0  # scale * q . k: far beyond float32's exponent above the others
    indices = random_choices(layout, 1, 4)
    o, lse, *grads = run(q, k, v, do, indices, layout)
    assert bool(torch.isfinite(lse).all())
    torch.testing.assert_close(o[16:].float(), v[3].float().expand_as(o[16:]), rtol=1e-2, atol=1e-2)
    assert all(bool(torch.isfinite(x).all()) for x in grads)


@pytest.mark.parametrize(("heads", "head_dim"), [(16, 64), (32, 64), (4, 128), (8, 256), (16, 256)])
@pytest.mark.parametrize("size", [1.0, 6.0])
def test_dq_beside_torchs_attention(heads, head_dim, size):
    """dQ is at most 1.15 times as far from float64 as that of torch's fused bf16 attention with the same mask.

    With the keys of one block six times as large, that block holds most of a query's weight whenever it was chosen.
    """
    layout = build_layout(cumulative((1024,)), num_tokens=1024, block_size=16)
    q, k, v, do = make((1024,), heads, 1, head_dim)
    k[32:48] *= size
    indices = random_choices(layout, 1, 16)
    mask = visible(indices, layout, heads)
    ours = run(q, k, v, do, indices, layout)[2]
    exact = plain_attention(*(x.double() for x in (q, k, v, do)), mask)[2]
    parts = [x.transpose(0, 1).expand(heads, -1, -1)[None].contiguous() for x in (q, k, v)]
    parts[0].requires_grad_()
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        o = torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask[None])
    (theirs,) = torch.autograd.grad(o, parts[0], do.transpose(0, 1)[None])
    require_as_near(ours, theirs[0].transpose(0, 1), exact, factor=1.15, name="dq")


def test_choosing_all_blocks_equals_full_attention():
    lengths = (200, 56)
    layout = build_layout(cumulative(lengths), num_tokens=256, block_size=16)
    q, k, v, do = make(lengths, 16, 2, 64)
    indices = random_choices(layout, 2, 16)
    o = run(q, k, v, do, indices, layout)[0]
    parts = [x.transpose(1, 2) for x in (q[None, :200], k[None, :200], v[None, :200])]
    full = torch.nn.functional.scaled_dot_product_attention(
        *(x.double() for x in parts), is_causal=True, enable_gqa=True
    )
    plain = plain_attention(q, k, v, do, visible(indices, layout, 16))[0]
    require_as_near(o[:200], plain[:200], full[0].transpose(0, 1), factor=2.0)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_queries_without_any_block(head_dim):
    layout = build_layout(cumulative((80,)), num_tokens=80, block_size=16)
    q, k, v, do = make((80,), 16, 2, head_dim)
    indices = random_choices(layout, 2, 4)
    indices[10:20] = -1
    indices[30, 1] = -1
    o, lse, dq, dk, dv = run(q, k, v, do, indices, layout)
    assert bool((o[10:20] == 0).all()) and bool((o[30, 8:] == 0).all()) and bool((dq[10:20] == 0).all())
    assert bool((lse[10:20] == float("-inf")).all()) and bool(torch.isfinite(lse[:10]).all())
    assert all(bool(torch.isfinite(x).all()) for x in (dq, dk, dv))


def test_documents_are_isolated():
    lengths = (37, 500, 1, 230)
    layout = build_layout(cumulative(lengths), num_tokens=768, block_size=16)
    q, k, v, do = make(lengths, 32, 2, 64)
    indices = random_choices(layout, 2, 16)
    whole = run(q, k, v, do, indices, layout)
    second = slice(37, 537)
    alone_layout = build_layout(cumulative((500,)), num_tokens=500, block_size=16)
    alone = run(*(x[second].contiguous() for x in (q, k, v, do, indices)), alone_layout)
    for a, b in zip(whole, alone, strict=True):
        assert torch.equal(a[second], b)
    for x in (q, k, v, do):
        x[:37] = float("nan")
        x[537:] = float("nan")
    poisoned = run(q, k, v, do, indices, layout)
    for a, b in zip(poisoned, alone, strict=True):
        assert torch.equal(a[second], b)


@pytest.mark.parametrize("kind", ["random", "sink"])
def test_repeated_calls_are_bit_identical(kind):
    layout = build_layout(cumulative((5000, 3192)), num_tokens=8192, block_size=16)
    q, k, v, do = make((8192,), 32, 2, 64)
    indices = random_choices(layout, 2, 16, kind=kind)
    first = run(q, k, v, do, indices, layout)
    for _ in range(3):
        for a, b in zip(first, run(q, k, v, do, indices, layout), strict=True):
            assert torch.equal(a, b)


def test_subset_of_queries():
    layout = build_layout(cumulative((300, 212)), num_tokens=512, block_size=16)
    q, k, v, do = make((512,), 16, 2, 64)
    indices = random_choices(layout, 2, 8)
    part = torch.cat([torch.arange(64, 128), torch.arange(384, 448)]).cuda()
    whole = run(q, k, v, do, indices, layout)
    ours = run(q[part], k, v, do[part], indices[part].contiguous(), query_slice(layout, part))
    for a, b in zip(whole[:3], ours[:3], strict=True):
        assert torch.equal(a[part], b)
    rest = torch.ones(512, dtype=torch.bool, device="cuda")
    rest[part] = False
    others = rest.nonzero()[:, 0]
    theirs = run(q[others], k, v, do[others], indices[others].contiguous(), query_slice(layout, others))
    exact = plain_attention(*(x.double() for x in (q, k, v, do)), visible(indices, layout, 16))
    for name, a, b, c, right in zip(("dk", "dv"), whole[3:], ours[3:], theirs[3:], exact[3:], strict=True):
        require_as_near(b.float() + c.float(), a, right, factor=2.0, name=name)


def test_precomputed_delta():
    layout = build_layout(cumulative((400,)), num_tokens=400, block_size=16)
    q, k, v, do = make((400,), 16, 1, 64)
    indices = random_choices(layout, 1, 8)
    o, lse = sparse_attention_forward(q, k, v, indices, layout, 0.125)
    own = sparse_attention_backward(q, k, v, indices, o, lse, do, layout, 0.125)
    delta = (o.float() * do.float()).sum(-1)
    given = sparse_attention_backward(q, k, v, indices, None, lse, do, layout, 0.125, delta=delta)
    exact = plain_attention(*(x.double() for x in (q, k, v, do)), visible(indices, layout, 16))
    for a, b, right in zip(own, given, exact[2:], strict=True):
        require_as_near(b, a, right, factor=1.5)


def test_calls_neither_wait_nor_recompile():
    from ssa_kernels.sparse_attention import index
    from ssa_kernels.sparse_attention.tensor_core import backward, forward, wide_heads

    kernels = [
        forward.forward_kernel,
        backward.dq_kernel,
        wide_heads.dkdv_kernel,
        index.segment_kernel,
    ]

    def variants():
        return sum(len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels)

    before = None
    for lengths in [(100, 37), (512,), (1, 1, 1), (1023, 1, 16), (2048,)]:
        cu_seqlens = cumulative(lengths)
        q, k, v, do = make(lengths, 16, 1, 64)
        indices = random_choices(build_layout(cu_seqlens, num_tokens=sum(lengths), block_size=16), 1, 4)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(q, k, v, do, indices, build_layout(cu_seqlens, num_tokens=sum(lengths), block_size=16))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        before = variants() if before is None else before
        assert variants() == before, lengths


def test_tensors_above_2_31_elements():
    tokens, tail = 1_060_000, 700  # q has 2.17e9 elements
    layout = build_layout(cumulative((tokens - tail, tail)), num_tokens=tokens, block_size=16)
    generator = torch.Generator("cuda").manual_seed(0)
    q, do = (torch.randn(tokens, 32, 64, device="cuda", generator=generator, dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(tokens, 2, 64, device="cuda", generator=generator, dtype=torch.bfloat16) for _ in range(2))
    indices = torch.full((tokens, 2, 2), -1, dtype=torch.int32, device="cuda")
    own = (layout.query_position // 16)[:, None]
    indices[:, :, 0] = torch.where(own > 0, own // 2, own)
    indices[:, :, 1] = torch.where(own > 0, own, -1)
    whole = run(q, k, v, do, indices, layout)
    end = slice(tokens - tail, tokens)
    alone_layout = build_layout(cumulative((tail,)), num_tokens=tail, block_size=16)
    alone = run(*(x[end].contiguous() for x in (q, k, v, do, indices)), alone_layout)
    for a, b in zip(whole, alone, strict=True):
        assert torch.equal(a[end], b)
