"""The configuration of the modelling file: its rules, its modes, and what sparse mode refuses."""

import pytest
import torch

from ssa_pretrain.config import AttentionConfig, Score
from ssa_pretrain.huggingface.modelling_nsa import NSALlamaConfig
from ssa_pretrain.huggingface.modelling_ssa import SSALlamaConfig, SSALlamaForCausalLM, SSALlamaModel
from support.hf_models import draw_documents, lively_model


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_mode": "sparce"}, "attention_mode=sparce must be full or sparse; try sparse"),
        ({"block_size": 24}, "block_size=24 must be 16, 32, 64 or 128 keys; try 16"),
        ({"top_k": 0}, "top_k=0 must be at least 1: the own block is always chosen; try 16"),
        ({"score": "max"}, "score=max must be softmax_sum, per_head, official_compat or indexer; try softmax_sum"),
        ({"index_heads": 0}, "index_heads=0 must be at least 1 index query per kv head; try 1"),
        (
            {"score": "official_compat", "top_k": 17},
            "top_k=17 must lie in 2 to block_size=16 under score=official_compat; try 16",
        ),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=32; try 32"),
        ({"key_convolution": 4}, "key_convolution=4 must be 0, 3 or 5 tokens; try 3"),
        (
            {"key_convolution": 3, "score": "indexer"},
            "key_convolution=3 is for blocks that are chosen by mean keys, and score=indexer chooses them by",
        ),
        ({"head_dim": 15}, "head_dim=15 must be even: RoPE rotates pairs; try 16"),
    ],
)
def test_wrong_values_are_refused(fields, message):
    with pytest.raises(Exception, match=message) as refused:
        SSALlamaConfig(**fields)
    assert isinstance(refused.value, ValueError) or isinstance(refused.value.__cause__, ValueError)
    with pytest.raises(
        ValueError, match=message
    ):  # values set later, as from_pretrained does, are checked by the model
        sizes = {"vocab_size": 8, "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 1}
        config = SSALlamaConfig(**sizes)
        for name, value in fields.items():
            setattr(config, name, value)
        SSALlamaModel(config)


@pytest.mark.parametrize("size", [8, 16, 24, 32, 64, 128, 256])
@pytest.mark.parametrize("score", list(Score))
def test_rules_are_those_of_training(score, size):
    kind = NSALlamaConfig if score is Score.compressed else SSALlamaConfig
    for top_k in (0, 1, 2, 16, 17, 64, 128):
        allowed = not AttentionConfig(block_size=size, top_k=top_k, score=score).problems()
        try:
            kind(block_size=size, top_k=top_k, score=score.value)
            assert allowed
        except Exception as refused:  # noqa: BLE001 huggingface_hub wraps the ValueError in an error of its own
            assert not allowed, refused


def test_mode_is_chosen_on_loading_and_changed_later(tmp_path):
    model = lively_model(attention_mode="sparse")
    model.save_pretrained(tmp_path)
    tokens = draw_documents([150])[0][None]
    logits = {}
    with torch.no_grad():
        for mode in ("full", "sparse"):
            loaded = SSALlamaForCausalLM.from_pretrained(tmp_path, attention_mode=mode)
            assert loaded.config.attention_mode == mode
            logits[mode] = loaded(tokens).logits
        for mode in ("full", "sparse"):
            model.config.attention_mode = mode
            assert torch.equal(model(tokens).logits, logits[mode])
    assert not torch.allclose(logits["full"], logits["sparse"])
    wider = SSALlamaForCausalLM.from_pretrained(tmp_path, top_k=64).eval()
    with torch.no_grad():
        torch.testing.assert_close(wider(tokens).logits, logits["full"], rtol=1e-5, atol=1e-5)
    model.config.attention_mode = "both"
    with pytest.raises(ValueError, match="attention_mode=both must be full or sparse; try sparse"):
        model(tokens)


def test_layer_types_follow_the_mode_and_are_not_saved():
    config = SSALlamaConfig(num_hidden_layers=2, attention_mode="sparse")
    assert config.layer_types == ["ssa_sparse"] * 2
    config.attention_mode = "full"
    assert getattr(config, "layer_types", None) is None
    for mode, layer in (("full", "ssa_convolved"), ("sparse", "ssa_convolved_sparse")):
        assert SSALlamaConfig(num_hidden_layers=2, attention_mode=mode, key_convolution=3).layer_types == [layer] * 2
    assert not hasattr(SSALlamaConfig(attention_mode="sparse", score="indexer"), "layer_types")
    assert "layer_types" not in config.to_dict()
    assert config.to_dict()["top_k"] == 16 and SSALlamaConfig(**config.to_dict()).to_dict() == config.to_dict()


def test_top_k_of_the_model_is_not_samplings(tmp_path):
    model = lively_model(top_k=3)
    assert model.generation_config.top_k is None
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    loaded = SSALlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.top_k is None and loaded.config.top_k == 3


def test_plans_name_every_projection():
    model = lively_model(score="indexer")
    linear = {n for n, m in model.model.layers[0].named_modules() if isinstance(m, torch.nn.Linear)}
    assert {f"layers.*.{name}" for name in linear} == set(model.config.base_model_tp_plan)
    assert {name for name in linear if "index" in name} == {"self_attn.index_q_proj", "self_attn.index_k_proj"}
    assert not any("index" in name for name in lively_model().config.base_model_tp_plan), "transformers warns of them"
    assert set(model.config.base_model_pp_plan) == {"embed_tokens", "layers", "norm"}


def test_sparse_mode_refuses_what_it_would_get_wrong():
    model = lively_model(attention_mode="sparse")
    tokens = draw_documents([40])[0][None]
    bidirectional, window = torch.ones(2, 1, 1, 40, 40, dtype=torch.bool)
    window = window.tril().triu(-20)
    for mask in (bidirectional, window, torch.zeros(1, 1, 40, 40).masked_fill(~window, float("-inf"))):
        with pytest.raises(ValueError, match=r"attention_mask of four dims must be causal apart from padding .*; try"):
            model(tokens, attention_mask=mask)
    with pytest.raises(ValueError, match=r"attention_mask \(1, 41\) must be \[rows, keys\] with 40 keys; try a mask"):
        model(tokens, attention_mask=torch.ones(1, 41))
    positions = torch.cat([torch.arange(25), torch.arange(15)])[None]
    with pytest.raises(ValueError, match=r"position_ids restart within a row, .*; try a row per document, or"):
        model(tokens, position_ids=positions)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match=r"attn_implementation=flex_attention must be sdpa or eager under .*; try"):
        model(tokens)
