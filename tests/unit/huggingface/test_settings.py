"""config.json out and in: the words of transformers 5 and 4, and a sentence for each model that is not trained here."""

import json

import pytest

from ssa_pretrain.config import Config, Method, Score
from ssa_pretrain.huggingface.settings import Mode, SpecialTokens, exported_config, imported_model
from ssa_pretrain.settings.problems import ConfigError

LLAMA_32_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}


def test_out_and_in_gives_the_same_model_and_attention():
    config = Config()
    config.model.name = "x"
    config.model.num_layers, config.model.tie_embeddings, config.model.norm_eps = 3, False, 1e-6
    config.model.rope_scaling.enabled, config.model.rope_scaling.factor = True, 8.0
    config.attention.block_size, config.attention.top_k = 32, 5
    config.attention.gate, config.attention.score = False, Score.per_head
    tokens = SpecialTokens(eos=7, bos=None)
    record = json.loads(json.dumps(exported_config(config, 4096, tokens, Mode.sparse, "bfloat16")))
    assert record["attention_mode"] == "sparse"
    assert (record["eos_token_id"], record["bos_token_id"], record["dtype"]) == (7, None, "bfloat16")
    model, attention, longest = imported_model(record, "x")
    assert longest == config.data.sequence_length
    model.vocab_size = 0
    assert (model, attention) == (config.model, config.attention)


@pytest.mark.parametrize("words", ["transformers 4", "transformers 5"])
def test_llama_of_either_version_of_transformers(words):
    record = dict(LLAMA_32_1B)
    if words == "transformers 5":
        record["rope_parameters"] = {**record.pop("rope_scaling"), "rope_theta": record.pop("rope_theta")}
    model, attention, longest = imported_model(record, "llama")
    assert (model.rope_theta, model.rope_scaling.enabled, model.rope_scaling.factor) == (500000.0, True, 32.0)
    assert (model.num_kv_heads, model.head_dim, model.tie_embeddings, longest) == (8, 64, True, 131072)
    assert (model.vocab_size, model.padded_vocab_size(model.vocab_size)) == (128256, 128256)
    assert not attention.gate


def test_defaults_of_old_files():
    kept = ("model_type", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    record = {key: LLAMA_32_1B[key] for key in kept} | {"vocab_size": 32001, "rope_scaling": None}
    model, _, _ = imported_model(record, "old")
    assert (model.num_kv_heads, model.head_dim, model.rope_theta, model.norm_eps) == (32, 64, 10000.0, 1e-6)
    assert not model.tie_embeddings
    assert not model.rope_scaling.enabled
    assert model.padded_vocab_size(model.vocab_size) == 32001, "rows of padding would take part in the softmax"


def test_a_trained_scorer_needs_its_folder_and_its_method():
    config = Config()
    config.attention.score, config.attention.indexer.heads = Score.indexer, 3
    record = exported_config(config, 4096, SpecialTokens(eos=7, bos=None), Mode.sparse, "bfloat16")
    for method in (Method.ssa, Method.indexer):
        _, attention, _ = imported_model(record, "x", method)
        assert (attention.score, attention.indexer.heads) == (Score.indexer, 3)
    with pytest.raises(
        ConfigError, match="score=indexer is a trained scorer of blocks, which method=moba does not have; try"
    ):
        imported_model(record, "x", Method.moba)
    for other in (record | {"score": "softmax_sum"}, LLAMA_32_1B):
        with pytest.raises(ConfigError, match="method=indexer needs a folder with a trained scorer, and its config"):
            imported_model(other, "x", Method.indexer)


def test_a_convolution_of_keys_needs_a_method_that_has_it():
    config = Config()
    config.attention.key_convolution = 5
    record = exported_config(config, 4096, SpecialTokens(eos=7, bos=None), Mode.sparse, "bfloat16")
    assert imported_model(record, "x", Method.moba)[1].key_convolution == 5
    with pytest.raises(
        ConfigError, match="key_convolution=5 is a convolution of keys, which method=full does not have; try"
    ):
        imported_model(record, "x", Method.full)


def test_nsa_needs_its_release():
    record = LLAMA_32_1B | {"model_type": "llama-nsa", "rope_scaling": None, "block_size": 16, "block_counts": 16}
    _, attention, _ = imported_model(record | {"window_size": 128}, "nsa", Method.nsa)
    assert (attention.window, attention.top_k, attention.gate) == (128, 16, True)
    with pytest.raises(
        ConfigError, match="method=nsa needs model_type=nsa_llama, or llama-nsa with a window_size: no other folder has"
    ):
        imported_model(record, "nsa", Method.nsa)
    with pytest.raises(ConfigError, match=r"try method=nsa|import NSA-1B"):
        imported_model(LLAMA_32_1B, "nsa", Method.nsa)


def test_released_blocks():
    record = LLAMA_32_1B | {"model_type": "llama-nsa", "rope_scaling": None, "block_size": 16, "block_counts": 8}
    _, attention, _ = imported_model(record | {"window_size": 0}, "ssa")
    assert (attention.block_size, attention.top_k, attention.score) == (16, 8, Score.official_compat)
    assert attention.gate


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"model_type": "qwen2"},
            "model_type=qwen2 must be llama, qwen3, ssa_llama, nsa_llama or llama-nsa; import a dense Llama",
        ),
        (
            {"model_type": "qwen3", "use_sliding_window": True},
            "use_sliding_window=true must be false: the training model has no other; import another model",
        ),
        ({"hidden_size": None}, "hidden_size is missing from config.json; copy the folder again"),
        (
            {"attention_bias": True},
            "attention_bias=true must be false: the training model has no other; import another model",
        ),
        ({"hidden_act": "gelu"}, "hidden_act=gelu must be silu: the training model has no other; import another model"),
        (
            {"quantization_config": {"bits": 4}},
            "quantization_config is set, and quantized weights are not read; import the original",
        ),
        (
            {"model_type": "llama-nsa", "block_size": 16, "block_counts": 16, "window_size": 128},
            "window_size=128 is a sliding window, which NSA has and SSA, FullAttn and MoBA do not; try method=nsa",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope_type=yarn must be default or llama3; megatron-core has no other",
        ),
        (
            {"rope_scaling": LLAMA_32_1B["rope_scaling"] | {"low_freq_factor": 2.0}},
            "rope_parameters.low_freq_factor=2.0 must be 1, as in every Llama 3: megatron-core has no other; "
            "import a model with Llama 3's constants",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "rope_scaling": None},
            "partial_rotary_factor=0.5 must be 1; import a Llama",
        ),
    ],
)
def test_models_that_are_not_trained_here(changes, sentence):
    record = {key: value for key, value in (LLAMA_32_1B | changes).items() if value is not None}
    with pytest.raises(ConfigError) as caught:
        imported_model(record, "x")
    assert str(caught.value).strip() == sentence
