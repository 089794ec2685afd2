"""Generation by transformers: 500 tokens with each cache are the tokens without a cache, alone, in a batch padded on the left, and by beams."""

import pytest
import torch

from support.hf_models import VOCAB, draw_documents, lively_model, padded

NEW = 500
LENGTHS = [33, 5, 70]


def require_greedy_without_cache(model, texts: torch.Tensor, mask: torch.Tensor, width: int) -> None:
    """Fails unless each new token is what a forward over the whole text, without a cache, finds most likely after the tokens before it."""
    mask = torch.cat([mask, torch.ones(len(texts), texts.shape[1] - width, dtype=mask.dtype)], dim=1)
    with torch.no_grad():
        logits = model(texts, attention_mask=mask, use_cache=False).logits
    assert torch.equal(logits[:, width - 1 : -1].argmax(-1), texts[:, width:])


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_every_cache_gives_the_tokens_without_one(mode):
    model = lively_model(attention_mode=mode)
    documents = draw_documents(LENGTHS)
    width = max(LENGTHS)
    tokens, mask = padded(documents, left=[width - n for n in LENGTHS], width=width)
    greedy = {"attention_mask": mask, "do_sample": False}
    wanted = model.generate(tokens, max_new_tokens=NEW, **greedy)
    assert wanted.shape == (3, width + NEW)
    assert all(len(row.unique()) > VOCAB / 3 for row in wanted[:, width:]), "a text that repeats itself proves little"
    require_greedy_without_cache(model, wanted, mask, width)
    found = model.generate(tokens, max_new_tokens=NEW, cache_implementation="static", **greedy)
    assert torch.equal(found, wanted)
    alone = model.generate(documents[1][None], max_new_tokens=NEW, do_sample=False)
    assert torch.equal(alone[0, LENGTHS[1] :], wanted[1, width:]), "padding changes nothing"
    begin = wanted[:, : width + 60]
    assert torch.equal(model.generate(tokens, max_new_tokens=60, use_cache=False, **greedy), begin)
    model.set_attn_implementation("eager")
    assert torch.equal(model.generate(tokens, max_new_tokens=60, **greedy), begin)


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_beams_with_a_cache_are_those_without(mode):
    """Beams change places at every step, and the block means with them."""
    model = lively_model(attention_mode=mode)
    documents = draw_documents([40, 21])
    tokens, mask = padded(documents, left=[0, 19], width=40)
    settings = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 100, "do_sample": False}
    beams = {"num_return_sequences": 2, "output_scores": True, "return_dict_in_generate": True}
    wanted = model.generate(tokens, use_cache=False, **settings, **beams)
    for cache in ("dynamic", "static"):
        found = model.generate(tokens, cache_implementation=cache, **settings, **beams)
        assert torch.equal(found.sequences, wanted.sequences), cache
        torch.testing.assert_close(found.sequences_scores, wanted.sequences_scores, rtol=1e-4, atol=1e-4)


def test_sparse_text_differs_from_full_text():
    texts = []
    for mode in ("full", "sparse"):
        model = lively_model(attention_mode=mode)
        texts.append(model.generate(draw_documents([70])[0][None], max_new_tokens=50, do_sample=False))
    assert not torch.equal(*texts)


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_drafts_that_are_taken_back_leave_no_trace(mode):
    """Prompt lookup proposes several tokens at once and crops the cache."""
    model = lively_model(attention_mode=mode)
    document = draw_documents([20])[0]
    tokens = torch.cat([document, document, document[:7]])[None]
    greedy = {"max_new_tokens": 150, "do_sample": False}
    wanted = model.generate(tokens, **greedy)
    assert torch.equal(model.generate(tokens, prompt_lookup_num_tokens=5, **greedy), wanted)
