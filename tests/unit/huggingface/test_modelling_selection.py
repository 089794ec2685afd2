"""Block selection and sparse attention of the modelling file against the kernels' references."""

import pytest
import torch

from ssa_kernels import build_layout, select_blocks
from ssa_pretrain.huggingface import modelling_ssa as modelling
from support.hf_models import draw_documents, lively_model, padded

H, G, D, SIZE = 4, 2, 16, 16


def draw(tokens: int, *, tied: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns q [T, H, D] and k [T, G, D]; with `tied` most blocks have equal means, and so does their importance."""
    generator = torch.Generator().manual_seed(tokens)
    q, k = (torch.randn(tokens, heads, D, generator=generator) for heads in (H, G))
    if tied:
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
    """Fails unless each row of a batch with padding on the left chooses what the reference chooses for it alone."""
    lengths, width = [1, 16, 17, 333, 515], 520
    rows = [draw(n, tied=tied) for n in lengths]
    wanted = [
        select_blocks(
            q, k, block_size=SIZE, top_k=top_k, cu_seqlens=torch.tensor([0, len(q)], dtype=torch.int32), score=score
        )
        for q, k in rows
    ]
    first = torch.tensor([width - n for n in lengths])
    q_BHTD, k_BGSD = (torch.full((len(rows), heads, width, D), 7.0) for heads in (H, G))
    for row, (q, k) in enumerate(rows):
        q_BHTD[row, :, first[row] :], k_BGSD[row, :, first[row] :] = q.transpose(0, 1), k.transpose(0, 1)
    means = modelling.block_means(k_BGSD, first, torch.zeros_like(first), (width - 1) // SIZE + 1, SIZE)
    own = (torch.arange(width) - first[:, None]).div(SIZE, rounding_mode="floor")
    config = modelling.SSALlamaConfig(score=score, top_k=top_k, block_size=SIZE)
    found = modelling.choose_blocks(q_BHTD, means, own, D**-0.5, config)
    for row, indices in enumerate(wanted):
        count = min(top_k, found.shape[-1])
        chosen = found[row, :, first[row] :].transpose(0, 1)
        assert torch.equal(chosen[..., :count].int(), indices[..., :count])
        assert (indices[..., count:] == -1).all() and (found[row, :, : first[row]] == -1).all()


@pytest.mark.parametrize("score", ["softmax_sum", "per_head"])
def test_packed_rows_of_the_kernels_give_the_same(monkeypatch, score):
    """The path of a prompt on CUDA, here with the kernels' references."""
    model = lively_model(attention_mode="sparse", score=score)
    documents = draw_documents([200, 33, 1])
    tokens, mask = padded(documents, left=[0, 107, 199], width=200)
    with torch.no_grad():
        wanted = model(tokens, attention_mask=mask, use_cache=True)
        calls = []

        def packed(self, first_slot, like, cache):
            calls.append(first_slot.tolist())
            return modelling.pack_rows(first_slot, like.shape[1], self.config.block_size)

        monkeypatch.setattr(modelling.SSALlamaModel, "_documents", packed)
        found = model(tokens, attention_mask=mask, use_cache=True)
    assert calls == [[0, 107, 199]]
    torch.testing.assert_close(found.logits[mask == 1], wanted.logits[mask == 1], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found.past_key_values.layers, wanted.past_key_values.layers, strict=True):
        torch.testing.assert_close(ours.block_means[0], theirs.block_means[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reason", ["cpu", "no kernels"])
def test_plain_torch_serves_what_the_rule_says(monkeypatch, reason):
    model = lively_model(attention_mode="sparse").model
    if reason == "no kernels":
        monkeypatch.setattr(modelling, "ssa_kernels", None)
    assert model._documents(torch.zeros(1, dtype=torch.int64), torch.zeros(1, 40, dtype=torch.int64), None) is None
    if reason == "cpu":
        layout = modelling.pack_rows(torch.tensor([0, 5]), 40, SIZE)
        same = build_layout(torch.tensor([0, 0, 40, 45, 80]), num_tokens=80, block_size=SIZE)
        assert torch.equal(layout.cu_seqlens, same.cu_seqlens)
