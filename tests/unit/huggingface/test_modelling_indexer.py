"""A trained scorer in the modelling file: its choice against the kernels' reference, and its cache, which holds index keys, against whole forwards."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from ssa_kernels import choose_by_index
from ssa_pretrain.huggingface import modelling_ssa as modelling
from support.hf_models import draw_documents, lively_model, padded, require_beams_and_drafts

LENGTHS, NEW = [70, 33, 5], 24
LEFT = [70 - n for n in LENGTHS]


@pytest.fixture(scope="module")
def model():
    """Returns a model with two index queries per kv head, in sparse mode."""
    return lively_model(attention_mode="sparse", score="indexer", index_heads=2)


def by_whole_forwards(model, documents: list[torch.Tensor], count: int) -> list[torch.Tensor]:
    """Returns the likeliest `count` tokens after each document, without cache and padding."""
    found = []
    for document in documents:
        text = document[None]
        with torch.no_grad():
            for _ in range(count):
                text = torch.cat([text, model(text, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        found.append(text[0, len(document) :])
    return found


@pytest.mark.parametrize("top_k", [1, 4, 40])
def test_choice_is_the_references(top_k):
    """Of a batch with padding anywhere; half of the blocks are equal, and so is their mass."""
    G, J, D, size, lengths, width = 2, 3, 16, 16, [1, 16, 17, 333], 340
    generator = torch.Generator().manual_seed(top_k)
    visible = torch.zeros(len(lengths), width, dtype=torch.bool)
    iq, ik = (torch.full((len(lengths), heads, width, D), 7.0) for heads in (G * J, G))
    wanted = []
    for row, length in enumerate(lengths):
        q, k = (torch.randn(length, heads, D, generator=generator) for heads in (G * J, G))
        k[160:320] = k[:160][: len(k[160:320])]
        slots = torch.randperm(width, generator=generator)[:length].sort().values
        visible[row, slots] = True
        iq[row, :, slots], ik[row, :, slots] = q.transpose(0, 1), k.transpose(0, 1)
        ends = torch.tensor([0, length], dtype=torch.int32)
        wanted.append(choose_by_index(q, k, block_size=size, top_k=top_k, cu_seqlens=ends))
    places = modelling.locate_tokens(visible, 0, width)
    config = modelling.SSALlamaConfig(score="indexer", top_k=top_k, block_size=size)
    found = modelling.choose_by_index(iq, ik, places.positions, places.order, D**-0.5, config)
    for row, indices in enumerate(wanted):
        count = min(top_k, found.shape[-1])
        chosen = found[row][:, visible[row]].transpose(0, 1)
        assert torch.equal(chosen[..., :count].int(), indices[..., :count])
        assert (indices[..., count:] == -1).all() and (found[row][:, ~visible[row]] == -1).all()


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_generated_tokens_are_those_of_whole_forwards(model, mode):
    """From a batch padded on the left, with a growing and a static cache, and with a cache that was made without the configuration."""
    model.config.attention_mode = mode
    documents = draw_documents(LENGTHS)
    tokens, mask = padded(documents, left=LEFT, width=70)
    wanted = by_whole_forwards(model, documents, NEW)
    assert all(len(set(text.tolist())) > NEW / 3 for text in wanted), "a text that repeats itself proves little"
    greedy = {"attention_mask": mask, "do_sample": False, "max_new_tokens": NEW}
    for cache in (
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
        {modelling.CACHE_NAME: DynamicCache()},
    ):
        found = model.generate(tokens, **greedy, **cache)[:, 70:]
        assert all(map(torch.equal, found, wanted)), cache
    model.config.attention_mode = "sparse"


def test_beams_and_drafts_are_those_without_a_cache(model):
    """Beams change the cache's rows, rejected drafts crop it."""
    tokens, mask = padded(draw_documents(LENGTHS), left=LEFT, width=70)
    require_beams_and_drafts(model, tokens, mask, NEW)


def test_a_compiled_step_has_no_break():
    model = lively_model(attention_mode="sparse", score="indexer", num_hidden_layers=1)
    tokens, logits = torch.stack(draw_documents([50, 50])), []
    for compiled in (False, True):
        torch._dynamo.reset()
        cache = StaticCache(config=model.config, max_cache_len=53)
        step = torch.compile(model.forward, backend="eager", fullgraph=True) if compiled else model.forward
        mask = torch.ones(2, 1, 1, 53, dtype=torch.bool)
        with torch.no_grad():
            model(tokens[:, :48], **{modelling.CACHE_NAME: cache})
            mask[..., 49:] = False
            arguments = {"attention_mask": mask, "position_ids": torch.full((2, 1), 48)}
            logits.append(step(tokens[:, 48:49], **arguments, **{modelling.CACHE_NAME: cache}).logits)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(logits[0][:, 0], model(tokens[:, :49]).logits[:, -1], rtol=1e-5, atol=1e-5)


def test_packed_rows_of_the_kernels_give_the_same_and_fill_the_cache(model, monkeypatch):
    """The path of a prompt on CUDA, here with the kernels' references, and a step after it."""
    documents = draw_documents([200, 33, 1])
    tokens, mask = padded(documents, left=[0, 107, 199], width=200)
    mask[0, 90:97] = 0
    found, calls = [], []
    attend = modelling.SSALlamaAttention._kernels

    def counted(self, *arguments):
        calls.append(len(arguments))
        return attend(self, *arguments)

    monkeypatch.setattr(modelling.SSALlamaAttention, "_kernels", counted)
    for serves in (False, True):
        monkeypatch.setattr(
            modelling.SSALlamaModel, "_kernels_serve", lambda _, like, __, s=serves: s and like.shape[1] > 1
        )
        with torch.no_grad():
            prompt = model(tokens, attention_mask=mask, use_cache=True)
            longer = torch.nn.functional.pad(mask, (0, 1), value=1)
            cache = {modelling.CACHE_NAME: getattr(prompt, modelling.CACHE_NAME)}
            step = model(tokens[:, :1], attention_mask=longer, **cache)
        found.append(torch.cat([prompt.logits[mask == 1], step.logits[:, 0]]))
    assert calls == [7, 7], "once per layer, with index queries and keys"
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_kernels_serve_what_the_rule_says(model, monkeypatch):
    token, cache = torch.zeros(1, 1, dtype=torch.int64), DynamicCache(config=model.config)
    monkeypatch.setattr(modelling.SSALlamaModel, "_kernels_take", lambda *_: True)
    with torch.no_grad():
        assert not model.model._kernels_decode(token, None, cache), "no decoding kernel knows index keys"
    assert model.model._kernels_serve(token.expand(1, 9), 0)
    monkeypatch.setattr(model.config, "index_heads", 33)
    assert not model.model._kernels_serve(token.expand(1, 9), 0)


@pytest.mark.parametrize("modes", [("full", "sparse"), ("sparse", "full")])
def test_a_cache_of_the_other_mode_is_refused(modes):
    model = lively_model(attention_mode=modes[0], score="indexer")
    tokens = draw_documents([9])[0][None]
    cache = getattr(model(tokens, use_cache=True), modelling.CACHE_NAME)
    model.config.attention_mode = modes[1]
    with pytest.raises(
        ValueError, match=f"attention_mode={modes[1]} cannot go on from a cache of the other mode .*; try a"
    ):
        model(tokens[:, :1], **{modelling.CACHE_NAME: cache})
