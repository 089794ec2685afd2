"""Fused full attention against float64 for every installed kernel: values, lse, gradients, documents, no waiting."""

import pytest
import torch

from ssa_kernels import build_layout, full_attention
from ssa_kernels.full_attention import te
from support.errors import require_as_near

pytestmark = pytest.mark.gpu

PACKED = [
    "flash",
    pytest.param("te", marks=pytest.mark.skipif(not te.is_usable(), reason="needs transformer_engine")),
]
LENGTHS = [1, 15, 0, 16, 17, 300, 0, 129, 34]


def plain_attention(q, k, v, lengths, scale):
    """Returns o and lse of one document after another by plain operations in the inputs' precision, differentiable."""
    outs, lses, start = [], [], 0
    group = q.shape[1] // k.shape[1]
    for length in lengths:
        one = slice(start, start + length)
        keys, values = (x[one].repeat_interleave(group, 1) for x in (k, v))
        logits = torch.einsum("thd,shd->hts", q[one], keys) * scale
        logits = logits.masked_fill(~torch.ones(length, length, dtype=torch.bool, device=q.device).tril(), -torch.inf)
        outs.append(torch.einsum("hts,shd->thd", logits.softmax(-1), values))
        lses.append(logits.detach().logsumexp(-1).T)
        start += length
    return torch.cat(outs), torch.cat(lses)


def make(tokens, heads=8, kv_heads=2, head_dim=64):
    sizes = ((tokens, heads, head_dim), (tokens, kv_heads, head_dim), (tokens, kv_heads, head_dim))
    return [torch.randn(size, device="cuda", dtype=torch.bfloat16).requires_grad_() for size in sizes]


def ends(lengths):
    return torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)


def check(inputs, lengths, scale=None, **options):
    """Fails unless outputs and gradients are as close to float64 as those of plain operations in bf16, which also round the logits."""
    o, lse = full_attention(*inputs, return_lse=True, scale=scale, **options)
    grad = torch.randn_like(o)
    grads = torch.autograd.grad(o, inputs, grad)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    scale = inputs[0].shape[-1] ** -0.5 if scale is None else scale
    want_o, want_lse = plain_attention(*exact, lengths, scale)
    want_grads = torch.autograd.grad(want_o, exact, grad.double())
    plain_o, _ = plain_attention(*inputs, lengths, scale)
    plain_grads = torch.autograd.grad(plain_o, inputs, grad)
    require_as_near(o, plain_o, want_o, factor=1.2, name="o")
    assert lse.dtype == torch.float32 and lse.is_contiguous() and not lse.requires_grad
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=1e-4)
    for name, got, plain, want in zip("qkv", grads, plain_grads, want_grads, strict=True):
        require_as_near(got, plain, want, factor=1.2, name=name)


@pytest.mark.parametrize("backend", PACKED)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(8, 2, 64), (32, 2, 64), (6, 1, 96), (4, 4, 80), (32, 8, 128)]
)
def test_documents(backend, heads, kv_heads, head_dim):
    inputs = make(sum(LENGTHS), heads, kv_heads, head_dim)
    check(inputs, LENGTHS, cu_seqlens=ends(LENGTHS), backend=backend)


@pytest.mark.parametrize("backend", PACKED)
def test_layout_and_length_bound(backend):
    layout = build_layout(ends(LENGTHS), num_tokens=sum(LENGTHS), block_size=16, max_length=300)
    check(make(sum(LENGTHS)), LENGTHS, scale=0.3, cu_seqlens=layout, backend=backend)


@pytest.mark.parametrize("backend", PACKED)
def test_tokens_past_the_last_boundary_are_a_document(backend):
    check(make(sum(LENGTHS)), LENGTHS, cu_seqlens=ends(LENGTHS[:-1]), backend=backend)


@pytest.mark.parametrize("backend", [*PACKED, "cudnn"])
def test_strided_slices_of_one_projection(backend):
    mixed = torch.randn(512, 12, 64, device="cuda", dtype=torch.bfloat16)
    inputs = [part.requires_grad_() for part in mixed.split([8, 2, 2], 1)]
    assert not any(part.is_contiguous() for part in inputs)
    lengths = [256, 256]
    check(inputs, lengths, cu_seqlens=ends(lengths), backend=backend, num_rows=2 if backend == "cudnn" else None)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 2, 64), (6, 1, 96), (4, 4, 80), (32, 8, 128)])
@pytest.mark.parametrize(("num_rows", "length"), [(1, 512), (3, 200), (2, 129), (4, 100)])
@pytest.mark.parametrize("backend", [None, PACKED[1]])
def test_equal_rows(backend, num_rows, length, heads, kv_heads, head_dim):
    lengths = [length] * num_rows
    inputs = make(sum(lengths), heads, kv_heads, head_dim)
    check(inputs, lengths, cu_seqlens=ends(lengths), num_rows=num_rows, backend=backend)


@pytest.mark.parametrize("head_dim", [192, 256])
@pytest.mark.parametrize("lengths", [LENGTHS, [200] * 3], ids=["documents", "rows"])
def test_wide_heads(lengths, head_dim):
    """They take FlashAttention whatever the documents; cuDNN is refused."""
    inputs = make(sum(lengths), 16, 2, head_dim)
    check(inputs, lengths, cu_seqlens=ends(lengths), num_rows=3 if len(lengths) == 3 else None)


@pytest.mark.parametrize("backend", PACKED)
def test_changing_a_document_leaves_the_others_bit_identical(backend):
    q, k, v = (x.detach() for x in make(sum(LENGTHS)))
    before = full_attention(q, k, v, cu_seqlens=ends(LENGTHS), backend=backend)[0]
    start = sum(LENGTHS[:5])
    for x in (q, k, v):
        x[start : start + 300] *= -2
    after = full_attention(q, k, v, cu_seqlens=ends(LENGTHS), backend=backend)[0]
    assert torch.equal(before[:start], after[:start]) and torch.equal(before[start + 300 :], after[start + 300 :])
    assert not torch.equal(before, after)


@pytest.mark.parametrize("backend", [*PACKED, "cudnn"])
def test_host_never_waits_for_the_device(backend):
    inputs = make(512)
    boundaries, num_rows = ends([256, 256]), 2 if backend == "cudnn" else None
    grad = torch.randn_like(inputs[0])
    for mode in ("default", "error"):  # the first call may build graphs
        torch.cuda.set_sync_debug_mode(mode)
        try:
            o, _ = full_attention(*inputs, cu_seqlens=boundaries, num_rows=num_rows, backend=backend, return_lse=True)
            torch.autograd.grad(o, inputs, grad)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_deterministic_mode_repeats_bit_for_bit():
    inputs = make(4096, 32, 2)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(3):
            o, _ = full_attention(*inputs, cu_seqlens=ends([4096]), num_rows=1)
            runs.append((o, *torch.autograd.grad(o, inputs, torch.ones_like(o))))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_unsupported_arguments_are_refused():
    q, k, v = (x.detach() for x in make(64))
    boundaries = ends([64])
    with pytest.raises(ValueError, match="must be bfloat16 or float16"):
        full_attention(q.float(), k.float(), v.float(), cu_seqlens=boundaries)
    with pytest.raises(ValueError, match="multiple of 8 and at most 256"):
        full_attention(*(torch.cat([x] * 5, -1) for x in (q, k, v)), cu_seqlens=boundaries)
    with pytest.raises(ValueError, match="needs num_rows"):
        full_attention(q, k, v, cu_seqlens=boundaries, backend="cudnn")
    with pytest.raises(ValueError, match="they must be equal"):
        full_attention(q[:3], k, v, cu_seqlens=boundaries)
    with pytest.raises(ValueError, match="must be None, 'cudnn'"):
        full_attention(q, k, v, cu_seqlens=boundaries, backend="fast")
