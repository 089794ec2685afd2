"""A whole layer as one autograd function against the same layer composed of the public operators."""

import pytest
import torch

from ssa_kernels import build_layout, select_blocks, ssa_attention
from ssa_kernels.ssa_attention.api import Selection, composed
from support.errors import require_as_near
from support.exact_layer import exact_layer

pytestmark = pytest.mark.gpu

LENGTHS = [700, 1, 333, 16, 998]
SELECTION = Selection(block_size=16, top_k=8, score="softmax_sum")


def make(heads=16, kv_heads=2, head_dim=64):
    tokens = sum(LENGTHS)
    sizes = ((tokens, heads, head_dim), (tokens, kv_heads, head_dim), (tokens, kv_heads, head_dim), (tokens, heads))
    inputs = [torch.randn(size, device="cuda", dtype=torch.bfloat16).requires_grad_() for size in sizes]
    ends = torch.tensor([0, *LENGTHS], device="cuda").cumsum(0).to(torch.int32)
    return inputs, build_layout(ends, num_tokens=tokens, block_size=16, max_length=1024)


@pytest.mark.parametrize("main", ["full", "sparse", 1, 0])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(16, 2, 64), (8, 2, 128), (6, 1, 96), (16, 2, 256)])
def test_layer_equals_composed_operators(main, heads, kv_heads, head_dim):
    """The kernels differ only in the order of a few sums: outputs are bit-identical, and gradients are as close to float64."""
    inputs, layout = make(heads, kv_heads, head_dim)
    given = main if isinstance(main, str) else torch.tensor([main], device="cuda")
    common = {"main": given, "weights": (0.7, 1.3), "num_rows": None}
    ours = ssa_attention(*inputs, cu_seqlens=layout, **SELECTION._asdict(), **common)
    theirs = composed(*inputs, layout=layout, selection=SELECTION, scale=head_dim**-0.5, impl=None, **common)
    assert torch.equal(ours.out, theirs.out) and torch.equal(ours.alignment_loss, theirs.alignment_loss)
    torch.testing.assert_close(ours.captured_mass, theirs.captured_mass, rtol=1e-5, atol=0)
    assert 0 < float(ours.captured_mass) <= 1 + 1e-3
    upstream = (torch.randn_like(ours.out), torch.tensor(float(ours.out.numel()), device="cuda"))
    ours_grads = torch.autograd.grad((ours.out, ours.alignment_loss), inputs, upstream)
    their_grads = torch.autograd.grad((theirs.out, theirs.alignment_loss), inputs, upstream)
    leaves, out, loss, _ = exact_layer(*inputs, layout=layout, top_k=SELECTION.top_k, main=given, weights=(0.7, 1.3))
    exact = torch.autograd.grad((out, loss), leaves, [x.double() for x in upstream])
    for name, got, want, right in zip(("q", "k", "v", "gate"), ours_grads, their_grads, exact, strict=True):
        require_as_near(got, want, right, factor=1.2, name=name)


def test_streams_agree_where_blocks_cover_every_document():
    """With enough blocks for the longest document the streams agree: all mass is captured and the loss is nearly 0."""
    inputs, layout = make()
    boundaries = layout.cu_seqlens  # without max_length a document may be of any length, so both streams are computed
    result = ssa_attention(*inputs, block_size=16, top_k=64, cu_seqlens=boundaries, main="sparse")
    known = ssa_attention(*inputs, block_size=16, top_k=64, cu_seqlens=layout, main="sparse")
    _, exact, _, _ = exact_layer(*inputs, layout=layout, top_k=64, main="sparse")
    require_as_near(result.out, known.out, exact, factor=1.5)
    assert float(known.captured_mass) == 1 and float(known.alignment_loss) == 0
    torch.testing.assert_close(result.captured_mass, torch.ones((), device="cuda"), rtol=0, atol=1e-3)
    assert float(result.alignment_loss) < 1e-5


def test_a_selection_of_one_s_own():
    """The layer is the one of the blocks that it returns."""
    inputs, layout = make()
    common = {"block_size": 16, "cu_seqlens": layout, "main": "sparse"}

    def newest(q, k, layout):
        return select_blocks(q, k, block_size=16, top_k=1, cu_seqlens=layout)

    ours = ssa_attention(*inputs, top_k=SELECTION.top_k, select=newest, **common)
    theirs = ssa_attention(*inputs, top_k=1, **common)
    assert torch.equal(ours.out, theirs.out) and torch.equal(ours.alignment_loss, theirs.alignment_loss)


def test_without_a_gate():
    inputs, layout = make()
    result = ssa_attention(*inputs[:3], None, cu_seqlens=layout, main="full", **SELECTION._asdict())
    torch.autograd.grad(result.out.sum() + result.alignment_loss, inputs[:3])


def test_host_never_waits_for_the_device():
    inputs, layout = make()
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            result = ssa_attention(*inputs, cu_seqlens=layout, main="full", **SELECTION._asdict())
            torch.autograd.backward(
                (result.out, result.alignment_loss),
                (torch.ones_like(result.out), torch.ones_like(result.alignment_loss)),
            )
        finally:
            torch.cuda.set_sync_debug_mode("default")
