"""A convolution of keys in the modelling file: however tokens arrive on a cache, and wherever padding is, the text is that of whole forwards."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

from ssa_pretrain.huggingface import modelling_ssa as modelling
from support.hf_models import draw_documents, lively_model, padded, require_beams_and_drafts

LENGTHS, NEW = [70, 33, 2], 24
LEFT = [70 - n for n in LENGTHS]
MODES = pytest.mark.parametrize("mode", ["full", "sparse"])
STATIC = pytest.mark.parametrize("static", [False, True])


def convolved(mode: str, **changed):
    """Returns a model whose convolution changes its keys a lot."""
    fields = {"attention_mode": mode, "key_convolution": 5, "qk_norm": True, "initializer_range": 0.5}
    model = lively_model(**(fields | changed))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_conv.weight.normal_(generator=torch.Generator().manual_seed(7))
    return model


def cache_for(model, static: bool, length: int):
    return StaticCache(config=model.config, max_cache_len=length) if static else DynamicCache(config=model.config)


def require_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Fails unless logits differ by at most 1e-5 of the largest: their sums are in another order."""
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-5 * float(wanted.abs().max()))


def run(model, cache, tokens, mask, steps: list[int], begin: int = 0) -> torch.Tensor:
    """Returns the logits of `sum(steps)` tokens from `begin` on, passed in some calls with positions as generate makes them."""
    found, positions = [], (mask.cumsum(1) - 1).clamp(min=0)
    for step in steps:
        end = begin + step
        arguments = {modelling.CACHE_NAME: cache, "position_ids": positions[:, begin:end]}
        with torch.no_grad():
            found.append(model(tokens[:, begin:end], attention_mask=mask[:, :end], **arguments).logits)
        begin = end
    return torch.cat(found, dim=1)


def require_whole(model, logits, tokens, mask) -> None:
    """Fails unless the logits of each row's tokens are those of the row alone, without padding and cache."""
    for row, found in enumerate(logits):
        real = mask[row, : len(found)] == 1
        with torch.no_grad():
            wanted = model(tokens[row, : len(found)][real][None], use_cache=False).logits[0]
        require_close(found[real], wanted)


@MODES
def test_generated_tokens_are_those_of_whole_forwards(mode):
    """From a batch padded on the left, with texts shorter than the filters."""
    model = convolved(mode)
    tokens, mask = padded(documents := draw_documents(LENGTHS), left=LEFT, width=70)
    greedy = {"attention_mask": mask, "do_sample": False, "max_new_tokens": NEW}
    dynamic, static = (model.generate(tokens, cache_implementation=name, **greedy) for name in ("dynamic", "static"))
    assert torch.equal(dynamic, static)
    for row, document in enumerate(documents):
        text = document[None]
        with torch.no_grad():
            for _ in range(NEW):
                text = torch.cat([text, model(text, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(dynamic[row, LEFT[row] :], text[0])
        assert len(set(text[0, -NEW:].tolist())) > 3, "a text that repeats itself proves little"


@STATIC
@MODES
def test_gaps_and_any_steps(mode, static):
    """More tokens than the cache keeps, in steps of all sizes, with padding at either side and between, wider than the filters."""
    model, width = convolved(mode), 300
    tokens = torch.stack(draw_documents([width] * 3))
    mask = torch.ones_like(tokens)
    mask[1, 40:59], mask[2, :30], mask[2, 70:90], mask[2, 171] = 0, 0, 0, 0
    steps = [150, 1, 1, 3, 20, *[1] * 9, 116]
    require_whole(model, run(model, cache_for(model, static, width), tokens, mask, steps), tokens, mask)


CROPPED = [False, True] if hasattr(StaticLayer, "crop") else [False]  # transformers crops static layers from 5.24 on


@pytest.mark.parametrize("static", CROPPED)
def test_a_cropped_cache_goes_on_as_if_nothing_had_been(static):
    """Up to as many tokens as are kept; beyond, it is refused, because the keys before are gone."""
    model, width = convolved("sparse"), 320
    tokens, mask = torch.stack(draw_documents([width] * 2)), torch.ones(2, width, dtype=torch.int64)
    cache = cache_for(model, static, width)
    run(model, cache, tokens, mask, [20])
    run(model, cache, tokens.flip(0), mask, [60], begin=20)
    cache.crop(-60)
    logits = [run(model, cache, tokens, mask, [170, 1], begin=20)]
    run(model, cache, tokens.flip(0), mask, [1] * 3 + [121], begin=191)
    cache.crop(-124)
    logits.append(run(model, cache, tokens, mask, [1] * 9 + [20], begin=191))
    with torch.no_grad():
        wanted = model(tokens[:, :220], use_cache=False).logits[:, 20:]
    require_close(torch.cat(logits, dim=1), wanted)
    with pytest.raises(
        ValueError, match="a cache of 315 tokens can be cropped by at most 124 tokens with key_convolution"
    ):
        cache.crop(-30)


@STATIC
def test_rows_change_together_and_a_reset_cache_is_clean(static):
    model, width = convolved("sparse"), 120
    tokens, mask = padded(draw_documents([120, 99, 40]), left=[0, 21, 80], width=width)
    cache = cache_for(model, static, width)
    run(model, cache, tokens, mask, [90])
    copied, order = copy.deepcopy(cache), torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    reordered = run(model, cache, tokens[order], mask[order], [1] * 9, begin=90)
    wanted = run(model, copied, tokens, mask, [1] * 9, begin=90)
    require_close(reordered, wanted[order])
    if not static:
        copied.batch_repeat_interleave(2)
        copied.batch_select_indices(torch.tensor([1, 4]))
        kept = run(model, copied, tokens[[0, 2]], mask[[0, 2]], [1], begin=99)
        require_close(kept, run(model, cache, tokens[order], mask[order], [1], begin=99)[[1, 0]])
    cache.reset()
    ones = torch.ones_like(mask)
    require_whole(model, run(model, cache, tokens.flip(1), ones, [3, 1, 30]), tokens.flip(1), ones)


@MODES
def test_beams_and_drafts_are_those_without_a_cache(mode):
    model = convolved(mode)
    tokens, mask = padded(draw_documents(LENGTHS), left=LEFT, width=70)
    require_beams_and_drafts(model, tokens, mask, NEW)


@pytest.mark.parametrize(("mode", "kernels"), [("full", False), ("sparse", True)])
def test_a_compiled_step_has_no_break(monkeypatch, mode, kernels):
    """With the static cache, as generate compiles it; with the decoding kernels' references and without."""
    if kernels:
        monkeypatch.setattr(modelling.SSALlamaModel, "_kernels_serve", lambda *_: False)
        monkeypatch.setattr(modelling.SSALlamaModel, "_kernels_take", lambda *_: True)
    model = convolved(mode, num_hidden_layers=1)
    tokens, logits = torch.stack(draw_documents([150, 150])), []
    cache = StaticCache(config=model.config, max_cache_len=160)
    torch._dynamo.reset()
    step = torch.compile(model.forward, backend="eager", fullgraph=True)
    with torch.no_grad():
        model(tokens[:, :140], **{modelling.CACHE_NAME: cache})
        for i in (140, 141):
            mask = (torch.arange(160) <= i).expand(2, 1, 1, 160)
            arguments = {"attention_mask": mask, "position_ids": torch.full((2, 1), i)}
            logits.append(step(tokens[:, i : i + 1], **arguments, **{modelling.CACHE_NAME: cache}).logits)
        wanted = model(tokens[:, :142], use_cache=False).logits[:, 140:]
    require_close(torch.cat(logits, dim=1), wanted)


def test_gradients_reach_the_filters():
    model = convolved("sparse")
    tokens = draw_documents([64])[0][None]
    model(tokens, labels=tokens).loss.backward()
    assert all(layer.self_attn.k_conv.weight.grad.norm() > 0 for layer in model.model.layers)


@MODES
def test_what_it_would_get_wrong_is_refused(mode):
    model, tokens = convolved(mode), draw_documents([40])[0][None]
    with pytest.raises(
        ValueError, match=r"key_convolution=5 needs a cache that keeps keys before .*; try DynamicCache\("
    ):
        model(tokens, **{modelling.CACHE_NAME: DynamicCache()})
    positions = torch.cat([torch.arange(25), torch.arange(15)])[None]
    with pytest.raises(
        ValueError, match=r"position_ids restart within a row, and under key_conv.*; try a row per document$"
    ):
        model(tokens, position_ids=positions)
    with pytest.raises(ValueError, match=r"key_convolution=5 does not work under tensor parallelism; try device_map"):
        attention = model.model.layers[0].self_attn
        attention.k_conv(torch.zeros(1, 1, 3, 16), torch.zeros(1, 1, 4, 16), None)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(
        ValueError, match=r"attn_implementation=flex_attention must be sdpa or eager under key_conv.*sdpa$"
    ):
        model(tokens)
