"""torch.compile traverses every operator without a graph break, forward and backward, with the eager results; torch's checks of custom ops."""

from dataclasses import replace

import pytest
import torch

import ssa_kernels
from ssa_kernels import build_cache, build_layout
from ssa_kernels.custom_ops import attention, decoding, keys, layers

ENDS = torch.tensor([0, 5, 12], dtype=torch.int32)
BLOCKS = {"block_size": 2, "cu_seqlens": ENDS}


def draw(*size, seed=1):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


Q, K, V, LOGITS = draw(12, 4, 8), draw(12, 2, 8, seed=2), draw(12, 2, 8, seed=3), draw(12, 4, seed=4)
MIXED, ANGLES, POSITIONS = draw(12, 2 * (2 * 8 + 8 + 8 + 2)), draw(12, 8), torch.arange(12)
HIDDEN, WEIGHT, LABELS = draw(12, 16), draw(20, 16, seed=5), torch.tensor([*range(11), -100])
SIZES = {"num_kv_heads": 2, "group_size": 2, "head_dim": 8}
NORM, TAPS = (1 + draw(8, seed=6), 1 + draw(8, seed=7)), draw(16, 1, 3, seed=8)
LAYOUT = build_layout(ENDS, num_tokens=12, block_size=2)
INDICES = ssa_kernels.select_blocks(Q, K, top_k=2, **BLOCKS)

# name -> (operator of some leaves, the leaves)
DIFFERENTIABLE = {
    "sparse_attention": (lambda q, k, v: ssa_kernels.sparse_attention(q, k, v, INDICES, **BLOCKS), (Q, K, V)),
    "sparse_attention of a layout": (
        lambda q, k, v: ssa_kernels.sparse_attention(q, k, v, INDICES, block_size=2, cu_seqlens=LAYOUT, scale=0.5),
        (Q, K, V),
    ),
    "full_attention": (
        lambda q, k, v: ssa_kernels.full_attention(q, k, v, cu_seqlens=ENDS, return_lse=True),
        (Q, K, V),
    ),
    "full_attention without lse": (
        lambda q, k, v: ssa_kernels.full_attention(q, k, v, cu_seqlens=LAYOUT)[0],
        (Q, K, V),
    ),
    "gate_and_align": (lambda *x: ssa_kernels.gate_and_align(*x, main="sparse", weights=(1, 0.5)), (Q, Q + 1, LOGITS)),
    "gate_and_align by a number": (
        lambda *x: ssa_kernels.gate_and_align(*x, main=torch.ones(1, dtype=torch.int64)),
        (Q, Q + 1, LOGITS),
    ),
    "window_attention": (lambda *x: ssa_kernels.window_attention(*x, window=3, cu_seqlens=LAYOUT), (Q, K, V)),
    "compressed_attention": (lambda *x: ssa_kernels.compressed_attention(*x, **BLOCKS), (Q, K, V)),
    "gated_sum": (lambda *x: ssa_kernels.gated_sum(x[:3], x[3]), (Q, Q + 1, Q - 2, draw(12, 4, 3, seed=6))),
    "gate": (lambda *x: ssa_kernels.gate(*x), (Q, LOGITS)),
    "swiglu": (lambda x: ssa_kernels.swiglu(x), (MIXED,)),
    "qkv_rope": (lambda x: ssa_kernels.qkv_rope(x, ANGLES, POSITIONS, num_gates=2, **SIZES), (MIXED,)),
    "qkv_rope without gates": (
        lambda x: ssa_kernels.qkv_rope(x, ANGLES, POSITIONS, num_gates=0, **SIZES)[:3],
        (MIXED[:, :64].contiguous(),),
    ),
    "qkv_rope with norms": (
        lambda x, q, k: ssa_kernels.qkv_rope(
            x, ANGLES, POSITIONS, num_gates=2, norm=ssa_kernels.QKNorm(q, k, 1e-5), **SIZES
        ),
        (MIXED, *NORM),
    ),
    "qkv_rope with plain keys": (
        lambda x: ssa_kernels.qkv_rope(x, ANGLES, POSITIONS, num_gates=2, rotate_keys=False, **SIZES),
        (MIXED,),
    ),
    "rope": (lambda x: ssa_kernels.rope(x, ANGLES, POSITIONS), (K,)),
    "rope with a norm": (lambda x, w: ssa_kernels.rope(x, ANGLES, POSITIONS, weight=w), (K, NORM[1])),
    "key_convolution": (lambda k, w: ssa_kernels.key_convolution(k, w, POSITIONS), (K, TAPS)),
    "linear_cross_entropy": (lambda h, w: ssa_kernels.linear_cross_entropy(h, w, LABELS), (HIDDEN, WEIGHT)),
    "ssa_attention": (
        lambda *x: ssa_kernels.ssa_attention(*x, top_k=2, main="full", block_size=2, cu_seqlens=LAYOUT),
        (Q, K, V, LOGITS),
    ),
    "ssa_attention without a gate": (
        lambda q, k, v: ssa_kernels.ssa_attention(q, k, v, None, top_k=2, main="sparse", **BLOCKS)[:2],
        (Q, K, V),
    ),
}


def results(operator, inputs):
    """Returns the operator's results, and the gradients of its leaves for some gradients of the results."""
    leaves = [(2 * x.detach()).requires_grad_() for x in inputs]
    outs = operator(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    loss = sum((x * draw(*x.shape, seed=i)).sum() for i, x in enumerate(outs) if x.requires_grad)
    return [*(x.detach() for x in outs), *torch.autograd.grad(loss, leaves)], [x.requires_grad for x in outs]


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_compiled_operators_equal_eager_ones(name):
    operator, inputs = DIFFERENTIABLE[name]
    expected, wanted = results(operator, inputs)
    found, given = results(compiled(operator), inputs)
    assert given == wanted
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_layer_is_one_graph():
    """Projection, both streams, the output layer and its loss: traced as a whole, with torch's own operations between them."""
    projection, out_weight = draw(16, MIXED.shape[1], seed=6) / 4, draw(32, 16, seed=7) / 4

    def layer(hidden, weight):
        q, k, v, logits = ssa_kernels.qkv_rope(hidden @ projection, ANGLES, POSITIONS, num_gates=2, **SIZES)
        layout = build_layout(ENDS, num_tokens=12, block_size=2)
        out, loss, mass = ssa_kernels.ssa_attention(
            q, k, v, logits, top_k=2, block_size=2, cu_seqlens=layout, main="sparse"
        )
        hidden = hidden + ssa_kernels.swiglu((out.flatten(1) @ out_weight).repeat(1, 2))
        losses = ssa_kernels.linear_cross_entropy(hidden, weight, LABELS)
        return losses.sum() + 10 * loss, mass

    expected, _ = results(layer, (HIDDEN, WEIGHT))
    found, _ = results(compiled(layer), (HIDDEN, WEIGHT))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("score", ["softmax_sum", "per_head"])
def test_selection_compiles(score):
    def choose(q, k):
        return ssa_kernels.select_blocks(q * 1.0, k, top_k=3, score=score, **BLOCKS)

    assert torch.equal(compiled(choose)(Q, K), choose(Q, K))


@pytest.mark.parametrize("paged", [False, True])
def test_a_decoding_step_compiles(paged):
    """Length, append, choice and attention in one graph, which changes the cache as the eager step does."""

    def step(q, k, v, cache):
        cache.seq_lens.add_(1)
        ssa_kernels.append_to_cache(cache, k, v)
        o, lse = ssa_kernels.decode_attention(q, cache, top_k=2, return_lse=True)
        full, _ = ssa_kernels.decode_attention(q, cache, mode="full")
        return o, lse, full, ssa_kernels.select_cached_blocks(q, cache, top_k=2)

    caches = [
        build_cache((2, 8, 2, 8), block_size=2, dtype=torch.float32, num_pages=8 if paged else None) for _ in "ab"
    ]
    run = compiled(step)
    for cache in caches:
        for x in (cache.k, cache.v, cache.means):
            x.zero_()
        if paged:
            cache.page_table.copy_(torch.arange(8).flip(0).view(2, 4))
    for t in range(5):
        inputs = [draw(2, 1, heads, 8, seed=t + heads) for heads in (4, 2, 2)]
        for ours, theirs in zip(run(*inputs, caches[0]), step(*inputs, caches[1]), strict=True):
            assert torch.equal(ours, theirs)
        for name in ("k", "v", "means", "seq_lens"):
            assert torch.equal(getattr(caches[0], name), getattr(caches[1], name))


def test_what_cannot_be_traced_is_refused():
    spans = ssa_kernels.query_spans(LAYOUT, [(0, 4), (8, 4)])

    def refuses(message, call, *args, **named):
        with pytest.raises(ValueError, match=message):
            call(*args, **named)

    refuses("spans of queries is not supported by torch.compile", attention.full_attention, Q, K, V, cu_seqlens=spans)
    named = {"top_k": 2, "main": "full", **BLOCKS}
    refuses("select and sample of ssa_attention", attention.ssa_attention, Q, K, V, None, select=max, **named)
    refuses(
        "group, accumulate_into and z_loss", layers.linear_cross_entropy, HIDDEN, WEIGHT, LABELS, accumulate_into=WEIGHT
    )


def test_wrong_arguments_are_refused_when_a_compiled_program_runs():
    run = compiled(lambda q, k: ssa_kernels.select_blocks(q, k, top_k=0, **BLOCKS))
    with pytest.raises(ValueError, match="top_k=0 must be an int of at least 1"):
        run(Q, K)


def test_torch_checks_the_ops():
    """Schemas, fake results, autograd registration and tracing, by torch's own tests."""
    arrays, sizes = attention.layout_operands(LAYOUT)
    leaves = [x.clone().requires_grad_() for x in (Q, K, V)]
    cache = build_cache((2, 8, 2, 8), block_size=2, dtype=torch.float32)
    cache = replace(cache, **{x: torch.zeros_like(getattr(cache, x)) for x in ("k", "v", "means")})
    cache.seq_lens.fill_(3)
    held = decoding._operands(cache)
    o, lse = ssa_kernels.sparse_attention(Q, K, V, INDICES, **BLOCKS)
    for op, arguments in (
        (attention.select_blocks_op, (Q, K, arrays, sizes, 2, 3, None, "softmax_sum", None)),
        (attention.sparse_attention_op, (*leaves, INDICES, arrays, sizes, 2, None, None)),
        (attention.sparse_attention_backward_op, (Q, Q, K, V, INDICES, o, lse, arrays, sizes, 2, None, None)),
        (attention.full_attention_op, (*leaves, arrays, sizes, None, True, None, None, None)),
        (layers.gate_and_align_op, (leaves[0], Q + 1, LOGITS, None, "full", [1.0, 1.0], None)),
        (layers.qkv_rope_op, (MIXED.clone().requires_grad_(), ANGLES, POSITIONS, [2, 2, 8, 2], None)),
        (keys.qkv_norm_rope_op, (leaves[1].new_ones(12, 68), *NORM, ANGLES, POSITIONS, [2, 2, 8, 2, 1], 1e-5, None)),
        (keys.rope_op, (leaves[1], None, ANGLES, POSITIONS, 1e-5, None)),
        (keys.key_convolution_op, (leaves[1], TAPS, POSITIONS, None)),
        (layers.linear_cross_entropy_op, (HIDDEN.clone().requires_grad_(), WEIGHT, LABELS, True, None)),
        (decoding.append_to_cache_op, (*held, draw(2, 1, 2, 8), draw(2, 1, 2, 8), None, None)),
        (decoding.update_block_means_op, (*held, 2, None, None)),
        (decoding.decode_attention_op, (draw(2, 1, 4, 8), *held, "sparse", 2, None, None, "softmax_sum", None)),
    ):
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(op, arguments, test_utils=tests)
