"""Sparse attention's Triton kernels in Triton's interpreter, small, against the float64 oracle.

The tensor-core kernels run here as well (gluon_on_cpu.py explains how, and what that cannot check). Errors are relative in the norm: float32 to sums of
at most 128 terms; float16 beside the reference's, which rounds p, ds and results once as the kernels do.
"""

import pytest
import torch

from ssa_kernels import build_layout, query_slice, sparse_attention
from ssa_kernels.devices import KNOWN_GPUS
from support import oracle
from support.errors import relative, require_as_near

triton = pytest.importorskip("triton")
interpreted = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1 before Triton is imported"
)
FLOAT32 = 2e-6
DOCUMENTS = [0, 1, 18, 18, 34]


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Makes torch.empty return NaN, so that every element that a kernel does not write is visible."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random_choices(cu_seqlens, tokens, lists, block_size, top_k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.full((tokens, lists, top_k), -1, dtype=torch.int32)
    for token, (start, _) in enumerate(oracle.where(cu_seqlens, tokens)):
        own = (token - start) // block_size
        for i in range(lists):
            chosen = sorted([*torch.randperm(own, generator=generator)[: top_k - 1].tolist(), own])
            indices[token, i, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return indices


def make(cu_seqlens, heads, kv_heads, head_dim, block_size, top_k, lists=None, dtype=torch.float16, size=1.0):
    """Returns (q, k, v, do, indices, layout)."""
    tokens = cu_seqlens[-1]
    generator = torch.Generator().manual_seed(heads + head_dim)
    shapes = [
        (tokens, heads, head_dim),
        (tokens, kv_heads, head_dim),
        (tokens, kv_heads, head_dim),
        (tokens, heads, head_dim),
    ]
    q, k, v, do = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    indices = random_choices(cu_seqlens, tokens, lists or kv_heads, block_size, top_k)
    layout = build_layout(torch.tensor(cu_seqlens, dtype=torch.int32), num_tokens=tokens, block_size=block_size)
    return q * size, k, v, do, indices, layout


def public(q, k, v, do, indices, layout, impl="triton"):
    """Returns o, lse, dq, dk, dv through the public function."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o, lse = sparse_attention(*leaves, indices, block_size=layout.block_size, cu_seqlens=layout, impl=impl)
    return [o.detach(), lse, *torch.autograd.grad(o, leaves, do)]


@pytest.fixture(scope="module")
def tensor_core():
    from support import gluon_on_cpu

    return gluon_on_cpu.load()


def on_tensor_cores(module, q, k, v, do, indices, layout, delta=None, segment=5, add_to=(None, None, None)):
    """Returns o, lse, dq, dk, dv of the tensor-core kernels."""
    from ssa_kernels.sparse_attention.index import invert
    from ssa_kernels.sparse_attention.segment_sums import add_segments

    scale = q.shape[-1] ** -0.5
    o, lse = module.forward(q, k, v, indices, layout, scale)
    given = delta is not None
    delta = torch.empty_like(lse) if delta is None else delta
    dq = module.backward_q(q, k, v, indices, None if given else o, lse, do, layout, scale, delta, given, add_to[0])
    index = invert(indices, layout, kv_heads=k.shape[1], segment=segment)
    sums = module.backward_k_v(q, k, v, indices, lse, do, layout, scale, delta, index)
    added = None if add_to[1] is None else add_to[1:]
    return [o, lse, dq, *add_segments(sums, index, k, layout, scale, added)]


def exact_results(q, k, v, do, indices, layout):
    """Returns o, lse, dq, dk, dv in float64."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    mask = oracle.visible(indices, DOCUMENTS, q.shape[0], q.shape[1], layout.block_size)
    o, lse = oracle.attention(*leaves, mask, q.shape[-1] ** -0.5)
    return [o.detach(), lse, *torch.autograd.grad(o, leaves, do.double())]


def check(ours, inputs):
    exact, reference = exact_results(*inputs), public(*inputs, impl="reference")
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=1e-6, atol=5e-5)
    for name, got, own, right in zip(("o", "lse", "dq", "dk", "dv"), ours, reference, exact, strict=True):
        if name == "lse":
            continue
        if got.dtype == torch.float32:
            assert relative(got, right) < FLOAT32, name
        else:
            require_as_near(got, own, right, factor=1.5, name=name)


@interpreted
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size", "top_k", "lists", "dtype"),
    [
        (4, 2, 16, 16, 2, None, torch.float32),
        (6, 1, 24, 8, 3, None, torch.float32),
        (2, 1, 16, 16, 2, 2, torch.float32),
        (2, 2, 16, 16, 3, None, torch.float16),
        (2, 1, 256, 16, 2, None, torch.float16),
    ],
)
def test_portable_kernels(heads, kv_heads, head_dim, block_size, top_k, lists, dtype):
    inputs = make(DOCUMENTS, heads, kv_heads, head_dim, block_size, top_k, lists, dtype)
    check(public(*inputs), inputs)


@interpreted
def test_portable_kernels_take_a_large_block_in_parts(monkeypatch):
    from ssa_kernels.sparse_attention import portable

    monkeypatch.setattr(portable, "TILE_ELEMENTS", 256)  # 16 keys of 16 features
    monkeypatch.setattr(portable, "DKDV_ELEMENTS", 256)
    inputs = make(DOCUMENTS, 4, 2, 16, 24, 2, None, torch.float32)
    check(public(*inputs), inputs)


@interpreted
def test_portable_backward_accumulates_and_accepts_a_prepared_index():
    from ssa_kernels.sparse_attention.autograd import sparse_attention_backward, sparse_attention_forward
    from ssa_kernels.sparse_attention.index import invert_beside

    q, k, v, do, indices, layout = make(DOCUMENTS, 4, 2, 16, 16, 2, None, torch.float32)
    o, lse = sparse_attention_forward(q, k, v, indices, layout, 0.25)
    alone = sparse_attention_backward(q, k, v, indices, o, lse, do, layout, 0.25)
    before = tuple(torch.randn_like(x) for x in alone)
    index = invert_beside(indices, layout, kv_heads=2, segment=3)
    into = tuple(x.clone() for x in before)
    added = sparse_attention_backward(q, k, v, indices, o, lse, do, layout, 0.25, index=index, add_to=into)
    for got, place, there, own in zip(added, into, before, alone, strict=True):
        assert got is place
        torch.testing.assert_close(got, there + own, rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size", "top_k", "lists", "adds"),
    [
        (16, 1, 64, 16, 3, None, True),  # heads as rows: a full tile
        (12, 1, 80, 16, 3, None, False),  # a partial tile, padded features
        (32, 1, 64, 16, 2, None, True),  # two tiles
        (4, 1, 128, 16, 2, None, True),  # heads as columns; four entries per step; rows through shared memory
        (16, 1, 128, 16, 2, None, False),
        (6, 1, 64, 16, 3, None, False),  # entries with unused rows
        (2, 1, 64, 32, 2, 2, False),  # every head chooses; blocks of several tiles
        (8, 1, 256, 16, 2, None, True),  # K and V in shared memory; four warps per 16 keys; four entries per step
        (12, 1, 200, 32, 2, None, False),  # two programs per list, each for six heads; blocks in two parts
    ],
)
def test_tensor_core_kernels(tensor_core, heads, kv_heads, head_dim, block_size, top_k, lists, adds):
    """When they add to existing gradients, the sum is rounded once, which is closer than rounding the gradient and then the sum."""
    inputs = make(DOCUMENTS, heads, kv_heads, head_dim, block_size, top_k, lists)
    alone = on_tensor_cores(tensor_core, *inputs)
    check(alone, inputs)
    if adds:
        before = [torch.randn_like(x) for x in alone[2:]]
        added = on_tensor_cores(tensor_core, *inputs, add_to=tuple(x.clone() for x in before))[2:]
        for got, there, own, exact in zip(added, before, alone[2:], exact_results(*inputs)[2:], strict=True):
            require_as_near(got, there + own, there.double() + exact, factor=1.0)


@interpreted
def test_keys_in_shared_memory_change_no_bit(tensor_core, monkeypatch):
    """Blackwell has too few registers for K and V beside the sums at D 128, as Hopper has at D 256."""
    inputs = make(DOCUMENTS, 4, 1, 128, 16, 2)
    before = on_tensor_cores(tensor_core, *inputs)
    monkeypatch.setattr(tensor_core, "gpu_of", lambda device: KNOWN_GPUS["sm_100"])
    for name, ours, others in zip(
        ("o", "lse", "dq", "dk", "dv"), on_tensor_cores(tensor_core, *inputs), before, strict=True
    ):
        assert torch.equal(ours, others), name


@interpreted
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # overflowing results are discarded
@pytest.mark.parametrize("heads", [16, 8])
def test_logits_far_above_the_reference(tensor_core, heads):
    inputs = make(DOCUMENTS, heads, 1, 64, 16, 3, size=40.0)
    check(on_tensor_cores(tensor_core, *inputs), inputs)


@interpreted
@pytest.mark.parametrize("heads", [16, 4])
def test_dominant_keys_outside_the_own_tile(tensor_core, heads):
    """The weights that multiply V add up to 1, so o is almost as near as float64's o rounded once: 1.08. Divided by the unrounded sum: 1.3.

    Larger keys would overflow float16, and the kernel would start again with the exact maximum, which hides the difference.
    """
    q, k, v, _, indices, layout = make([0, 40], heads, 1, 64, 16, 3)
    k[:16] *= 4
    o, _ = tensor_core.forward(q, k, v, indices, layout, 0.125)
    mask = oracle.visible(indices, [0, 40], 40, heads, 16)
    exact, _ = oracle.attention(q.double(), k.double(), v.double(), mask, 0.125)
    require_as_near(o[16:], exact[16:].half(), exact[16:], factor=1.2)


@interpreted
def test_precomputed_delta(tensor_core):
    inputs = make(DOCUMENTS, 16, 1, 64, 16, 2)
    delta = (public(*inputs, impl="reference")[0].float() * inputs[3].float()).sum(-1)
    check(on_tensor_cores(tensor_core, *inputs, delta=delta), inputs)


@interpreted
@pytest.mark.parametrize("heads", [16, 4])
def test_queries_without_blocks_and_isolated_documents(tensor_core, heads):
    q, k, v, do, indices, layout = make(DOCUMENTS, heads, 1, 64, 16, 3)
    indices[20:22] = -1
    first = on_tensor_cores(tensor_core, q, k, v, do, indices, layout)
    assert bool((first[0][20:22] == 0).all()) and bool((first[1][20:22] == float("-inf")).all())
    assert bool((first[2][20:22] == 0).all()) and all(bool(torch.isfinite(x).all()) for x in first[2:])
    for x in (q, k, v, do):
        x[:18] = float("nan")
    again = on_tensor_cores(tensor_core, q, k, v, do, indices, layout)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a[18:], b[18:])


@interpreted
def test_subset_of_queries():
    q, k, v, do, indices, layout = make(DOCUMENTS, 2, 1, 16, 16, 2, dtype=torch.float32)
    whole = public(q, k, v, do, indices, layout)
    part = torch.tensor([1, 5, 6, 20, 33])
    ours = public(q[part], k, v, do[part], indices[part], query_slice(layout, part))
    for a, b in zip(whole[:3], ours[:3], strict=True):
        assert torch.equal(a[part], b)


@interpreted
@pytest.mark.parametrize("segment", [3, 64])
def test_inverted_index(segment):
    from ssa_kernels.sparse_attention.index import invert

    indices = random_choices(DOCUMENTS, 34, 2, 4, 3)
    indices[7] = -1
    indices[9, 0] = torch.tensor([0, 99, -1])  # past the own block: does not count
    layout = build_layout(torch.tensor(DOCUMENTS, dtype=torch.int32), num_tokens=34, block_size=4)
    index = invert(indices, layout, kv_heads=2, segment=segment)
    rows = layout.num_block_rows
    found = {}
    used = int(index.num_segments)
    for number, (bucket, begin, length) in enumerate(index.segments[:used].tolist()):
        assert 0 < length <= segment
        assert int(index.first_segment[bucket]) <= number < int(index.first_segment[bucket + 1])
        found.setdefault(bucket, []).extend(index.choices[begin : begin + length].tolist())
    expected = {}
    for choice, block in enumerate(indices.flatten().tolist()):
        query, kv_head = choice // 6, choice // 3 % 2
        if 0 <= block <= int(layout.query_position[query]) // 4:
            expected.setdefault(kv_head * rows + int(layout.query_first_block_row[query]) + block, []).append(choice)
    assert found == expected
    assert sorted(index.schedule.tolist()) == list(range(index.max_segments))
    assert sorted(index.schedule[:used].tolist()) == list(range(used))


@interpreted
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("v_columns", [False, True])
def test_tiles_hold_every_element_once(left, v_columns):
    from ssa_kernels.sparse_attention.tensor_core.tiles import pack_tiles

    layout = build_layout(torch.tensor([0, 20, 36], dtype=torch.int32), num_tokens=36, block_size=32)
    k = torch.arange(1, 36 * 2 * 24 + 1, dtype=torch.float32).view(36, 2, 24)
    tiles = pack_tiles(k, -k, layout, v_columns=v_columns, left=left)
    assert tiles.shape == (layout.num_block_rows * 2, 2, 2, 16 * 64)
    for tile, first, keys in ((0, 0, 16), (1, 16, 4), (2, 20, 16), (3, 36, 0)):
        for head in range(2):
            own = k[first : first + keys, head].flatten().tolist()
            zeros = [0.0] * (16 * 64 - len(own))
            assert sorted(tiles[tile, head, 0].tolist()) == sorted(own + zeros)
            assert sorted((-tiles[tile, head, 1]).tolist()) == sorted(own + zeros)
