"""The trained scorer's kernels on a GPU, in bf16 and full size: against float64 on the same inputs, beside the reference's own distance from it."""

import pytest
import torch

from ssa_kernels import block_mass, build_layout, choose_by_index, full_attention, index_loss, sample_queries
from ssa_kernels.indexer import launch
from support.errors import relative, require_as_near

pytestmark = pytest.mark.gpu

BOUNDS = [0, 1, 700, 700, 2900]
TOKENS = 3000


def make(tokens=TOKENS, heads=16, index_heads=1, kv_heads=2, dim=64, size=1.5):
    """Returns iq, ik, q, k in bf16."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(index_heads * kv_heads, dim), (kv_heads, dim), (heads * kv_heads, dim), (kv_heads, dim)]
    return [(size * torch.randn(tokens, *s, device="cuda", generator=generator)).bfloat16() for s in shapes]


def layout_of(block_size, bounds=BOUNDS, tokens=TOKENS):
    return build_layout(torch.tensor(bounds, device="cuda"), num_tokens=tokens, block_size=block_size)


def gradients(tensors, layout, top_k, impl):
    """Returns loss, captured mass and the gradients of iq and ik."""
    iq, ik, q, k = (x.detach() for x in tensors)
    iq, ik = iq.requires_grad_(), ik.requires_grad_()
    sizes = {"block_size": layout.block_size, "top_k": top_k}
    loss, mass = index_loss(iq, ik, q, k, **sizes, cu_seqlens=layout, impl=impl)
    return [loss.detach(), mass, *torch.autograd.grad(loss, (iq, ik))]


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (3, 80), (16, 64), (32, 128)])
def test_block_mass(block_size, heads, dim):
    _, _, q, k = make(heads=heads, dim=dim)
    common = {"block_size": block_size, "cu_seqlens": layout_of(block_size)}
    exact = block_mass(q.double(), k.double(), **common, impl="reference")
    baseline = block_mass(q, k, **common, impl="reference")
    found = block_mass(q, k, **common)
    require_as_near(found, baseline, exact, factor=2.0, floor=1e-5)
    assert torch.equal(found, block_mass(q, k, **common))


@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize(("index_heads", "dim"), [(1, 64), (1, 128), (2, 96), (4, 64)])
def test_loss_and_gradients(monkeypatch, block_size, index_heads, dim):
    """By chunks of a few hundred queries. Products in bf16 round the gradient of the scores, as attention's backward does: 2^-9 of a term."""
    monkeypatch.setattr(launch, "WORKSPACE_BYTES", 2**20)
    tensors, layout = make(index_heads=index_heads, dim=dim), layout_of(block_size)
    found = gradients(tensors, layout, 4, "triton")
    baseline = gradients(tensors, layout, 4, "reference")
    exact = gradients([x.double() for x in tensors], layout, 4, "reference")
    names = ("loss", "captured mass", "iq", "ik")
    for name, ours, theirs, wanted in zip(names, found, baseline, exact, strict=True):
        require_as_near(ours, theirs, wanted, factor=3.0, floor=1e-3 if name == "captured mass" else 1e-5, name=name)
    again = gradients(tensors, layout, 4, "triton")
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@pytest.mark.parametrize(("block_size", "top_k"), [(16, 16), (64, 4), (128, 8), (128, 16)])
def test_choice_has_the_largest_scores(block_size, top_k):
    """Scores that bf16 products leave within 1e-4 of each other may change places."""
    iq, ik, _, _ = make()
    layout = layout_of(block_size)
    common = {"block_size": block_size, "cu_seqlens": layout}
    found = choose_by_index(iq, ik, top_k=top_k, **common)
    exact = choose_by_index(iq.double(), ik.double(), top_k=top_k, **common, impl="reference")
    mass = block_mass(iq.double(), ik.double(), **common, impl="reference")
    ours, theirs = (torch.where(x >= 0, mass.gather(2, x.clamp(min=0).long()), 0.0).sum(-1) for x in (found, exact))
    assert torch.equal(found < 0, exact < 0) and float((theirs - ours).abs().max()) < 1e-4
    assert float((found != exact).any(-1).float().mean()) < 0.01
    assert torch.equal(found, choose_by_index(iq, ik, top_k=top_k, **common))


def test_a_sample_of_long_rows_does_not_wait_and_needs_little_memory():
    """Two rows of 32k in blocks of 16: 2,048 blocks a row, and an eighth of the queries."""
    tokens = 65536
    tensors = make(tokens=tokens)
    layout = build_layout(
        torch.tensor([0, tokens // 2, tokens], device="cuda"), num_tokens=tokens, block_size=16, max_length=tokens // 2
    )
    sample = sample_queries(layout, [(4096, 4096), (60000, 4096)])
    iq, ik, q, k = tensors
    arguments = (sample.take(iq).requires_grad_(), ik.requires_grad_(), sample.take(q), k)
    common = {"block_size": 16, "top_k": 16, "cu_seqlens": sample.layout}
    torch.autograd.grad(index_loss(*arguments, **common).loss, arguments[:2])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, mass = index_loss(*arguments, **common)
        grads = torch.autograd.grad(loss, arguments[:2])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < 16 * launch.WORKSPACE_BYTES
    assert bool(loss.isfinite()) and 0 < float(mass) < 1 and all(bool(grad.isfinite().all()) for grad in grads)


def test_mass_of_chosen_blocks_is_that_of_the_log_sum_exps():
    """The target is full attention's own: its sum over some blocks is what the streams' log-sum-exps give."""
    from ssa_kernels import captured_mass, sparse_attention

    iq, ik, q, k = make()
    layout = layout_of(64)
    indices = choose_by_index(iq, ik, block_size=64, top_k=4, cu_seqlens=layout)
    v = torch.zeros_like(k)
    _, lse_full = full_attention(q, k, v, cu_seqlens=layout, return_lse=True)
    _, lse_sparse = sparse_attention(q, k, v, indices, block_size=64, cu_seqlens=layout)
    mass = block_mass(q, k, block_size=64, cu_seqlens=layout)
    ours = torch.where(indices >= 0, mass.gather(2, indices.clamp(min=0).long()), 0.0).sum(-1)
    theirs = captured_mass(lse_full, lse_sparse).view(TOKENS, 2, -1).mean(2)
    assert relative(ours, theirs) < 1e-3
