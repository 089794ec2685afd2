"""config.json: a run's model in transformers 5's words, and the model of a config.json in ours.

Out: the fields of a Llama, with RoPE in `rope_parameters`, and the fields of modelling_ssa.py: attention_mode, block_size, top_k,
attention_gate, score and qk_norm, with a trained scorer index_heads, with a convolution of keys key_convolution; of modelling_nsa.py also the window. `max_position_embeddings` is the length that the model was trained at, because
tools take it as the longest input.

In: folders told apart by `model_type`. `ssa_llama` and `nsa_llama` are our own, `llama` a Llama of the third generation, `qwen3` a dense Qwen3, which is a
Llama with QK-norm, `llama-nsa` the release of
SSA's authors (released.py). RoPE may be plain, or `llama3` with the constants of Llama 3.1 and later, because megatron-core has no others.
transformers 4 wrote `rope_theta` and `rope_scaling`; both are read. What the training model cannot compute is refused.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ssa_pretrain.config import (
    AttentionConfig,
    Config,
    IndexerConfig,
    Method,
    ModelConfig,
    RopeScalingConfig,
    Score,
)
from ssa_pretrain.config.rules.keys import CONVOLVED
from ssa_pretrain.settings.problems import ConfigError, Problem, join, show

MODEL_TYPE = "ssa_llama"
NSA_TYPE = "nsa_llama"
LLAMA, QWEN3, RELEASED = "llama", "qwen3", "llama-nsa"
FOREIGN = (LLAMA, QWEN3)  # dense models without a gate
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
MOST_PADDING = 128  # the default of model.vocab_divisor


class Mode(StrEnum):
    """The stream that the exported model computes."""

    full = "full"  # every earlier token
    sparse = "sparse"  # the chosen blocks


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids of special tokens; None: the model was trained without it."""

    eos: int | None
    bos: int | None


def exported_config(config: Config, vocab_size: int, tokens: SpecialTokens, mode: Mode, dtype: str) -> dict[str, Any]:
    """Returns the content of an export's config.json.

    Args:
        config: the run.
        vocab_size: rows of the embedding, with padding.
        tokens: special tokens.
        mode: the stream that the model computes if nothing else is asked for.
        dtype: torch's name of the tensors' type.
    """
    model, attention = config.model, config.attention
    nsa = attention.method is Method.nsa
    name = "NSA" if nsa else "SSA"
    modelling = f"modelling_{name.lower()}.{name}Llama"
    return {
        "architectures": [f"{name}LlamaForCausalLM"],
        "model_type": NSA_TYPE if nsa else MODEL_TYPE,
        "auto_map": {
            "AutoConfig": f"{modelling}Config",
            "AutoModel": f"{modelling}Model",
            "AutoModelForCausalLM": f"{modelling}ForCausalLM",
        },
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        "rope_parameters": _rope_parameters(model),
        "max_position_embeddings": config.data.sequence_length,
        "attention_mode": mode.value,
        "block_size": attention.block_size,
        "top_k": attention.top_k,
        "attention_gate": attention.gate,
        "score": attention.score.value,
        "qk_norm": model.qk_norm,
        **({"window": attention.window} if nsa else {}),
        **({"index_heads": attention.indexer.heads} if attention.score is Score.indexer else {}),
        **({"key_convolution": attention.key_convolution} if attention.key_convolution else {}),
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
        "pad_token_id": None,
        "use_cache": True,
        "dtype": dtype,
    }


def _rope_parameters(model: ModelConfig) -> dict[str, Any]:
    if not model.rope_scaling.enabled:
        return {"rope_type": "default", "rope_theta": model.rope_theta}
    return {"rope_type": "llama3", "rope_theta": model.rope_theta, "factor": model.rope_scaling.factor, **LLAMA3}


def imported_model(
    record: dict[str, Any], name: str, method: Method = Method.ssa
) -> tuple[ModelConfig, AttentionConfig, int]:
    """Returns model, attention and longest input of a config.json.

    The attention is what the file says about it: all of it in our own folders, blocks in released ones, otherwise the defaults without a gate.

    Args:
        record: the file's content.
        name: of the model in the banner.
        method: the attention method that the model is imported for; NSA's needs the window of its release.

    Raises:
        ConfigError: it describes a model that ssa_pretrain does not train, with every problem at once.
    """
    if problems := [*_problems(record), *_window_problems(record, method), *_part_problems(record, method)]:
        raise ConfigError(problems)
    heads, hidden, vocab_size = (record[key] for key in ("num_attention_heads", "hidden_size", "vocab_size"))
    rope = _rope(record)
    scaled = rope["rope_type"] == "llama3"
    model = ModelConfig(
        name=name,
        num_layers=record["num_hidden_layers"],
        hidden_size=hidden,
        ffn_hidden_size=record["intermediate_size"],
        num_attention_heads=heads,
        num_kv_heads=record.get("num_key_value_heads") or heads,
        head_dim=record.get("head_dim") or hidden // heads,
        vocab_size=vocab_size,
        # The largest power of two that needs no rows of padding: they would take part in the softmax.
        vocab_divisor=min(MOST_PADDING, vocab_size & -vocab_size),
        tie_embeddings=record.get("tie_word_embeddings", False),
        rope_theta=float(rope["rope_theta"]),
        rope_scaling=RopeScalingConfig(enabled=scaled, factor=float(rope["factor"])) if scaled else RopeScalingConfig(),
        norm_eps=float(record.get("rms_norm_eps", 1e-6)),
        init_std=float(record.get("initializer_range", 0.02)),
        qk_norm=record["model_type"] == QWEN3
        or (record["model_type"] in (MODEL_TYPE, NSA_TYPE) and record.get("qk_norm", False)),
    )
    return model, _attention(record), int(record.get("max_position_embeddings", 8192))


def _attention(record: dict[str, Any]) -> AttentionConfig:
    """Returns the attention that a config.json describes."""
    kind = record["model_type"]
    if kind in FOREIGN:
        return AttentionConfig(gate=False)
    sizes = {"block_size": record["block_size"], "top_k": record["block_counts" if kind == RELEASED else "top_k"]}
    if kind == RELEASED:
        window = {"window": record["window_size"]} if record.get("window_size") else {}
        return AttentionConfig(gate=True, score=Score.official_compat, **sizes, **window)
    more = {"window": record["window"]} if kind == NSA_TYPE else {"key_convolution": record.get("key_convolution", 0)}
    if record["score"] == Score.indexer:
        more["indexer"] = IndexerConfig(heads=record.get("index_heads", 1))
    return AttentionConfig(gate=record["attention_gate"], score=Score(record["score"]), **sizes, **more)


def _problems(record: dict[str, Any]) -> Iterator[Problem]:
    """Yields what the training model cannot compute."""
    kind = record.get("model_type")
    if kind not in (MODEL_TYPE, NSA_TYPE, *FOREIGN, RELEASED):
        kinds = join((*FOREIGN, MODEL_TYPE, NSA_TYPE, RELEASED))
        yield Problem("model_type", str(kind), f"must be {kinds}", "import a dense Llama")
        return
    needed = ["num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"]
    needed += {
        MODEL_TYPE: ["block_size", "top_k", "attention_gate", "score"],
        NSA_TYPE: ["block_size", "top_k", "attention_gate", "score", "window"],
        RELEASED: ["block_size", "block_counts"],
    }.get(kind, [])
    for key in needed:
        if key not in record:
            yield Problem(key, None, "is missing from config.json", "copy the folder again")
    only = {
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "pretraining_tp": 1,
        "use_sliding_window": False,
    }
    for key, wanted in only.items():
        if record.get(key, wanted) != wanted:
            yield Problem(
                key, record[key], f"must be {show(wanted)}: the training model has no other", "import another model"
            )
    if record.get("quantization_config"):
        yield Problem("quantization_config", None, "is set, and quantized weights are not read", "import the original")
    yield from _rope_problems(_rope(record))


def _window_problems(record: dict[str, Any], method: Method) -> Iterator[Problem]:
    """Yields the problem of a sliding window without NSA, or of NSA without one."""
    kind = record.get("model_type")
    key = "window" if kind == NSA_TYPE else "window_size"
    window, has_gates = record.get(key), kind in (NSA_TYPE, RELEASED)
    if window and method is not Method.nsa:
        rule = "is a sliding window, which NSA has and SSA, FullAttn and MoBA do not"
        yield Problem(key, window, rule, "try method=nsa" if has_gates else "import another model")
    if method is Method.nsa and not (window and has_gates):
        rule = f"needs model_type={NSA_TYPE}, or {RELEASED} with a window_size: no other folder has NSA's three gates per query head"
        yield Problem("method", method, rule, "import NSA-1B, or leave method out")


def _part_problems(record: dict[str, Any], method: Method) -> Iterator[Problem]:
    """Yields the problem of a trained scorer or a convolution of keys that the method does not have, or of a method that needs a scorer without one."""
    scored = record.get("model_type") == MODEL_TYPE and record.get("score") == Score.indexer
    if scored and method not in (Method.ssa, Method.indexer):
        rule = f"is a trained scorer of blocks, which method={method} does not have"
        yield Problem("score", record["score"], rule, "try method=indexer or ssa")
    if record.get("key_convolution") and method not in CONVOLVED:
        rule = f"is a convolution of keys, which method={method} does not have"
        yield Problem("key_convolution", record["key_convolution"], rule, f"try method={join(CONVOLVED)}")
    if method is Method.indexer and not scored:
        rule = "needs a folder with a trained scorer, and its config.json has no score=indexer"
        advice = "try full, and start a run with attention=indexer from it by checkpoint.init_from"
        yield Problem("method", method, rule, advice)


def _rope(record: dict[str, Any]) -> dict[str, Any]:
    """Returns RoPE's settings in transformers 5's form, whichever version wrote the file."""
    older = record.get("rope_scaling") or {}
    rope = {"rope_theta": record.get("rope_theta", 10_000.0), **older, **(record.get("rope_parameters") or {})}
    return {"rope_type": rope.pop("type", "default"), **rope}


def _rope_problems(rope: dict[str, Any]) -> Iterator[Problem]:
    if rope["rope_type"] not in ("default", "llama3"):
        yield Problem("rope_type", rope["rope_type"], "must be default or llama3", "megatron-core has no other")
        return
    if rope["rope_type"] == "llama3":
        for key, wanted in LLAMA3.items():
            if rope.get(key, wanted) != wanted:
                rule = f"must be {wanted:g}, as in every Llama 3: megatron-core has no other"
                yield Problem(f"rope_parameters.{key}", rope[key], rule, "import a model with Llama 3's constants")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield Problem("partial_rotary_factor", rope["partial_rotary_factor"], "must be 1", "import a Llama")
