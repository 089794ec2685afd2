"""Block selection and sparse attention of the modelling file against the kernels' references."""

import pytest
import torch

from ssa_kernels import select_blocks
from ssa_pretrain.huggingface import modelling_ssa as modelling
from support.hf_models import draw_documents, lively_model, padded

H, G, D, SIZE = 4, 2, 16, 16


def draw(tokens: int, *, tied: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns q [T, H, D] and k [T, G, D]; with `tied` most blocks have equal means, and so does their importance.

    Then they are small whole numbers, whose means and products are exact in any order, so equal scores are equal on every processor.
    """
    generator = torch.Generator().manual_seed(tokens)
    q, k = (torch.randn(tokens, heads, D, generator=generator) for heads in (H, G))
    if tied:
        q, k = q.round(), k.round()
        k = k[:SIZE].repeat(-(-tokens // SIZE), 1, 1)[:tokens]
        k[: 3 * SIZE] += 1.0
    return q, k


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("score", "top_k"), [("softmax_sum", 1), ("softmax_sum", 4), ("softmax_sum", 40)])
def test_choice_is_the_references(score, top_k, tied):
    require_same_choice(score, top_k, tied)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("score", "top_k"), [("per_head", 4), ("official_compat", 2), ("official_compat", 16)])
def test_choice_by_other_scores_is_the_references(score, top_k, tied):
    require_same_choice(score, top_k, tied)


def require_same_choice(score: str, top_k: int, tied: bool) -> None:
    """Fails unless each row of a batch with padding anywhere chooses what the reference chooses for its tokens."""
    lengths, width = [1, 16, 17, 333, 515], 520
    rows = [draw(n, tied=tied) for n in lengths]
    wanted = [
        select_blocks(
            q, k, block_size=SIZE, top_k=top_k, cu_seqlens=torch.tensor([0, len(q)], dtype=torch.int32), score=score
        )
        for q, k in rows
    ]
    visible = torch.zeros(len(rows), width, dtype=torch.bool)
    q_BHTD, k_BGSD = (torch.full((len(rows), heads, width, D), 7.0) for heads in (H, G))
    for row, (q, k) in enumerate(rows):
        slots = torch.randperm(width, generator=torch.Generator().manual_seed(row))[: len(q)].sort().values
        visible[row, slots] = True
        q_BHTD[row, :, slots], k_BGSD[row, :, slots] = q.transpose(0, 1), k.transpose(0, 1)
    places = modelling.locate_tokens(visible, 0, width)
    none = torch.zeros(len(rows), dtype=torch.int64)
    assert torch.equal(places.before, none)
    assert torch.equal(places.queries[visible], places.positions[visible]) and (places.positions[~visible] == -1).all()
    means = modelling.block_means(k_BGSD, places.order, none, (width - 1) // SIZE + 1, SIZE)
    config = modelling.SSALlamaConfig(score=score, top_k=top_k, block_size=SIZE)
    found = modelling.choose_blocks(q_BHTD, means, places.positions, D**-0.5, config)
    for row, indices in enumerate(wanted):
        count = min(top_k, found.shape[-1])
        chosen = found[row][:, visible[row]].transpose(0, 1)
        assert torch.equal(chosen[..., :count].int(), indices[..., :count])
        assert (indices[..., count:] == -1).all() and (found[row][:, ~visible[row]] == -1).all()


@pytest.mark.parametrize("score", ["softmax_sum", "per_head"])
def test_packed_rows_of_the_kernels_give_the_same(monkeypatch, score):
    """The path of a prompt on CUDA, here with the kernels' references."""
    model = lively_model(attention_mode="sparse", score=score)
    documents = draw_documents([200, 33, 1])
    tokens, mask = padded(documents, left=[0, 107, 199], width=200)
    mask[0, 90:97] = 0
    calls = []
    with torch.no_grad():
        wanted = model(tokens, attention_mask=mask, use_cache=True)
        monkeypatch.setattr(modelling.SSALlamaModel, "_kernels_serve", lambda *_: True)
        attend = modelling.SSALlamaAttention._kernels
        monkeypatch.setattr(
            modelling.SSALlamaAttention, "_kernels", lambda self, *args: calls.append(1) or attend(self, *args)
        )
        found = model(tokens, attention_mask=mask, use_cache=True)
    assert len(calls) == 2, "once per layer"
    torch.testing.assert_close(found.logits[mask == 1], wanted.logits[mask == 1], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(cache_of(found).layers, cache_of(wanted).layers, strict=True):
        for row, blocks in enumerate(mask.sum(1) // SIZE):
            means, same = (layer.block_means[row, :, :blocks] for layer in (ours, theirs))
            torch.testing.assert_close(means, same, rtol=1e-5, atol=1e-5)


def cache_of(output):
    """Returns the cache of a model's output."""
    return getattr(output, modelling.CACHE_NAME)


@pytest.mark.parametrize("reason", ["cpu", "no kernels"])
def test_plain_torch_serves_what_the_rule_says(monkeypatch, reason):
    if reason == "no kernels":
        monkeypatch.setattr(modelling, "ssa_kernels", None)
    model = lively_model(attention_mode="sparse").model
    assert not model._kernels_serve(torch.zeros(1, 40, dtype=torch.int64), 0)


def test_chunks_of_queries_are_the_whole(monkeypatch):
    model = lively_model(attention_mode="sparse").double()
    tokens = draw_documents([131])[0][None]
    with torch.no_grad():
        wanted = model(tokens).logits
        monkeypatch.setattr(modelling, "QUERIES_PER_CHUNK", 10)
        torch.testing.assert_close(model(tokens).logits, wanted)
        model.set_attn_implementation("eager")
        found = model(tokens, output_attentions=True)
    torch.testing.assert_close(found.logits, wanted, rtol=1e-5, atol=1e-5)  # its softmax is in fp32
    assert found.attentions[0].shape == (1, 4, 131, 131)
    assert ((found.attentions[0] > 0).sum(-1) <= 48).all(), "three blocks of 16 keys"
