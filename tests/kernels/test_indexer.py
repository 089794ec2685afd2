"""The trained scorer's operators against a dense float64 oracle: block mass, choice, loss and its gradients; the kernels in Triton's interpreter."""

import pytest
import torch

from ssa_kernels import block_mass, build_layout, choose_by_index, index_loss, query_slice, query_spans, sample_queries
from support import oracle
from support.errors import relative
from support.kernel_impls import IMPLS

BOUNDS, TOKENS, BLOCK, TOP_K = [0, 1, 17, 17, 70], 78, 4, 3


def make(heads=4, index_heads=2, kv_heads=2, dim=16, tokens=TOKENS, dtype=torch.float32):
    """Returns iq, ik, q, k."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(index_heads * kv_heads, dim), (kv_heads, dim), (heads, 2 * dim), (kv_heads, 2 * dim)]
    return [1.5 * torch.randn(tokens, *shape, generator=generator).to(dtype) for shape in shapes]


def dense_mass(q, k, bounds, block):
    """Returns the block mass [T, G, C] by a dense softmax in float64; differentiable."""
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    mask = oracle.visible(None, bounds, tokens, 1, block)[0]
    starts = torch.tensor([start for start, _ in oracle.where(bounds, tokens)])
    column = (torch.arange(tokens)[None] - starts[:, None]) // block
    columns = -(-tokens // block)
    one_hot = torch.nn.functional.one_hot(column.clamp(0, columns - 1), columns).double() * mask[..., None]
    per_head = []
    for head in range(heads):
        logits = q[:, head].double() @ k[:, head * kv_heads // heads].double().T * dim**-0.5
        per_head.append(torch.einsum("ts,tsc->tc", logits.masked_fill(~mask, -torch.inf).softmax(-1), one_hot))
    return torch.stack(per_head, 1).view(tokens, kv_heads, heads // kv_heads, columns).mean(2)


def dense_loss(iq, ik, q, k, bounds, block, top_k):
    """Returns the loss and the captured mass by their definition, in float64."""
    target, predicted = dense_mass(q.detach(), k.detach(), bounds, block), dense_mass(iq, ik, bounds, block)
    total, captured = 0.0, 0.0
    for token, (start, _) in enumerate(oracle.where(bounds, q.shape[0])):
        own = (token - start) // block
        for group in range(k.shape[1]):
            if own < top_k:
                captured += 1.0
                continue
            t, p = target[token, group, : own + 1], predicted[token, group, : own + 1]
            total = total + (t * (t.log() - p.log())).sum()
            chosen = oracle.best(dict(enumerate(p[:own].tolist())), top_k - 1)
            captured += float(t[[*chosen, own]].sum())
    count = q.shape[0] * k.shape[1]
    return total / count, captured / count


def use_small_tiles(monkeypatch):
    """Makes tiles of 16 rows and steps of 16 keys, so that a short document has inner steps, which every query of a tile sees whole."""
    for name in ("SCORE_ROWS", "STEP_KEYS"):
        monkeypatch.setattr(f"ssa_kernels.indexer.launch.{name}", 16)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("heads", "block"), [(4, 4), (6, 5), (2, 16)])
def test_block_mass_is_that_of_dense_attention(monkeypatch, impl, heads, block):
    if impl == "triton":
        use_small_tiles(monkeypatch)
    _, _, q, k = make(heads=heads)
    found = block_mass(q, k, block_size=block, cu_seqlens=torch.tensor(BOUNDS), impl=impl)
    exact = dense_mass(q, k, BOUNDS, block)
    assert relative(found, exact) < 1e-5
    torch.testing.assert_close(found.sum(-1), torch.ones(TOKENS, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("index_heads", [1, 2])
def test_reference_in_float64_is_the_oracle(index_heads):
    iq, ik, q, k = make(index_heads=index_heads, dtype=torch.float64)
    iq, ik = iq.requires_grad_(), ik.requires_grad_()
    common = {"block_size": BLOCK, "top_k": TOP_K, "cu_seqlens": torch.tensor(BOUNDS)}
    loss, mass = index_loss(iq, ik, q, k, **common)
    grads = torch.autograd.grad(3.0 * loss, (iq, ik))
    exact, exact_mass = dense_loss(iq, ik, q, k, BOUNDS, BLOCK, TOP_K)
    wanted = torch.autograd.grad(3.0 * exact, (iq, ik))
    assert abs(float((loss - exact).detach())) < 1e-12 and abs(float(mass) - exact_mass) < 1e-12
    assert all(relative(found, expected) < 1e-10 for found, expected in zip(grads, wanted, strict=True))
    assert float(loss) > 0.1, "a loss near 0 would prove nothing"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("index_heads", "rows", "block"), [(1, 128, 8), (1, 16, 5), (3, 128, 8), (3, 32, 8), (1, 128, 1)]
)
def test_loss_and_gradients_in_float32(monkeypatch, impl, index_heads, rows, block):
    """Chunks of 128 queries over 150, tiles of several sizes, blocks of several rows per step, and block rows that several documents share a step of.

    With blocks of one key, a row of masses takes two passes.
    """
    bounds, tokens = ([0, 5, 56], 60) if rows == 16 else ([0, 9, 142], 150)
    iq, ik, q, k = make(index_heads=index_heads, tokens=tokens)
    iq, ik = iq.requires_grad_(), ik.requires_grad_()
    if impl == "triton":
        monkeypatch.setattr("ssa_kernels.indexer.launch.WORKSPACE_BYTES", 1)
        monkeypatch.setattr("ssa_kernels.indexer.launch.MOST_WIDTH", 128)
        monkeypatch.setattr("ssa_kernels.indexer.launch._gradient_rows", lambda *_: rows)
        if rows == 16:
            use_small_tiles(monkeypatch)
    common = {"block_size": block, "top_k": TOP_K, "cu_seqlens": torch.tensor(bounds), "impl": impl}
    loss, mass = index_loss(iq, ik, q, k, **common)
    grads = torch.autograd.grad(loss, (iq, ik))
    exact, exact_mass = dense_loss(iq, ik, q, k, bounds, block, TOP_K)
    wanted = torch.autograd.grad(exact, (iq, ik))
    assert relative(loss, exact) < 1e-5 and abs(float(mass) - exact_mass) < 1e-5
    assert all(relative(found, expected) < 1e-5 for found, expected in zip(grads, wanted, strict=True))
    with torch.no_grad():
        again, _ = index_loss(iq, ik, q, k, **common)
    assert torch.equal(again, loss) and not again.requires_grad


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("index_heads", [1, 2])
def test_choice_is_the_best_blocks_and_the_own(impl, index_heads):
    iq, ik, _, _ = make(index_heads=index_heads)
    queries = torch.tensor([0, 1, 16, 17, 28, 29, 40, 57, 69, 70, 77])  # a query takes the interpreter 20 ms
    layout = query_slice(build_layout(torch.tensor(BOUNDS), num_tokens=TOKENS, block_size=BLOCK), queries)
    indices = choose_by_index(iq[queries], ik, block_size=BLOCK, top_k=TOP_K, cu_seqlens=layout, impl=impl)
    mass, spans = dense_mass(iq, ik, BOUNDS, BLOCK), oracle.where(BOUNDS, TOKENS)
    for place, token in enumerate(queries.tolist()):
        own = (token - spans[token][0]) // BLOCK
        for group in range(2):
            blocks = sorted([*oracle.best(dict(enumerate(mass[token, group, :own].tolist())), TOP_K - 1), own])
            assert indices[place, group].tolist() == blocks + [-1] * (TOP_K - len(blocks))


@pytest.mark.skipif("triton" not in IMPLS, reason="needs Triton")
def test_parts_of_the_keys_do_not_change_the_sums(monkeypatch):
    """One index head: the number of programs that share a tile's keys depends on the GPU; the result must not."""
    from ssa_kernels.indexer import launch

    iq, ik, q, k = make(index_heads=1)
    queries = slice(50, TOKENS)  # in one document and at the start of another
    layout = query_slice(build_layout(torch.tensor(BOUNDS), num_tokens=TOKENS, block_size=BLOCK), queries)
    common = {"block_size": BLOCK, "top_k": TOP_K, "cu_seqlens": layout, "impl": "triton"}
    use_small_tiles(monkeypatch)
    iq, q, found = iq[queries].requires_grad_(), q[queries], []
    for programs in (0, 1, 16):  # one part, parts of several steps and of one
        monkeypatch.setattr(launch, "PROGRAMS", programs)
        found.append(index_loss(iq, ik, q, k, **common))
        found[-1] = [found[-1].loss, found[-1].captured_mass, *torch.autograd.grad(found[-1].loss, iq)]
    assert all(torch.equal(one, other) for again in found[1:] for one, other in zip(found[0], again, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_go_to_the_more_recent_block(impl):
    iq, ik, _, _ = make(index_heads=1, tokens=40)
    ik = ik[:1].expand_as(ik).contiguous()
    layout = query_slice(build_layout(torch.tensor([0, 40]), num_tokens=40, block_size=4), slice(39, 40))
    indices = choose_by_index(iq[39:], ik, block_size=4, top_k=3, cu_seqlens=layout, impl=impl)
    assert indices[0, 0].tolist() == [7, 8, 9]


@pytest.mark.parametrize("impl", IMPLS)
def test_spans_and_samples_are_those_queries_of_the_whole(impl):
    """A context rank's queries, and a sample of them, give their own part of the sums; the gradients of the keys add up."""
    iq, ik, q, k = make()
    ik.requires_grad_()
    layout = build_layout(torch.tensor(BOUNDS), num_tokens=TOKENS, block_size=BLOCK)
    common = {"block_size": BLOCK, "top_k": TOP_K, "impl": impl}
    whole, mass = index_loss(iq, ik, q, k, cu_seqlens=layout, **common)
    (grad,) = torch.autograd.grad(whole, ik)
    spans = [[(0, 20), (60, 18)], [(20, 40)]]
    losses, masses, grads = 0.0, 0.0, torch.zeros_like(grad)
    for own in spans:
        part = query_spans(layout, own)
        queries = torch.cat([torch.arange(first, first + length) for first, length in own])
        if impl == "reference":
            chosen = choose_by_index(iq[queries], ik, cu_seqlens=part, **common)
            assert torch.equal(chosen, choose_by_index(iq, ik, cu_seqlens=layout, **common)[queries])
        loss, captured = index_loss(iq[queries], ik, q[queries], k, cu_seqlens=part, **common)
        losses, masses = losses + loss.detach() * len(queries), masses + captured * len(queries)
        grads += torch.autograd.grad(loss, ik)[0] * len(queries)
    torch.testing.assert_close(losses / TOKENS, whole.detach())
    torch.testing.assert_close(masses / TOKENS, mass)
    assert relative(grads / TOKENS, grad) < 1e-5
    sample = sample_queries(layout, [(64, 14)])
    one, _ = index_loss(sample.take(iq), ik, sample.take(q), k, cu_seqlens=sample.layout, **common)
    same = query_slice(layout, slice(64, 78))
    torch.testing.assert_close(one, index_loss(iq[64:], ik, q[64:], k, cu_seqlens=same, **common).loss)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_block_without_any_score_has_a_finite_loss_and_gradient(impl):
    """Index scores of 400 nats apart underflow; logarithms do not."""
    iq, ik, q, k = make(index_heads=1, tokens=32)
    iq, ik = (100.0 * iq.abs()).requires_grad_(), ik.requires_grad_()
    loss, _ = index_loss(iq, ik, q, k, block_size=4, top_k=2, cu_seqlens=torch.tensor([0, 32]), impl=impl)
    grads = torch.autograd.grad(loss, (iq, ik))
    assert 20 < float(loss) < 1e4 and all(bool(grad.isfinite().all()) for grad in grads)


@pytest.mark.parametrize("index_heads", [1, 2])
def test_large_scores_of_queries_without_a_choice_have_no_gradient(index_heads, monkeypatch):
    """The gradients' tile has all queries, a tile of the masses half of them: the first half, which can choose nothing, is written by none."""
    monkeypatch.setattr("ssa_kernels.indexer.launch._gradient_rows", lambda *_: 128)
    iq, ik, q, k = make(index_heads=index_heads, heads=2, kv_heads=1, tokens=64)
    iq, ik = (100.0 * iq).requires_grad_(), ik.requires_grad_()
    loss, _ = index_loss(iq, ik, q, k, block_size=16, top_k=2, cu_seqlens=torch.tensor([0, 64]), impl="triton")
    grads = torch.autograd.grad(loss, (iq, ik))
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert not grads[0][:32].any() and grads[0][32:].any()


def test_documents_do_not_mix_and_nobody_sees_the_future():
    iq, ik, q, k = make()
    common = {"block_size": BLOCK, "top_k": TOP_K, "cu_seqlens": torch.tensor(BOUNDS)}
    before = choose_by_index(iq, ik, **common), block_mass(q, k, block_size=BLOCK, cu_seqlens=common["cu_seqlens"])
    ik, k = ik.clone(), k.clone()
    ik[:17], k[:17], ik[60:], k[60:] = 9.0, 9.0, -9.0, -9.0
    after = choose_by_index(iq, ik, **common), block_mass(q, k, block_size=BLOCK, cu_seqlens=common["cu_seqlens"])
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[17:60], other[17:60])
    assert not torch.equal(before[1][:17], after[1][:17])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype):
    """The same rounded inputs in float64 differ only by the rounding of the gradients."""
    low = [x.to(dtype) for x in make()]
    exact = [x.double() for x in low]
    for tensors in (low, exact):
        tensors[0].requires_grad_(), tensors[1].requires_grad_()
    common = {"block_size": BLOCK, "top_k": TOP_K, "cu_seqlens": torch.tensor(BOUNDS)}
    found, wanted = (
        [out := index_loss(*tensors, **common).loss, *torch.autograd.grad(out, tensors[:2])] for tensors in (low, exact)
    )
    for ours, theirs in zip(found, wanted, strict=True):
        assert relative(ours, theirs) <= 2 * relative(theirs.to(dtype), theirs) + 1e-5


def test_arguments_are_checked():
    iq, ik, q, k = make()
    common = {"block_size": BLOCK, "top_k": TOP_K, "cu_seqlens": torch.tensor(BOUNDS)}
    with pytest.raises(ValueError, match="top_k=0 must be an int of at least 1"):
        choose_by_index(iq, ik, **common | {"top_k": 0})
    with pytest.raises(ValueError, match=r"must have the queries, keys, kv heads and dtype of q"):
        index_loss(iq, ik[:, :1], q, k, **common)
    with pytest.raises(ValueError, match="block_size=256 must be at most 32"):
        choose_by_index(iq, ik, **common | {"block_size": 256, "impl": "triton"})
