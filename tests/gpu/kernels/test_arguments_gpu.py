"""Arguments of the public operators on a GPU: views equal contiguous copies, bad arguments are refused, bad values are harmless.

tests/kernels/test_arguments.py is the same on a CPU, for every argument; here are the kernels that exist on a GPU only, with their vector loads,
asynchronous copies and libraries, and the values that nothing looks at there.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ssa_kernels import (
    build_layout,
    full_attention,
    gate,
    gate_and_align,
    linear_cross_entropy,
    qkv_rope,
    query_slice,
    select_blocks,
    sparse_attention,
    ssa_attention,
    swiglu,
)
from ssa_kernels.documents import ARRAYS
from ssa_kernels.full_attention import te
from support.errors import require_as_near

pytestmark = pytest.mark.gpu

T, ENDS = 384, [0, 100, 256, 384]
BLOCKS = {"block_size": 16, "top_k": 4}
ROPE = {"num_kv_heads": 2, "group_size": 16, "head_dim": 64, "num_gates": 16}
DIFFERENTIABLE = {"q", "k", "v", "o", "o_full", "o_sparse", "gate_logits", "x", "mixed", "hidden", "weight"}
BACKENDS = [
    "flash",
    pytest.param("te", marks=pytest.mark.skipif(not te.is_usable(), reason="needs transformer_engine")),
]


def draw(*size, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed + sum(size))
    return torch.randn(*size, generator=generator, device="cuda").bfloat16()


def ends():
    return torch.tensor(ENDS, dtype=torch.int32, device="cuda")


def layout_of(boundaries=None, **options):
    return build_layout(ends() if boundaries is None else boundaries, num_tokens=T, block_size=16, **options)


def streams(heads=32, kv_heads=1, dim=64):
    return {"q": draw(T, heads, dim), "k": draw(T, kv_heads, dim, seed=1), "v": draw(T, kv_heads, dim, seed=2)}


def operators():
    """Returns by name (call, tensors)."""
    found = {}
    # One shape per family of sparse kernels: heads as rows, dK and dV from registers; heads as columns, dK and dV through the ring.
    for heads, kv_heads, dim in ((32, 1, 64), (8, 2, 128)):
        qkv = streams(heads, kv_heads, dim)
        indices = select_blocks(qkv["q"], qkv["k"], **BLOCKS, cu_seqlens=ends())
        found[f"sparse_attention {heads} {kv_heads} {dim}"] = (
            lambda **t: sparse_attention(**t, block_size=16), {**qkv, "indices": indices, "cu_seqlens": ends()},
        )  # fmt: skip
    qkv, main = streams(), torch.tensor([1], dtype=torch.int32, device="cuda")
    logits, positions = draw(T, 32), torch.arange(T, device="cuda") * 5 % 77
    rope = {"mixed": draw(T, 2 * (18 * 64 + 16)), "angles": 9 * draw(77, 64).float(), "positions": positions}
    found["select_blocks"] = (
        lambda **t: select_blocks(**t, **BLOCKS), {"q": qkv["q"], "k": qkv["k"], "cu_seqlens": ends()}
    )  # fmt: skip
    found["gate"] = (gate, {"o": qkv["q"], "gate_logits": logits})
    found["gate_and_align"] = (
        gate_and_align, {"o_full": qkv["q"], "o_sparse": draw(T, 32, 64, seed=3), "gate_logits": logits, "main": main}
    )  # fmt: skip
    found["swiglu"] = (swiglu, {"x": draw(T, 256)})
    found["qkv_rope"] = (lambda **t: qkv_rope(**t, **ROPE), rope)
    return found


def spread(x, dim):
    wide = x.new_zeros([n * 2 if i == dim else n for i, n in enumerate(x.shape)])
    return wide[(slice(None),) * dim + (slice(1, None, 2),)].copy_(x)


def turned(x):
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


VIEWS = {
    "rows apart": lambda x: spread(x, 0),
    "elements apart": lambda x: spread(x, x.dim() - 1),
    "turned": turned,
    "moved": lambda x: x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x),  # no 16-byte load, no 4-byte word
    "part of wider": lambda x: x.new_zeros(*x.shape[:-1], x.shape[-1] + 3)[..., 2:-1].copy_(x),
}


def results(call, tensors, view_grad):
    """Returns outputs and gradients, for incoming gradients with fixed values. `view_grad` makes views of those."""
    leaves = {n: x.detach() for n, x in tensors.items()}
    wanted = [x.requires_grad_() for n, x in leaves.items() if n in DIFFERENTIABLE]
    out = call(**leaves)
    out = [x for x in (out if isinstance(out, tuple) else (out,)) if x is not None]
    through = [x for x in out if x.requires_grad]
    if not through:
        return out
    upstream = [view_grad(torch.sin(x.detach().float() * 99).to(x.dtype)) if x.dim() else x.detach() for x in through]
    return [*(x.detach() for x in out), *torch.autograd.grad(through, wanted, upstream)]


@pytest.fixture(scope="module")
def every():
    return operators()


@pytest.mark.parametrize(
    "name",
    [
        "sparse_attention 32 1 64",
        "sparse_attention 8 2 128",
        "select_blocks",
        "gate",
        "gate_and_align",
        "swiglu",
        "qkv_rope",
    ],
)
def test_views_equal_contiguous_copies_bit_for_bit_without_waiting(every, name):
    call, tensors = every[name]
    wanted = results(call, tensors, torch.Tensor.contiguous)
    for kind, view in VIEWS.items():
        viewed = {n: view(x) for n, x in tensors.items()}
        results(call, viewed, view)  # compiles for other alignments
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = results(call, viewed, view)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
            assert torch.equal(a, b), (kind, i, float((a.float() - b.float()).abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_the_full_stream(backend):
    """The libraries' outputs are the same bits. Their dQ differs from run to run (fused.py), so gradients are compared to bf16's rounding."""

    def call(**t):
        return full_attention(**t, return_lse=True, backend=backend)

    tensors = {**streams(), "cu_seqlens": ends()}
    wanted = results(call, tensors, torch.Tensor.contiguous)
    for kind, view in VIEWS.items():
        found = results(call, {n: view(x) for n, x in tensors.items()}, view)
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1]), kind
        for a, b in zip(found[2:], wanted[2:], strict=True):
            assert float((a - b).float().norm() / b.float().norm()) < 4e-3, kind


@pytest.mark.parametrize("view", VIEWS)
def test_views_of_a_whole_layer(view):
    tensors = {
        **streams(),
        "gate_logits": draw(T, 32),
        "main": torch.tensor([2**32], device="cuda"),
        "cu_seqlens": ends(),
    }

    def call(**t):
        return tuple(ssa_attention(**t, **BLOCKS))

    found, wanted = (results(call, t, g) for t, g in (
        ({n: VIEWS[view](x) for n, x in tensors.items()}, VIEWS[view]), (tensors, torch.Tensor.contiguous)
    ))  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(found[:3], wanted[:3], strict=True))
    for a, b in zip(found[3:], wanted[3:], strict=True):
        assert float((a - b).float().norm() / b.float().norm()) < 4e-3


def test_out_of_range_labels_are_ignored_and_views_of_the_output_layer_are_read():
    hidden, weight = draw(64, 128).requires_grad_(), draw(1000, 128).requires_grad_()
    labels = torch.arange(64, device="cuda") * 15
    ignored = labels.clone()
    ignored[[3, 17, 40, 63]] = -100
    outside = ignored.clone()
    outside[[3, 17, 40, 63]] = torch.tensor([1000, -1, 2**40, -(2**63)], device="cuda")
    wide = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    want = F.cross_entropy(wide[0] @ wide[1].t(), ignored, reduction="none")
    want = (want.detach(), *torch.autograd.grad(want.sum(), wide))
    plain = F.cross_entropy(hidden @ weight.t(), ignored, reduction="none")  # torch's own, in the tensors' dtype
    plain = (plain.detach(), *torch.autograd.grad(plain.sum(), (hidden, weight)))
    for impl in ("triton", "reference"):
        found = []
        for given in (ignored, outside, spread(outside, 0), ignored.int()):
            losses = linear_cross_entropy(hidden, weight, given, impl=impl)
            found.append((losses.detach(), *torch.autograd.grad(losses.sum(), (hidden, weight))))
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
        assert not found[0][0][[3, 17, 40, 63]].any() and not found[0][1][[3, 17, 40, 63]].any()
        for ours, theirs, exact in zip(found[0], plain, want, strict=True):
            require_as_near(ours, theirs, exact, factor=2.0)
    for view in VIEWS.values():  # the library's product may take another kernel for another alignment
        losses = linear_cross_entropy(view(hidden.detach()), view(weight.detach()), ignored)
        torch.testing.assert_close(losses, found[0][0], rtol=1e-2, atol=1e-2)
    buffers = [torch.ones(1000, 256, device="cuda")[:, ::2], torch.ones(1000, 128, device="cuda")]
    for buffer in buffers:
        linear_cross_entropy(hidden, weight, ignored, accumulate_into=buffer).sum().backward()
    assert torch.equal(buffers[0], buffers[1])


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_out_of_range_positions_use_the_nearest_angle(impl):
    mixed, angles = draw(T, 2 * (18 * 64 + 16)), 9 * draw(77, 64).float()
    positions = torch.arange(T, device="cuda") % 77
    wild = positions.clone()
    wild[5], wild[6], wild[7] = -1, 2**40, 77
    inside = wild.clamp(0, 76)
    found, wanted = (qkv_rope(mixed, angles, p, impl=impl, **ROPE) for p in (wild, inside))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_out_of_range_blocks_are_not_read():
    """Blocks past a query's own block are skipped. For any block numbers, other queries' results are unaffected and nothing crashes."""
    t = {n: x.requires_grad_() for n, x in streams().items()}
    indices = select_blocks(t["q"].detach(), t["k"].detach(), **BLOCKS, cu_seqlens=ends())
    wild = indices.clone()
    wild[50:60] = torch.tensor([2**31 - 1, -(2**31), 10**6, 2**27 + 1], dtype=torch.int32, device="cuda")
    for dtype in (torch.bfloat16, torch.float32):  # tensor cores, portable
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in t.values())
        results_of = [sparse_attention(q, k, v, i, block_size=16, cu_seqlens=ends()) for i in (indices, wild)]
        others = torch.ones(T, dtype=torch.bool, device="cuda")
        others[50:60] = False
        assert all(torch.equal(a[others], b[others]) for a, b in zip(*results_of, strict=True))
        grads = torch.autograd.grad(results_of[1][0], (q, k, v), torch.ones_like(q))
        assert torch.isfinite(grads[0][others]).all() and all(torch.isfinite(x[100:]).all() for x in grads[1:])
        torch.cuda.synchronize()


def test_unordered_boundaries_are_sorted():
    for given, wanted in (([5, 200, 100], [0, 200, T]), ([0, -7, 2**40], [0, T]), ([0, 90, 90, 500], [0, 90, T])):
        layout, right = (layout_of(torch.tensor(x, device="cuda")) for x in (given, wanted))
        for name in ("query_start", "query_position"):
            assert torch.equal(getattr(layout, name), getattr(right, name)), (given, name)
        t = streams()
        indices = select_blocks(t["q"], t["k"], **BLOCKS, cu_seqlens=layout)
        assert torch.equal(indices, select_blocks(t["q"], t["k"], **BLOCKS, cu_seqlens=right))


def test_max_length_below_a_document_length_stays_in_bounds():
    tokens = 20_480
    q, k, v = (draw(tokens, heads, 64) for heads in (16, 1, 1))
    boundaries = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
    layout = build_layout(boundaries, num_tokens=tokens, block_size=16, max_length=4096)
    indices = select_blocks(q, k, **BLOCKS, cu_seqlens=layout)
    own = (layout.query_position // 16)[:, None, None]
    assert ((indices >= -1) & (indices <= own)).all() and (indices == own).any(-1).all()
    sparse_attention(q, k, v, indices, block_size=16, cu_seqlens=layout)
    full_attention(q, k, v, cu_seqlens=layout, backend="flash")
    torch.cuda.synchronize()


def test_bad_arguments_are_refused_before_any_launch():
    t, layout = streams(), layout_of()
    indices = select_blocks(t["q"], t["k"], **BLOCKS, cu_seqlens=layout)
    at = {"block_size": 16, "cu_seqlens": layout}
    wrong = {
        "k of torch.float16 must have q's dtype": lambda: sparse_attention(t["q"], t["k"].half(), t["v"], indices, **at),
        "v of torch.float32 must have q's dtype": lambda: sparse_attention(t["q"], t["k"], t["v"].float(), indices, **at),
        "k of torch.float16 must have": lambda: select_blocks(t["q"], t["k"].half(), top_k=4, **at),
        "v of torch.float16 must have": lambda: full_attention(t["q"], t["k"], t["v"].half(), cu_seqlens=layout),
        "k of torch.float32 must have": lambda: ssa_attention(
            t["q"], t["k"].float(), t["v"], None, top_k=4, main="full", **at
        ),
        "k on cpu must be on q's device cuda:0": lambda: sparse_attention(t["q"], t["k"].cpu(), t["v"], indices, **at),
        "indices on cpu must be on": lambda: sparse_attention(**t, indices=indices.cpu(), **at),
        "cu_seqlens on cpu must be on": lambda: full_attention(**t, cu_seqlens=ends().cpu()),
        "a layout on cpu, must be on": lambda: full_attention(**t, cu_seqlens=layout_of(ends().cpu())),
        "gate_logits on cpu must be on": lambda: gate(t["q"], draw(T, 32).cpu()),
        "main on cpu must be on": lambda: gate_and_align(
            t["q"], t["q"], draw(T, 32), main=torch.tensor([1])
        ),
        "positions on cpu must be on": lambda: qkv_rope(
            draw(T, 2336), draw(77, 64).float(), torch.arange(T), **ROPE
        ),
        "labels on cpu must be on": lambda: linear_cross_entropy(draw(4, 16), draw(9, 16), torch.arange(4)),
        "they do not take float64": lambda: gate(t["q"].double(), draw(T, 32).double()),
        "indices of shape .* must be int32": lambda: sparse_attention(**t, indices=indices.long(), **at),
        "v \\(384, 1, 32\\) must be": lambda: sparse_attention(t["q"], t["k"], t["v"][..., :32], indices, **at),
        "q has 10 tokens and the layout 384 queries": lambda: select_blocks(t["q"][:10], t["k"], top_k=4, **at),
        "must be equal": lambda: sparse_attention(t["q"][:10], t["k"], t["v"], indices[:10], block_size=16, cu_seqlens=ends()),
        "entries must have": lambda: replace(layout, query_start=layout.query_start[:5]),
    }  # fmt: skip
    for sentence, call in wrong.items():
        with pytest.raises(ValueError, match=sentence):
            call()
    with pytest.raises(ValueError, match="max_length=100 must be at least"):
        layout_of(ends().cpu(), max_length=100)


def test_layout_of_strided_arrays_and_strided_slice_of_queries():
    t, layout = streams(), layout_of()
    viewed = replace(layout, **{name: spread(getattr(layout, name), 0) for name in ARRAYS})
    whole = select_blocks(t["q"], t["k"], **BLOCKS, cu_seqlens=layout)
    assert torch.equal(select_blocks(t["q"], t["k"], **BLOCKS, cu_seqlens=viewed), whole)
    o, lse = sparse_attention(**t, indices=whole, block_size=16, cu_seqlens=layout)
    part = query_slice(layout, slice(1, None, 3))
    found = sparse_attention(t["q"][1::3], t["k"], t["v"], whole[1::3], block_size=16, cu_seqlens=part)
    assert torch.equal(found[0], o[1::3]) and torch.equal(found[1], lse[1::3])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device_are_refused():
    o, logits = (draw(*size).to("cuda:1") for size in ((4, 2, 16), (4, 2)))
    with pytest.raises(ValueError, match=r"on cuda:1 must be on the current device cuda:0.*try torch.cuda.set_device"):
        gate(o, logits)
