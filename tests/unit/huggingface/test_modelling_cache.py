"""The sparse cache layers: block means as tokens arrive, and every operation of transformers' caches."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

from ssa_pretrain.huggingface import modelling_ssa as modelling
from support.hf_models import draw_documents, lively_model, padded

SIZE, WIDTH = 16, 120
LEFT = [0, 21, 80]


def filled(static: bool, steps: list[int], dtype: torch.dtype = torch.float32):
    """Returns (model, cache, tokens, mask) after the first sum(steps) tokens of three rows padded on the left, in some calls."""
    model = lively_model(attention_mode="sparse").to(dtype)
    documents = draw_documents([WIDTH - left for left in LEFT])
    tokens, mask = padded(documents, left=LEFT, width=WIDTH)
    cache = StaticCache(config=model.config, max_cache_len=WIDTH) if static else DynamicCache(config=model.config)
    run(model, cache, tokens, mask, steps)
    return model, cache, tokens, mask


def run(model, cache, tokens, mask, steps: list[int], begin: int = 0) -> torch.Tensor:
    """Returns the logits of `sum(steps)` tokens from `begin` on, passed in some calls."""
    found = []
    for step in steps:
        end = begin + step
        with torch.no_grad():
            name = {modelling.CACHE_NAME: cache}
            found.append(model(tokens[:, begin:end], attention_mask=mask[:, :end], **name).logits)
        begin = end
    return torch.cat(found, dim=1)


def require_means(cache, length: int, left: list[int]) -> None:
    """Fails unless each complete block's mean is that of the layer's keys."""
    for layer in cache.layers:
        assert hasattr(layer, "block_means")
        for row, start in enumerate(left):
            for block in range((length - start) // SIZE):
                keys = layer.keys[row, :, start + block * SIZE : start + (block + 1) * SIZE]
                torch.testing.assert_close(layer.block_means[row, :, block], keys.mean(1), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("steps", [[WIDTH], [1] * 50, [7, 33, 1, 16, 15], [100, 1, 1]])
def test_means_are_those_of_the_keys_however_tokens_arrive(static, steps):
    _, cache, _, _ = filled(static, steps)
    require_means(cache, sum(steps), LEFT)


CROPPED = [False, True] if hasattr(StaticLayer, "crop") else [False]  # transformers crops static layers from 5.24 on


@pytest.mark.parametrize("static", CROPPED)
def test_cropped_cache_goes_on_as_if_nothing_had_been(static):
    """Other tokens, cropped within a block, must leave no trace in the means."""
    model, cache, tokens, mask = filled(static, [90])
    with torch.no_grad():
        run(model, cache, tokens.flip(0), mask, [5, 13, 1], begin=90)
    cache.crop(-19)
    found = run(model, cache, tokens, mask, [1] * 30, begin=90)
    require_means(cache, WIDTH, LEFT)
    _, fresh, _, _ = filled(static, [90])
    torch.testing.assert_close(found, run(model, fresh, tokens, mask, [1] * 30, begin=90), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("static", [False, True])
def test_rows_change_together(static):
    model, cache, tokens, mask = filled(static, [90])
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    require_means(cache, 90, [LEFT[i] for i in order])
    found = run(model, cache, tokens[order], mask[order], [1] * 20, begin=90)
    _, whole, _, _ = filled(static, [90])
    wanted = run(model, whole, tokens, mask, [1] * 20, begin=90)
    torch.testing.assert_close(found, wanted[order], rtol=1e-5, atol=1e-5)
    if not static:
        cache.batch_repeat_interleave(2)
        require_means(cache, 110, [LEFT[i] for i in (2, 2, 0, 0, 0, 0)])
        cache.batch_select_indices(torch.tensor([1, 4]))
        require_means(cache, 110, [LEFT[2], LEFT[0]])
        assert cache.layers[0].block_means.shape[0] == 2


@pytest.mark.parametrize("static", [False, True])
def test_reset_and_copied_caches_start_clean(static):
    model, cache, tokens, mask = filled(static, [60])
    copied = copy.deepcopy(cache)
    cache.reset()
    found = run(model, cache, tokens.flip(1), torch.ones_like(mask), [40, 1])
    require_means(cache, 41, [0, 0, 0])
    _, fresh, _, _ = filled(static, [1])
    fresh.reset()
    torch.testing.assert_close(found, run(model, fresh, tokens.flip(1), torch.ones_like(mask), [40, 1]))
    require_means(copied, 60, LEFT)


def test_cache_without_block_means_gives_the_same():
    model, cache, tokens, mask = filled(False, [90])
    plain = DynamicCache()
    run(model, plain, tokens, mask, [90])
    assert not hasattr(plain.layers[0], "block_means")
    steps = {"steps": [1, 5, 1], "begin": 90}
    found, wanted = (run(model, c, tokens, mask, **steps) for c in (plain, cache))
    real = mask[:, 90:97] == 1
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("static", [False, True])
def test_gaps_in_a_row_move_no_block(static):
    """Right padding followed by new tokens, as generation from a batch padded on the right makes it, is the text without the padding."""
    model, cache, tokens, mask = filled(static, [1], torch.float64)
    cache.reset()
    mask = torch.ones_like(mask)
    mask[1, 40:59], mask[2, 3:4], mask[2, 70:90] = 0, 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found, begin = [], 0
    for step in (60, 1, 15, *[1] * 44):
        end = begin + step
        name = {modelling.CACHE_NAME: cache, "position_ids": positions[:, begin:end]}
        with torch.no_grad():
            found.append(model(tokens[:, begin:end], attention_mask=mask[:, :end], **name).logits)
        begin = end
    for row, logits in enumerate(torch.cat(found, dim=1)):
        real = mask[row] == 1
        with torch.no_grad():
            wanted = model(tokens[row, real][None]).logits[0]
        torch.testing.assert_close(logits[real], wanted, rtol=1e-9, atol=1e-9)


def test_full_mode_uses_transformers_own_layers():
    model = lively_model(attention_mode="full")
    with torch.no_grad():
        cache = getattr(model(draw_documents([20])[0][None], use_cache=True), modelling.CACHE_NAME)
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicLayer"] * 2
