"""Training models and the same weights in the modelling file of exported folders, for tests.

The map of weights is written here from the layout of the training model, without the exporter.
"""

import numpy as np
import torch
from torch import Tensor

from ssa_pretrain.config import Config, Method, PrecisionName, Score, gates_per_head
from ssa_pretrain.data.batches import collate
from ssa_pretrain.data.rows import Row
from ssa_pretrain.huggingface.modelling_nsa import NSALlamaConfig, NSALlamaForCausalLM
from ssa_pretrain.huggingface.modelling_ssa import SSALlamaConfig, SSALlamaForCausalLM
from ssa_pretrain.parallel.state import Placement

VOCAB = 96


def small_config(**changed: object) -> Config:
    """Returns a two-layer model whose streams differ; `changed` are fields of its AttentionConfig or its ModelConfig."""
    config = Config()
    model = config.model
    model.num_layers, model.hidden_size, model.ffn_hidden_size = 2, 32, 48
    model.num_attention_heads, model.num_kv_heads, model.head_dim = 4, 2, 16
    model.vocab_divisor, model.init_std = 32, 0.2
    config.attention.top_k = 3
    for name, value in changed.items():
        section = config.attention if hasattr(config.attention, name) else model
        assert hasattr(section, name)
        setattr(section, name, value)
    config.data.sequence_length = 256
    config.precision.name = PrecisionName.fp32
    return config


class TrainingModel:
    """A training model with its initial weights, in one process."""

    def __init__(self, config: Config, placement: Placement) -> None:
        from ssa_pretrain.engine import build_engine
        from ssa_pretrain.engine.megatron.checkpoint import unwrap

        self.config = config
        self.engine = build_engine(config, placement, VOCAB)
        self.module = unwrap(self.engine.chunks[0])
        with torch.no_grad():
            for number, (name, weight) in enumerate(self.module.named_parameters()):
                if name.endswith(
                    ("q_layernorm.weight", "k_layernorm.weight")
                ):  # they begin as 1, which would hide a mix-up
                    weight.copy_(1 + 0.1 * (torch.arange(len(weight)) * (number + 3) % 7))

    def logits(self, documents: list[Tensor], mode: str) -> list[Tensor]:
        """Returns the logits [T, V] of each document of a packed microbatch."""
        from ssa_pretrain.engine.step import Route

        tokens = np.concatenate([*(d.numpy() for d in documents), [0]])
        starts = np.zeros(len(tokens), dtype=bool)
        starts[np.cumsum([0, *map(len, documents)])] = True
        batch = collate([Row(tokens, starts)], index=0)
        packed = self.engine.microbatches.pack(batch, Route(mode))
        self.module.eval()
        with torch.no_grad():
            out = self.module(
                batch.tokens, batch.positions[None], None, packed_seq_params=packed, runtime_gather_output=True
            )
        return list(out[0].split(list(map(len, documents))))


def hf_config(config: Config, **changed: object) -> SSALlamaConfig:
    """Returns the Hugging Face configuration of a run's model."""
    model, attention = config.model, config.attention
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling.enabled:
        scaling = {"factor": model.rope_scaling.factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"rope_type": "llama3", "original_max_position_embeddings": 8192, **scaling}
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": model.tie_embeddings,
        "max_position_embeddings": config.data.sequence_length,
        "attention_gate": attention.gate,
        "block_size": attention.block_size,
        "top_k": attention.top_k,
        "score": attention.score.value,
        "qk_norm": model.qk_norm,
        "index_heads": attention.indexer.heads,
        "key_convolution": attention.key_convolution,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    if attention.method is Method.nsa:
        return NSALlamaConfig(**(fields | {"window": attention.window} | changed))
    return SSALlamaConfig(**(fields | changed))


def hf_model(trained: TrainingModel, **changed: object) -> SSALlamaForCausalLM:
    """Returns the Hugging Face model with a training model's weights, in fp32; `changed` are fields of its configuration."""
    config = trained.config
    kind = NSALlamaForCausalLM if config.attention.method is Method.nsa else SSALlamaForCausalLM
    model = kind(hf_config(config, **changed)).eval()
    weights = {name: tensor.detach().float() for name, tensor in trained.module.named_parameters()}
    state = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
        "lm_head.weight": weights.get("output_layer.weight", weights["embedding.word_embeddings.weight"]),
    }
    for number in range(config.model.num_layers):
        state |= _layer(config, weights, f"decoder.layers.{number}.", f"model.layers.{number}.")
    model.load_state_dict(state)
    return model


def _layer(config: Config, weights: dict[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    """Returns one layer's weights under their Hugging Face names."""
    model, attention = config.model, config.attention
    per_group = model.num_attention_heads // model.num_kv_heads
    widths = [per_group * model.head_dim, model.head_dim, model.head_dim, per_group * gates_per_head(attention)]
    mixed = weights[ours + "self_attention.linear_qkv.weight"].view(model.num_kv_heads, -1, model.hidden_size)
    q, k, v, g = (part.flatten(0, 1) for part in mixed.split(widths, dim=1))
    gate, up = weights[ours + "mlp.linear_fc1.weight"].chunk(2)
    found = {
        "input_layernorm.weight": weights[ours + "input_layernorm.weight"],
        "post_attention_layernorm.weight": weights[ours + "pre_mlp_layernorm.weight"],
        "self_attn.q_proj.weight": q,
        "self_attn.k_proj.weight": k,
        "self_attn.v_proj.weight": v,
        "self_attn.o_proj.weight": weights[ours + "self_attention.linear_proj.weight"],
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
        "mlp.down_proj.weight": weights[ours + "mlp.linear_fc2.weight"],
    }
    if attention.gate:
        found["self_attn.g_proj.weight"] = g
    if attention.score is Score.indexer:
        mixed = weights[ours + "self_attention.linear_index.weight"].view(model.num_kv_heads, -1, model.hidden_size)
        widths = [attention.indexer.heads * model.head_dim, model.head_dim]
        found |= {
            f"self_attn.index_{x}_proj.weight": part.flatten(0, 1)
            for x, part in zip("qk", mixed.split(widths, dim=1), strict=True)
        }
    if attention.key_convolution:
        found["self_attn.k_conv.weight"] = weights[ours + "self_attention.key_convolution.weight"]
    if model.qk_norm:
        found |= {f"self_attn.{x}_norm.weight": weights[f"{ours}self_attention.{x}_layernorm.weight"] for x in "qk"}
    return {theirs + name: tensor for name, tensor in found.items()}


def padded(documents: list[Tensor], *, left: list[int], width: int) -> tuple[Tensor, Tensor]:
    """Returns (tokens [B, width], attention mask) with `left[i]` tokens of padding before document i and the rest after it."""
    tokens, mask = (torch.zeros(len(documents), width, dtype=torch.int64) for _ in range(2))
    for i, (document, before) in enumerate(zip(documents, left, strict=True)):
        tokens[i, before : before + len(document)] = document
        mask[i, before : before + len(document)] = 1
    return tokens, mask


def draw_documents(lengths: list[int], seed: int = 0) -> list[Tensor]:
    """Returns documents of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCAB, (length,), generator=generator) for length in lengths]


def require_beams_and_drafts(model: SSALlamaForCausalLM, tokens: Tensor, mask: Tensor, count: int) -> None:
    """Fails unless beams, which change the cache's rows, and rejected drafts, which crop it, give what is generated without a cache.

    Args:
        model: in the mode to test.
        tokens, mask: padded rows; the first ends in a text of at least 30 tokens.
        count: tokens after drafts.
    """
    beams = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 12, "num_beams": 3}
    assert torch.equal(model.generate(tokens, **beams), model.generate(tokens, **beams, use_cache=False))
    text, greedy = tokens[:1, -30:].repeat(1, 3), {"do_sample": False, "max_new_tokens": count}
    drafted = model.generate(text, prompt_lookup_num_tokens=4, **greedy)
    assert torch.equal(drafted, model.generate(text, **greedy, use_cache=False))


def lively_model(**changed: object) -> SSALlamaForCausalLM:
    """Returns a random model whose greedy text does not repeat itself at once, in fp32."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "head_dim": 16, "top_k": 3, "initializer_range": 0.3, "vocab_size": VOCAB}
    rest = {"max_position_embeddings": 1024, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    return SSALlamaForCausalLM(SSALlamaConfig(**(sizes | heads | rest | changed))).eval()
