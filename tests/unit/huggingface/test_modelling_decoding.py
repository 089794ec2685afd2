"""The modelling file's one-token step by `ssa_kernels`, as on CUDA, here with the kernels' references: the results of plain torch."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from ssa_pretrain.huggingface import modelling_ssa as modelling
from support.hf_models import draw_documents, lively_model, padded

LENGTHS = [33, 5, 70]
NEW = 24


@pytest.fixture
def calls(monkeypatch):
    """The modes of the steps that the kernels served."""
    served = []
    monkeypatch.setattr(modelling.SSALlamaModel, "_kernels_serve", lambda *_: False)
    monkeypatch.setattr(modelling.SSALlamaModel, "_kernels_take", lambda *_: True)
    decode = modelling.SSALlamaAttention._decode

    def counted(self, *arguments):
        served.append(self.config.attention_mode)
        return decode(self, *arguments)

    monkeypatch.setattr(modelling.SSALlamaAttention, "_decode", counted)
    return served


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_text_is_that_of_plain_torch(monkeypatch, calls, mode):
    """A batch padded on the left, with a growing and a static cache whose length is no multiple of a block."""
    model = lively_model(attention_mode=mode)
    tokens, mask = padded(draw_documents(LENGTHS), left=[70 - n for n in LENGTHS], width=70)
    greedy = {"attention_mask": mask, "do_sample": False, "max_new_tokens": NEW}
    found = [model.generate(tokens, cache_implementation=cache, **greedy) for cache in ("dynamic", "static")]
    assert calls == [mode] * 2 * 2 * (NEW - 1), "each layer's steps after the prompt, with both caches"
    monkeypatch.setattr(modelling, "ssa_kernels", None)
    monkeypatch.setattr(modelling.SSALlamaModel, "_kernels_take", lambda *_: False)
    wanted = model.generate(tokens, **greedy)
    assert torch.equal(found[0], wanted) and torch.equal(found[1], wanted)


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_gaps_and_cropped_caches(monkeypatch, calls, mode):
    """Padding before and between tokens, and a cache that was longer."""
    model = lively_model(attention_mode=mode)
    tokens = torch.stack(draw_documents([90, 90, 90]))
    mask = torch.ones_like(tokens)
    mask[1, 40:59], mask[2, :30], mask[2, 70:80] = 0, 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = []
    for takes in (True, False):
        monkeypatch.setattr(modelling.SSALlamaModel, "_kernels_take", lambda *_, takes=takes: takes)
        cache, logits = DynamicCache(config=model.config), []
        for begin, end in [(0, 81), *((i, i + 1) for i in range(81, 90))]:
            name = {modelling.CACHE_NAME: cache, "position_ids": positions[:, begin:end]}
            with torch.no_grad():
                if end == 85 and len(logits) == 4:
                    model(tokens[:, :20], attention_mask=torch.ones(3, 104), **{modelling.CACHE_NAME: cache})
                    cache.crop(-20)
                logits.append(model(tokens[:, begin:end], attention_mask=mask[:, :end], **name).logits)
        found.append(torch.cat(logits, dim=1)[mask == 1])
    assert len(calls) == 2 * 9
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_a_compiled_step_has_no_break(calls, mode):
    """With the static cache, as generate compiles it."""
    model = lively_model(attention_mode=mode, num_hidden_layers=1)
    tokens = torch.stack(draw_documents([50, 50]))
    logits = []
    for compiled in (False, True):
        torch._dynamo.reset()
        cache = StaticCache(config=model.config, max_cache_len=53)
        step = torch.compile(model.forward, backend="eager", fullgraph=True) if compiled else model.forward
        with torch.no_grad():
            model(tokens[:, :48], **{modelling.CACHE_NAME: cache})
            mask = torch.ones(2, 1, 1, 53, dtype=torch.bool)
            for i in (48, 49):
                mask[..., i + 1 :] = False
                arguments = {"attention_mask": mask, "position_ids": torch.full((2, 1), i)}
                found = step(tokens[:, i : i + 1], **arguments, **{modelling.CACHE_NAME: cache}).logits
                mask[..., i + 1 :] = True
        logits.append(found)
    assert len(calls) >= 2 + 1
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changed", [{"score": "official_compat"}, {"top_k": 129}, {}])
def test_plain_torch_serves_what_the_rule_says(calls, changed):
    model = lively_model(attention_mode="sparse", **changed).model
    token, cache = torch.zeros(1, 1, dtype=torch.int64), DynamicCache(config=model.config)
    assert not model._kernels_decode(token, None, cache), "with gradients"
    with torch.no_grad():
        assert model._kernels_decode(token, None, cache) == (not changed)
        assert not model._kernels_decode(token, None, None) and not model._kernels_decode(
            token.expand(1, 2), None, cache
        )
        model.config.attention_mode = "full"
        assert model._kernels_decode(token, torch.ones(1, 1, 1, 4, dtype=torch.bool), cache)
        assert not model._kernels_decode(token, torch.zeros(1, 1, 1, 4), cache), "an additive mask"
