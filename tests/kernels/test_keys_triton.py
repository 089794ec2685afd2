"""QK-norm in the split projection and the convolution of keys, in Triton's interpreter and in plain torch, against float64 loops."""

import itertools

import pytest
import torch

from ssa_kernels import QKNorm, key_convolution, qkv_rope, rope
from support.errors import require_as_near

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1 before Triton is imported"
)
EPS = 0.3  # weighs in means of squares of about 1
both = pytest.mark.parametrize("impl", ["triton", "reference"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Makes torch.empty return NaN, so that every element that a kernel does not write is visible."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def close(got, want, dtype):
    """Fails unless float32 is off by only a few roundings of 2^-24 in sums of some hundred terms, and float16 by one rounding of the exact result."""
    assert got.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(got.double(), want.double(), rtol=3e-5, atol=3e-5)
    else:
        require_as_near(got, want.to(dtype), want, factor=1.05)


def normed_and_rotated(x, weight, angle):
    """Returns [tokens, heads, D] in float64: each head over its root mean square, times the weight, turned pair by pair."""
    out, half = torch.empty_like(x), x.shape[-1] // 2
    for head in range(x.shape[1]):
        y = x[:, head]
        if weight is not None:
            y = weight * y / ((y * y).sum(-1, keepdim=True) / y.shape[-1] + EPS).sqrt()
        for i in range(half):
            cos, sin = angle[:, i].cos(), angle[:, i].sin()
            out[:, head, i] = y[:, i] * cos - y[:, i + half] * sin
            out[:, head, i + half] = y[:, i + half] * cos + y[:, i] * sin
    return out


@dtypes
@both
@pytest.mark.parametrize(
    ("tokens", "kv_heads", "group", "head_dim", "gates", "rotate_keys"),
    [(37, 2, 3, 16, 3, True), (33, 1, 2, 24, 0, True), (5, 3, 1, 8, 1, False), (34, 2, 2, 16, 0, False)],
)
def test_qk_norm_in_the_split_projection(tokens, kv_heads, group, head_dim, gates, rotate_keys, dtype, impl):
    generator = torch.Generator().manual_seed(tokens)
    width, rows = (group + 2) * head_dim + gates, group * head_dim
    mixed = torch.randn(tokens, kv_heads * width, generator=generator).to(dtype).requires_grad_()
    weights = [(1 + torch.randn(head_dim, generator=generator)).to(dtype).requires_grad_() for _ in range(2)]
    angles = torch.rand(50, head_dim, generator=generator) * 40
    positions = torch.randint(0, 50, (tokens,), generator=generator)
    sizes = {"num_kv_heads": kv_heads, "group_size": group, "head_dim": head_dim, "num_gates": gates}
    norm = QKNorm(*weights, EPS)
    found = qkv_rope(mixed, angles, positions, **sizes, norm=norm, rotate_keys=rotate_keys, impl=impl)
    found = [x for x in found if x is not None]
    grads = [torch.randn(x.shape, generator=generator).to(dtype) for x in found]

    wide = [x.detach().double().requires_grad_() for x in (mixed, *weights)]
    parts, angle = wide[0].view(tokens, kv_heads, width), angles[positions].double()
    q = normed_and_rotated(parts[..., :rows].reshape(tokens, kv_heads * group, head_dim), wide[1], angle)
    k = parts[..., rows : rows + head_dim]
    if rotate_keys:
        k = normed_and_rotated(k, wide[2], angle)
    wanted = [q, k, parts[..., rows + head_dim : rows + 2 * head_dim]]
    if gates:
        wanted.append(parts[..., rows + 2 * head_dim :].reshape(tokens, -1))
    for got, want in zip(found, wanted, strict=True):
        close(got, want, dtype)
    leaves = slice(3 if rotate_keys else 2)
    got = torch.autograd.grad(found, (mixed, *weights)[leaves], grads)
    want = torch.autograd.grad(wanted, wide[leaves], [g.double() for g in grads])
    for one, exact in zip(got, want, strict=True):
        close(one, exact, dtype)


@dtypes
@both
@pytest.mark.parametrize("normed", [True, False])
def test_rope_of_heads(normed, dtype, impl):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(41, 3, 24, generator=generator).to(dtype).requires_grad_()
    weight = (1 + torch.randn(24, generator=generator)).to(dtype).requires_grad_()
    angles, positions = torch.rand(50, 24, generator=generator), torch.randint(0, 50, (41,), generator=generator)
    leaves = [x, weight][: 1 + normed]
    out = rope(x, angles, positions, weight=weight if normed else None, eps=EPS, impl=impl)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    want = normed_and_rotated(wide[0], wide[1] if normed else None, angles[positions].double())
    close(out, want, dtype)
    grad = torch.randn(out.shape, generator=generator).to(dtype)
    for one, exact in zip(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(want, wide, grad.double()), strict=True
    ):
        close(one, exact, dtype)


@both
def test_rope_of_projected_keys_is_that_of_the_projection(impl):
    """Keys that leave the projection plain and are normed and rotated by themselves have the same bits, and so has every gradient."""
    generator = torch.Generator().manual_seed(1)
    angles, positions = torch.rand(9, 8, generator=generator), torch.randint(0, 9, (40,), generator=generator)
    sizes = {"num_kv_heads": 2, "group_size": 2, "head_dim": 8, "num_gates": 2, "impl": impl}
    draws = [torch.randn(40, 68, generator=generator), *torch.randn(2, 8, generator=generator)]
    grads, results = [], []
    for rotate_keys in (True, False):
        mixed, *weights = (x.clone().requires_grad_() for x in draws)
        q, k, v, gates = qkv_rope(
            mixed, angles, positions, norm=QKNorm(*weights, EPS), rotate_keys=rotate_keys, **sizes
        )
        if not rotate_keys:
            k = rope(k, angles, positions, weight=weights[1], eps=EPS, impl=impl)
        results.append((q, k, v, gates))
        sum((x * x.detach().cos()).sum() for x in results[-1]).backward()
        grads.append([mixed.grad, *(w.grad for w in weights)])
    for pair in (results, grads):
        for one, other in zip(*pair, strict=True):
            assert torch.equal(one, other)


def convolved(k, weight, ends):
    """Returns [tokens, G, D] in float64, document by document and token by token."""
    out, filters = torch.empty_like(k), weight.view(k.shape[1], k.shape[2], -1)
    for begin, end in itertools.pairwise((0, *ends)):
        for t in range(begin, end):
            total = torch.zeros_like(k[t])
            for j in range(filters.shape[-1]):
                source = t - (filters.shape[-1] - 1) + j
                if source >= begin:
                    total = total + filters[..., j] * k[source]
            out[t] = k[t] + total / (1 + (-total).exp())
    return out


@dtypes
@both
@pytest.mark.parametrize(
    ("ends", "heads", "dim", "taps"),
    [((1, 2, 6, 31, 33, 70), 2, 8, 5), ((40,), 1, 24, 1), ((40,), 1, 24, 3), ((32, 64, 67), 1, 16, 3)],
)
def test_key_convolution(ends, heads, dim, taps, dtype, impl):
    generator = torch.Generator().manual_seed(taps)
    tokens = ends[-1]
    k = torch.randn(tokens, heads, dim, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(heads * dim, 1, taps, generator=generator).to(dtype).requires_grad_()
    positions = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise((0, *ends))])
    out = key_convolution(k, weight, positions, impl=impl)
    wide = [x.detach().double().requires_grad_() for x in (k, weight)]
    want = convolved(*wide, ends)
    close(out, want, dtype)
    grad = torch.randn(out.shape, generator=generator).to(dtype)
    found = torch.autograd.grad(out, (k, weight), grad)
    for one, exact in zip(found, torch.autograd.grad(want, wide, grad.double()), strict=True):
        close(one, exact, dtype)


@both
def test_convolution_equals_torchs_and_sees_no_other_document(impl):
    """Of one document it is torch's Conv1d with the same weight, and changing one document changes no bit of another."""
    generator = torch.Generator().manual_seed(2)
    k, conv = torch.randn(50, 2, 8, generator=generator), torch.nn.Conv1d(16, 16, 3, groups=16, bias=False, padding=2)
    found = key_convolution(k, conv.weight, torch.arange(50), impl=impl)
    channels = conv(k.flatten(1).T[None])[0, :, :50].T.view(50, 2, 8)
    torch.testing.assert_close(found, k + torch.nn.functional.silu(channels))
    positions = torch.cat([torch.arange(20), torch.arange(30)])
    other = k.clone()
    other[:20] += 1
    one, two = (key_convolution(x, conv.weight, positions, impl=impl) for x in (k, other))
    assert torch.equal(one[20:], two[20:]) and not torch.equal(one[:20], two[:20])
    later = k.clone()
    later[30] += 1
    three = key_convolution(later, conv.weight, positions, impl=impl)
    changed = (one != three).flatten(1).any(1).nonzero().flatten().tolist()
    assert changed == [30, 31, 32], "a key changes itself and the two after it"


@both
def test_no_tokens_have_no_gradient_but_zeros(impl):
    weights = [torch.ones(n, requires_grad=True) for n in (8, 8)]
    taps = torch.ones(8, 1, 3, requires_grad=True)
    none, angles = torch.zeros(0, dtype=torch.int64), torch.zeros(4, 8)
    sizes = {"num_kv_heads": 1, "group_size": 2, "head_dim": 8, "num_gates": 0, "impl": impl}
    q, k, *_ = qkv_rope(torch.zeros(0, 32), angles, none, norm=QKNorm(*weights, EPS), **sizes)
    (q.sum() + k.sum() + key_convolution(torch.zeros(0, 1, 8), taps, none, impl=impl).sum()).backward()
    for x in (*weights, taps):
        assert torch.equal(x.grad, torch.zeros_like(x))


def test_bad_arguments_are_refused():
    mixed, angles, positions = torch.zeros(4, 32), torch.zeros(4, 8), torch.arange(4)
    sizes = {"num_kv_heads": 1, "group_size": 2, "head_dim": 8, "num_gates": 0}
    w, k = torch.ones(8), torch.zeros(4, 1, 8)
    for message, call in {
        r"norm.q \(9,\), torch.float32 must be \[8\]": lambda: qkv_rope(
            mixed, angles, positions, norm=QKNorm(torch.ones(9), w, EPS), **sizes
        ),
        "norm must be None or a QKNorm": lambda: qkv_rope(mixed, angles, positions, norm=w, **sizes),
        "norm.eps=-1.0 must not be negative; try 1e-5": lambda: qkv_rope(
            mixed, angles, positions, norm=QKNorm(w, w, -1.0), **sizes
        ),
        "rotate_keys=1 must be True or False": lambda: qkv_rope(mixed, angles, positions, rotate_keys=1, **sizes),
        r"x \(4, 32\) must be \[tokens, heads, D\]": lambda: rope(mixed, angles, positions),
        "must be even and at least 2": lambda: rope(torch.zeros(4, 1, 7), angles, positions),
        r"weight \(8, 3\), torch.float32 must be \[8, 1, W\], W from 1 to 16": lambda: key_convolution(
            k, torch.zeros(8, 3), positions
        ),
        "positions from -1 must not be negative": lambda: key_convolution(k, torch.zeros(8, 1, 3), positions - 1),
        "must be one integer for each of 4 tokens": lambda: key_convolution(k, torch.zeros(8, 1, 3), positions[:3]),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
