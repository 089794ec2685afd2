"""NSA's modelling file against the training model, on the same weights; its cache against whole forwards; what it refuses."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from ssa_pretrain.config import Method, Score
from ssa_pretrain.huggingface.modelling_nsa import NSALlamaConfig, NSALlamaForCausalLM
from ssa_pretrain.huggingface.modelling_ssa import CACHE_NAME
from support.hf_models import TrainingModel, draw_documents, hf_model, padded, small_config

LENGTHS = [1, 15, 16, 97, 131]


@pytest.fixture(scope="module")
def trained(placement) -> TrainingModel:
    """Returns a training model with a window of 20 keys."""
    return TrainingModel(small_config(method=Method.nsa, score=Score.compressed, window=20), placement)


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_logits_equal_the_training_models(trained, mode):
    """Alone and in batches padded on the left, on the right and on both sides, by sdpa and eager."""
    documents, width = draw_documents(LENGTHS), max(LENGTHS) + 9
    wanted = trained.logits(documents, mode)
    model = hf_model(trained, attention_mode=mode)
    with torch.no_grad():
        for document, logits in zip(documents, wanted, strict=True):
            torch.testing.assert_close(
                model(document[None]).logits[0], logits, rtol=0.0, atol=1e-5 * float(logits.abs().max())
            )
        for implementation, left in (
            ("sdpa", [0] * 5),
            ("eager", [width - n for n in LENGTHS]),
            ("sdpa", [5, 3, 7, 17, 4]),
        ):
            model.set_attn_implementation(implementation)
            tokens, mask = padded(documents, left=left, width=width)
            found = model(tokens, attention_mask=mask).logits
            assert found.isfinite().all(), "padding too"
            for row, logits in enumerate(wanted):
                ours = found[row, left[row] : left[row] + LENGTHS[row]]
                torch.testing.assert_close(ours, logits, rtol=0.0, atol=1e-5 * float(logits.abs().max()))


@pytest.mark.parametrize("mode", ["full", "sparse"])
@pytest.mark.parametrize("static", [False, True])
def test_steps_on_a_cache_equal_whole_forwards(trained, mode, static):
    """A prompt padded on the left, some tokens at once, then one by one, across the ends of blocks and of the window."""
    model, documents = hf_model(trained, attention_mode=mode), draw_documents([70, 52])
    tokens, mask = padded(documents, left=[0, 18], width=70)
    cache = StaticCache(model.config, max_cache_len=80) if static else None
    with torch.no_grad():
        whole, cached = model(tokens, attention_mask=mask).logits, []
        for begin, end in ((0, 40), (40, 45), *((t, t + 1) for t in range(45, 70))):
            out = model(tokens[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            cached.append(out.logits)
    found, whole = (x[mask == 1] for x in (torch.cat(cached, 1), whole))
    torch.testing.assert_close(found, whole, rtol=0.0, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.parametrize("static", [False, True])
def test_means_are_kept_and_those_of_a_plain_cache_are_the_same(trained, static):
    """Steps of several sizes; rows change with the rest; a cache without means gives the same logits."""
    model, size, left = hf_model(trained, attention_mode="sparse"), 16, [0, 18]
    tokens, mask = padded(draw_documents([70, 52]), left=left, width=70)
    kept = StaticCache(config=model.config, max_cache_len=80) if static else DynamicCache(config=model.config)
    plain, order, logits = DynamicCache(), torch.tensor([1, 0]), []
    for cache in (kept, plain):
        with torch.no_grad():
            for begin, end in ((0, 40), (40, 55), (55, 56)):
                model(tokens[:, begin:end], attention_mask=mask[:, :end], **{CACHE_NAME: cache})
            cache.reorder_cache(order)
            last = {"attention_mask": mask[order], CACHE_NAME: cache}
            logits.append(model(tokens[order, 56:], **last).logits)
    for layer in kept.layers:
        assert not hasattr(plain.layers[0], "value_means")
        for held, means in ((layer.keys, layer.block_means), (layer.values, layer.value_means)):
            for row, start in enumerate([left[i] for i in order]):
                count = (70 - start) // size
                blocks = held[row, :, start : start + count * size].unflatten(1, (count, size))
                torch.testing.assert_close(means[row, :, :count], blocks.mean(2), rtol=0.0, atol=1e-6)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_weight_and_keys_and_values_through_their_means(trained):
    """With gates that leave the compressed branch alone, a key projection that only the means use still has a gradient."""
    model = hf_model(trained, attention_mode="sparse")
    tokens = draw_documents([64])[0][None]
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in model.parameters())
    attention = model.model.layers[0].self_attn
    seen = {}
    hook = attention.k_proj.register_forward_hook(
        lambda _, __, out: seen.update(k=out.requires_grad_()) or out.retain_grad()
    )
    branches = attention._plain_branches
    attention._plain_branches = lambda *a, **k: ([branches(*a, **k)[0][0], *[torch.zeros(1, 64, 4, 16)] * 2], None)
    model(tokens, labels=tokens).loss.backward()
    hook.remove()
    del attention._plain_branches
    norms = seen["k"].grad[0].norm(dim=-1)
    assert (norms[:48] > 0).all()
    assert not norms[63:].any(), "a block's last token is the first that sees it, and block 3's is the last of the row"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"score": "softmax_sum"}, "score=softmax_sum must be compressed or official_compat; try compressed"),
        (
            {"attention_gate": False},
            "attention_gate=False leaves NSA's branches without the gates that sum them; try True",
        ),
        ({"key_convolution": 3}, "key_convolution=3 has no place in NSA; try 0"),
        ({"window": 0}, "window=0 must be at least 1: a token sees itself; try 128"),
    ],
)
def test_wrong_constants_are_refused(fields, sentence):
    with pytest.raises(Exception, match=sentence):  # huggingface_hub wraps the ValueError in an error of its own
        NSALlamaConfig(**fields)


def test_other_attention_functions_are_refused(trained):
    model = hf_model(trained)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attn_implementation=flex_attention must be sdpa or eager"):
        model(draw_documents([5])[0][None])
    assert isinstance(model, NSALlamaForCausalLM)
