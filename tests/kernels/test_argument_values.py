"""Values and layouts at the limits of what operators accept: empty tensors, labels, positions, chosen blocks, documents, NaN."""

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
    query_spans,
    select_blocks,
    sparse_attention,
    ssa_attention,
    swiglu,
)
from ssa_kernels.documents import ARRAYS, document_ends, layout_to
from support.kernel_impls import IMPLS

both = pytest.mark.parametrize("impl", IMPLS)
interpreted = pytest.mark.skipif("triton" not in IMPLS, reason="needs TRITON_INTERPRET=1 before Triton is imported")

ENDS = torch.tensor([0, 3, 10, 24], dtype=torch.int32)
T, BLOCKS = 24, {"block_size": 2, "top_k": 2}


def draw(*size, seed=0, dtype=torch.float32):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed + sum(size))).to(dtype)


def streams(tokens=T, dtype=torch.float32):
    return [draw(tokens, heads, 16, seed=heads, dtype=dtype) for heads in (4, 2, 2)]


def layout_of(ends=ENDS, tokens=T, **options):
    return build_layout(ends, num_tokens=tokens, block_size=2, **options)


class OffCpuTensor(torch.Tensor):
    """A tensor whose `is_cpu` is False."""

    is_cpu = False


# Documents
def test_document_longer_than_max_length_is_refused():
    assert layout_of(max_length=14).max_length == 14
    for ends, longest in (
        (ENDS, 14),
        (torch.tensor([0, 3]), 21),
    ):  # the tokens past the last boundary are a document, too
        with pytest.raises(
            ValueError, match=f"max_length=13 must be at least the longest document's {longest} tokens; try None"
        ):
            layout_of(ends, max_length=13)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_tokens": 0}, "num_tokens=0 must be an int of at least 1"),
        ({"num_tokens": True}, "num_tokens=True must be an int"),
        ({"num_tokens": 24.0}, "num_tokens=24.0 must be an int"),
        ({"num_tokens": 2**31}, "must lie below 2\\^31"),
        ({"block_size": 0}, "block_size=0 must be an int of at least 1"),
        ({"block_size": False}, "block_size=False must be an int"),
        ({"max_length": 0}, "max_length=0 must be an int of at least 1, or None"),
        ({"max_length": 14.0}, "max_length=14.0 must be an int"),
        (
            {"cu_seqlens": [0, 24]},
            "cu_seqlens must be an int32 tensor \\[documents \\+ 1\\] or a layout by build_layout, got list",
        ),
        ({"cu_seqlens": layout_of()}, "cu_seqlens must be an int32 tensor"),
        ({"cu_seqlens": ENDS.float()}, "torch.float32 must be int32"),
        ({"cu_seqlens": ENDS.short()}, "torch.int16 must be int32"),
        ({"cu_seqlens": ENDS[None]}, "of shape \\(1, 4\\)"),
        ({"cu_seqlens": ENDS[:1]}, "of shape \\(1,\\)"),
        ({"cu_seqlens": ENDS[1:]}, "must start with 0"),
        ({"cu_seqlens": torch.tensor([0, 5, 4, 24])}, "never decrease"),
        ({"cu_seqlens": torch.tensor([0, 25])}, "not exceed num_tokens=24"),
        ({"cu_seqlens": torch.tensor([0, 2**33])}, "not exceed num_tokens=24"),
        ({"cu_seqlens": ENDS.to("meta")}, "cu_seqlens on meta holds no values"),
    ],
)
def test_invalid_layout_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        build_layout(**{"cu_seqlens": ENDS, "num_tokens": T, "block_size": 2, "max_length": None, **changed})


def test_boundaries_may_be_strided_and_of_either_dtype():
    wanted = layout_of()
    strided = torch.stack([ENDS, ENDS + 7], 1)[:, 0]
    for ends in (strided, ENDS.long(), strided.long(), torch.cat([ENDS[:1], ENDS])[1:]):
        assert all(torch.equal(getattr(layout_of(ends), name), getattr(wanted, name)) for name in ARRAYS)


def test_unchecked_boundaries_are_sorted():
    """The behaviour on a GPU, where values are not checked. Only `is_cpu` distinguishes the two."""
    for given, wanted in (
        ([0, 5, 4, 24], [0, 5, 5, 24, 24]),
        ([3, 5], [0, 5, 24]),
        ([0, -4, 9], [0, 0, 9, 24]),
        ([0, 2**40], [0, 24, 24]),
        ([0, 30, 12], [0, 24, 24, 24]),
    ):
        assert document_ends(torch.tensor(given).as_subclass(OffCpuTensor), T).tolist() == wanted


def test_layout_checks_its_arrays_on_construction():
    layout = layout_of()
    every = {name: getattr(layout, name) for name in ARRAYS}
    for name, array in every.items():
        for wrong in (array[:-1], array[::2], array[:0]):
            with pytest.raises(ValueError, match=r"entries must have|int32 \[n\]"):
                replace(layout, **{name: wrong})
        for wrong in (array.long(), array[None], array.to("meta")):
            with pytest.raises(ValueError, match=r"of a layout must be int32 \[n\]"):
                replace(layout, **{name: wrong})
        with pytest.raises(ValueError, match=f"{name} of a layout must be a torch.Tensor, got list"):
            replace(layout, **{name: array.tolist()})
    for changed in ({"block_size": 3}, {"num_tokens": 30}, {"block_size": 0}, {"max_length": 0}, {"num_tokens": True}):
        with pytest.raises(ValueError, match=r"in a layout of|of a layout="):
            replace(layout, **changed)


@both
def test_layout_of_strided_arrays_equals_the_contiguous_one(impl):
    q, k, v = streams()
    layout = layout_of()
    strided = {name: torch.stack([getattr(layout, name)] * 2, 1)[:, 0] for name in ARRAYS}
    viewed = replace(layout, **strided)
    assert all(getattr(viewed, name).is_contiguous() for name in ARRAYS) and viewed.scattered
    indices = select_blocks(q, k, top_k=2, block_size=2, cu_seqlens=layout, impl=impl)
    assert torch.equal(select_blocks(q, k, top_k=2, block_size=2, cu_seqlens=viewed, impl=impl), indices)
    found = [sparse_attention(q, k, v, indices, block_size=2, cu_seqlens=x, impl=impl) for x in (layout, viewed)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    every_second = query_slice(layout, slice(1, None, 2))
    again = select_blocks(q[1::2], k, top_k=2, block_size=2, cu_seqlens=every_second, impl=impl)
    assert torch.equal(again, indices[1::2])
    part = sparse_attention(q[1::2], k, v, again, block_size=2, cu_seqlens=every_second, impl=impl)
    for a, b in zip(part, found[0], strict=True):
        torch.testing.assert_close(a, b[1::2])


OPERATORS = {
    "select_blocks": lambda q, k, v, i, **at: select_blocks(q, k, **at, top_k=2),
    "sparse_attention": lambda q, k, v, i, **at: sparse_attention(q, k, v, i, **at),
    "full_attention": lambda q, k, v, i, block_size, **at: full_attention(q, k, v, **at),
    "ssa_attention": lambda q, k, v, i, **at: ssa_attention(q, k, v, None, **at, top_k=2, main="full"),
}


@both
@pytest.mark.parametrize("name", OPERATORS)
def test_layout_of_other_tensors_is_refused(name, impl):
    operator, (q, k, v) = OPERATORS[name], streams()
    layout, indices = layout_of(), select_blocks(*streams()[:2], **BLOCKS, cu_seqlens=ENDS)
    common = {"block_size": 2, "impl": impl}
    for less in (layout_of(torch.tensor([0, 20]), 20), layout_of(torch.tensor([0, 30]), 30)):
        with pytest.raises(ValueError, match=f"num_tokens=24 of the keys must equal the layout's {less.num_tokens}"):
            operator(q, k, v, indices, cu_seqlens=less, **common)
    part = query_slice(layout, slice(0, 10))
    with pytest.raises(ValueError, match="q has 24 tokens and the layout 10 queries"):
        operator(q, k, v, indices, cu_seqlens=part, **common)
    with pytest.raises(ValueError, match="q has 5 tokens and the layout 24 queries"):
        operator(q[:5], k, v, indices[:5], cu_seqlens=layout, **common)
    with pytest.raises(ValueError, match=r"q has 5 tokens and k 24: without a layout .* must be equal"):
        operator(q[:5], k, v, indices[:5], cu_seqlens=ENDS, **common)
    with pytest.raises(ValueError, match="a layout on meta, must be on q's device cpu"):
        operator(q, k, v, indices, cu_seqlens=layout_to(layout, "meta"), **common)
    if name != "full_attention":
        with pytest.raises(ValueError, match="block_size=2 must equal the layout's 4; build another layout"):
            operator(q, k, v, indices, cu_seqlens=build_layout(ENDS, num_tokens=T, block_size=4), **common)


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        (slice(5, 5), "must name at least one of the layout's 24"),
        (slice(5, 2), "must name at least one"),
        (slice(None, None, -1), "in ascending order"),
        (3, "queries must be a dense torch.Tensor, got int"),
        ([1, 2], "queries must be a dense torch.Tensor, got list"),
        (torch.tensor([], dtype=torch.int64), "with n at least 1"),
        (torch.tensor([[1]]), "of shape \\(1, 1\\)"),
        (torch.ones(T, dtype=torch.bool), "torch.bool must be int64"),
        (torch.tensor([1.0]), "torch.float32 must be int64"),
        (torch.tensor([2, 1]), "must ascend within the layout's 24 queries"),
        (torch.tensor([1, 1]), "must ascend"),
        (torch.tensor([-1, 1]), "must ascend within"),
        (torch.tensor([1, 24]), "must ascend within"),
        (torch.tensor([1], device="meta"), "queries on meta must be on layout's device cpu"),
    ],
)
def test_invalid_query_subset_is_refused(queries, message):
    with pytest.raises(ValueError, match=message):
        query_slice(layout_of(), queries)


def test_only_a_layout_has_query_subsets():
    for part in (lambda x: query_slice(x, slice(0, 2)), lambda x: query_spans(x, [(0, 2)])):
        with pytest.raises(ValueError, match="layout must be a DocumentLayout by build_layout, got Tensor"):
            part(ENDS)
    for span in ((0, 2.0), (True, 2), (0, "2")):
        with pytest.raises(ValueError, match=r"of a span=.* must be an int"):
            query_spans(layout_of(), [span])


# Values in tensors
@both
def test_label_minus_100_is_ignored_and_other_out_of_range_labels_are_refused(impl):
    hidden, weight = draw(6, 8).requires_grad_(), draw(11, 8).requires_grad_()
    labels, grad = torch.tensor([3, -100, 0, 10, -100, 5]), draw(6, seed=1)
    wanted = F.cross_entropy(hidden @ weight.t(), labels, reduction="none")
    want = torch.autograd.grad(wanted, (hidden, weight), grad)
    for given in (labels, labels.int(), torch.stack([labels] * 3, 1)[:, 1]):
        losses = linear_cross_entropy(hidden, weight, given, impl=impl)
        torch.testing.assert_close(losses, wanted)
        assert losses[1] == 0 and losses[4] == 0
        found = torch.autograd.grad(losses, (hidden, weight), grad)
        torch.testing.assert_close(found, want)
        assert not found[0][[1, 4]].any()
    buffer = torch.zeros(11, 16)[:, ::2]  # strided, as a view of a larger buffer may be
    linear_cross_entropy(hidden, weight, labels, accumulate_into=buffer, impl=impl).backward(grad)
    torch.testing.assert_close(buffer, want[1])
    nothing = linear_cross_entropy(hidden, weight, torch.full((6,), -100), impl=impl)
    assert not nothing.any() and not any(g.any() for g in torch.autograd.grad(nothing.sum(), (hidden, weight)))
    for outside in (-1, 11, -101, 2**40, -(2**63)):
        labels[2] = outside
        with pytest.raises(
            ValueError, match=rf"label {outside} must lie in \[0, 11\), the vocabulary, or be -100 to be ignored"
        ):
            linear_cross_entropy(hidden, weight, labels, impl=impl)


@both
def test_buffer_with_overlapping_elements_is_refused(impl):
    hidden, weight, labels = draw(6, 8), draw(11, 8), torch.arange(6)
    for shared in (torch.zeros(1, 8).expand(11, 8), torch.zeros(18).as_strided((11, 8), (1, 1))):
        with pytest.raises(ValueError, match=r"accumulate_into with strides .* must not overlap in memory"):
            linear_cross_entropy(hidden, weight, labels, accumulate_into=shared, impl=impl)
    for wrong in (torch.zeros(11, 8, device="meta"), torch.zeros(11, 8).bfloat16(), torch.zeros(8, 11), [1]):
        with pytest.raises(ValueError, match="accumulate_into"):
            linear_cross_entropy(hidden, weight, labels, accumulate_into=wrong, impl=impl)


@both
def test_out_of_range_positions_are_refused(impl):
    mixed, angles, sizes = (
        draw(4, 64),
        draw(9, 16),
        {"num_kv_heads": 1, "group_size": 2, "head_dim": 16, "num_gates": 0},
    )
    positions = torch.tensor([0, 3, 8, 8])
    qkv_rope(mixed, angles, positions, impl=impl, **sizes)
    for outside in (-1, 9, 2**40):
        positions[1] = outside
        with pytest.raises(ValueError, match=r"positions from .* to .* must lie in \[0, 9\), the rows of angles"):
            qkv_rope(mixed, angles, positions, impl=impl, **sizes)
    with pytest.raises(ValueError, match="angles get no gradient"):
        qkv_rope(mixed, angles.requires_grad_(), positions.clamp(0, 8), impl=impl, **sizes)


@interpreted
def test_kernel_reads_no_out_of_range_angle():
    """On a GPU positions are not checked first."""
    from ssa_kernels.qkv_rope.triton import Sizes, qkv_rope_forward

    table = torch.full((20, 16), float("nan"))
    table[5:14] = draw(9, 16)
    mixed, positions = draw(4, 64), torch.tensor([-3, 4, 9, 2**40])
    found = qkv_rope_forward(mixed, table[5:14], positions, Sizes(1, 2, 16, 0))
    wanted = qkv_rope_forward(mixed, table[5:14], positions.clamp(0, 8), Sizes(1, 2, 16, 0))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)) and not found[0].isnan().any()


@both
@pytest.mark.parametrize("wrong", [[0, 6], [-2, 3], [2, 1], [1, 1], [-1, 2], [2**31 - 1, -1], [0, -(2**31)]], ids=str)
def test_invalid_chosen_blocks_are_refused(wrong, impl):
    q, k, v = streams()
    indices = select_blocks(q, k, **BLOCKS, cu_seqlens=ENDS)
    indices[20, 1] = torch.tensor(wrong)
    with pytest.raises(
        ValueError, match=r"indices of query 20, .*, must be block numbers in \[0, 5\], its own block, ascending and"
    ):
        sparse_attention(q, k, v, indices, block_size=2, cu_seqlens=ENDS, impl=impl)


@interpreted
def test_kernels_read_no_out_of_range_block():
    """On a GPU chosen blocks are not checked first."""
    from ssa_kernels.sparse_attention.autograd import sparse_attention_backward, sparse_attention_forward

    q, k, v = streams()
    layout, do = layout_of(), draw(T, 4, 16, seed=5)
    indices = torch.tensor([[[0, -1]] * 2] * T, dtype=torch.int32)
    wild = indices.clone()
    wild[..., 1] = torch.tensor([2**31 - 1, -(2**31), 2**30, 99, -7, 2**27 + 1] * 4, dtype=torch.int32)[:, None]
    results = []
    for chosen in (indices, wild):
        o, lse = sparse_attention_forward(q, k, v, chosen, layout, 0.25)
        results.append((o, lse, *sparse_attention_backward(q, k, v, chosen, o, lse, do, layout, 0.25)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@both
def test_query_without_blocks_has_zero_output_and_mass(impl):
    q, k, v = (x.requires_grad_() for x in streams())
    indices = select_blocks(q, k, **BLOCKS, cu_seqlens=ENDS)
    indices[5], indices[7, 0] = -1, -1
    o, lse = sparse_attention(q, k, v, indices, block_size=2, cu_seqlens=ENDS, impl=impl)
    assert (
        not o[5].any()
        and (lse[5] == -torch.inf).all()
        and (lse[7, :2] == -torch.inf).all()
        and lse[7, 2:].isfinite().all()
    )
    dq, dk, dv = torch.autograd.grad(o.sum(), (q, k, v))
    assert not dq[5].any() and all(x.isfinite().all() for x in (dq, dk, dv))


@interpreted
@pytest.mark.parametrize("score", ["softmax_sum", "per_head", "official_compat"])
def test_selection_stays_in_its_workspace_if_max_length_is_too_short(score):
    """On a GPU a document's length is not checked: the choice may be wrong, but every chosen block is valid."""
    tokens, queries = 1300, [3, 900, 1100, 1101, 1299]
    q, k, _ = streams(tokens)
    part = query_slice(build_layout(torch.tensor([0, tokens]), num_tokens=tokens, block_size=2), torch.tensor(queries))
    short = replace(part, max_length=8)
    indices = select_blocks(q[queries], k, **BLOCKS, cu_seqlens=short, score=score, impl="triton")
    own = (part.query_position // 2)[:, None]
    assert ((indices[..., 0] >= 0) & (indices[..., 0] < own) & (indices[..., 1] == own)).all()
    if score == "official_compat":
        return
    means = k.view(tokens // 2, 2, 2, 16).mean(1).repeat_interleave(2, 1)  # [blocks, H, D]
    logits = torch.einsum("thd,chd->thc", q[queries], means) / 4
    logits = logits.masked_fill(torch.arange(tokens // 2) >= own[:, None], -torch.inf)
    importance = logits if score == "per_head" else logits.softmax(-1).view(5, 2, 2, -1).sum(2)
    best = importance[..., :512].argmax(-1)  # as many as fit into the workspace
    assert torch.equal(indices[..., 0].long(), best)


# What an implementation does not support
def test_float64_needs_the_reference_and_the_interpreter_refuses_bfloat16():
    for dtype, sentence in (
        (torch.float64, "kernels compute in float32, so they do not take float64; try impl='reference', or float32"),
        (
            torch.bfloat16,
            "on a CPU is Triton's interpreter, whose bfloat16 is wrong; try float32 or float16, or impl='reference'",
        ),
    ):
        o, logits = draw(5, 2, 16, dtype=dtype), draw(5, 2, dtype=dtype)
        assert gate(o, logits).dtype == dtype
        if "triton" in IMPLS:
            with pytest.raises(ValueError, match=sentence):
                gate(o, logits, impl="triton")
            with pytest.raises(ValueError, match=sentence):
                swiglu(o, impl="triton")


@both
def test_float32_logits_with_a_16_bit_stream(impl):
    o, logits = draw(5, 2, 16, dtype=torch.float16).requires_grad_(), draw(5, 2).requires_grad_()
    out = gate(o, logits, impl=impl)
    grads = torch.autograd.grad(out, (o, logits), torch.ones_like(out))
    assert out.dtype == grads[0].dtype == torch.float16 and grads[1].dtype == torch.float32
    torch.testing.assert_close(out, (o.float() * logits.sigmoid()[..., None]).half(), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(
        grads[1], (o.float().sum(-1) * logits.sigmoid() * (1 - logits.sigmoid())), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(
        ValueError, match=r"gate_logits of torch.bfloat16 must have o's dtype torch.float16, or float32"
    ):
        gate(o, logits.bfloat16(), impl=impl)


@both
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_main_stream_may_be_any_integer_dtype(dtype, impl):
    o, logits = draw(5, 2, 16), draw(5, 2)
    for value in (0, 1, 2**32):  # the lower half of the last one is 0
        if value <= 1 or dtype == torch.int64:
            main = torch.tensor([[value]], dtype=dtype)
            out, _ = gate_and_align(o, o + 1, logits, main=main, impl=impl)
            named, _ = gate_and_align(o, o + 1, logits, main="full" if value else "sparse", impl=impl)
            assert torch.equal(out, named)


# Empty tensors
@both
@pytest.mark.parametrize(("tokens", "heads"), [(0, 4), (3, 0), (0, 0)])
def test_no_tokens_or_heads(tokens, heads, impl):
    o, logits = draw(tokens, heads, 16).requires_grad_(), draw(tokens, heads).requires_grad_()
    out, loss = gate_and_align(o, o * 2, logits, main="full", impl=impl)
    assert out.shape == o.shape and loss == 0
    for result in (out, gate(o, logits, impl=impl)):
        grads = torch.autograd.grad(result.sum() + loss, (o, logits), retain_graph=True)
        assert [g.shape for g in grads] == [o.shape, logits.shape]
    x = draw(tokens, 8).requires_grad_()
    y = swiglu(x, impl=impl)
    assert y.shape == (tokens, 4) and torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@both
def test_no_tokens_in_the_other_operators(impl):
    sizes = {"num_kv_heads": 1, "group_size": 2, "head_dim": 16, "num_gates": 2}
    mixed, none = torch.zeros(0, 66).requires_grad_(), torch.zeros(0, dtype=torch.int64)
    found = qkv_rope(mixed, draw(3, 16), none, impl=impl, **sizes)
    assert [tuple(x.shape) for x in found] == [(0, 2, 16), (0, 1, 16), (0, 1, 16), (0, 2)]
    assert torch.autograd.grad(sum(x.sum() for x in found), mixed)[0].shape == mixed.shape
    hidden, weight = torch.zeros(0, 8).requires_grad_(), draw(5, 8).requires_grad_()
    losses = linear_cross_entropy(hidden, weight, none, impl=impl)
    grads = torch.autograd.grad(losses.sum(), (hidden, weight))
    assert losses.shape == (0,) and grads[0].shape == (0, 8) and not grads[1].any()


@pytest.mark.parametrize(
    ("wanted", "impl"),
    [*((some, "reference") for some in ((0,), (1,), (2,), (0, 2), (1, 2))), *(((1,), impl) for impl in IMPLS[1:])],
    ids=str,
)
def test_some_of_the_inputs_require_a_gradient(wanted, impl):
    tensors, indices = streams(), select_blocks(*streams()[:2], **BLOCKS, cu_seqlens=ENDS)
    every, some = (
        [x.clone().requires_grad_(of is None or i in of) for i, x in enumerate(tensors)] for of in (None, wanted)
    )
    grad = draw(T, 4, 16, seed=8)
    for call in (
        lambda t: sparse_attention(*t, indices, block_size=2, cu_seqlens=ENDS, impl=impl)[0],
        lambda t: full_attention(*t, cu_seqlens=ENDS, impl=impl)[0],
    ):
        right = torch.autograd.grad(call(every), every, grad)
        found = torch.autograd.grad(call(some), [some[i] for i in wanted], grad)
        assert all(torch.equal(found[n], right[i]) for n, i in enumerate(wanted))


# NaN stays in its document
POISON = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf, "overflowing": 3e37}


PLACES = ("q", "k", "v", "all", "gradient")
INTERPRETED = [("all", "nan"), ("gradient", "nan"), ("k", "inf")]  # only a few, because each takes seconds


@pytest.mark.parametrize(
    ("where", "poison", "impl"),
    [
        *((where, poison, "reference") for where in PLACES for poison in POISON),
        *((*case, impl) for case in INTERPRETED for impl in IMPLS[1:]),
    ],
)
def test_non_finite_values_stay_in_their_document(where, poison, impl):
    clean, grad = streams(), draw(T, 4, 16, seed=8)
    indices = select_blocks(*clean[:2], **BLOCKS, cu_seqlens=ENDS)
    dirty, dirty_grad = [x.clone() for x in clean], grad.clone()
    for name, x in zip("qkv", dirty, strict=True):
        if where in (name, "all"):
            x[3:10] = POISON[poison]
    if where == "gradient":
        dirty_grad[3:10] = POISON[poison]
    outside = torch.ones(T, dtype=torch.bool)
    outside[3:10] = False
    chosen = select_blocks(*dirty[:2], **BLOCKS, cu_seqlens=ENDS, impl=impl)
    assert torch.equal(chosen[outside], indices[outside])

    def run(tensors, upstream, operator):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = operator(*leaves, indices, block_size=2, cu_seqlens=ENDS, impl=impl)
        return [out[0].detach(), *torch.autograd.grad(out[0], leaves, upstream)]

    for name in ("sparse_attention", "full_attention"):
        before, after = (run(*inputs, OPERATORS[name]) for inputs in ((clean, grad), (dirty, dirty_grad)))
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a[outside], b[outside]), name


def test_gpu_reference_equals_cpu_reference():
    """Plain operations replace the fused ones: queries without blocks, NaN in other documents, forward and backward."""
    grad, results = draw(T, 4, 16, seed=8), []
    indices = select_blocks(*streams()[:2], **BLOCKS, cu_seqlens=ENDS)
    indices[12, 0] = -1
    for kind in (torch.Tensor, OffCpuTensor):
        leaves = [x.as_subclass(kind).requires_grad_() for x in streams()]
        with torch.no_grad():
            leaves[2][4] = torch.nan
        out, lse = sparse_attention(*leaves, indices, block_size=2, cu_seqlens=ENDS)
        results.append(
            [x.as_subclass(torch.Tensor).detach() for x in (out, lse, *torch.autograd.grad(out, leaves, grad))]
        )
    outside = torch.ones(T, dtype=torch.bool)
    outside[3:10] = False
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one[outside], other[outside], rtol=1e-5, atol=1e-5)
        assert not one[outside].isnan().any() and not other[outside].isnan().any()
