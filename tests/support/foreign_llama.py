"""Folders as others write them: a Llama of transformers, and the layout in which SSA's authors release their models; random weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, LAYERS = 4, 2, 16, 32, 48, 2
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": 96,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def random_tensors(
    *,
    gate_rows: int = 0,
    tied: bool = False,
    vocab: int = SIZES["vocab_size"],
    sizes: dict = SIZES,
    qk_norm: bool = False,
) -> dict[str, torch.Tensor]:
    """Returns the tensors of a Llama under Hugging Face's names: large enough that attention is far from uniform."""
    generator = torch.Generator().manual_seed(0)
    hidden, inner, dim = sizes["hidden_size"], sizes["intermediate_size"], sizes["head_dim"]
    heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 2 / shape[-1] ** 0.5

    def norm(width: int = hidden) -> torch.Tensor:
        return 1 + 0.2 * torch.randn(width, generator=generator)

    found = {"model.embed_tokens.weight": matrix(vocab, hidden), "model.norm.weight": norm()}
    if not tied:
        found["lm_head.weight"] = matrix(vocab, hidden)
    for number in range(sizes["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        found |= {layer + name + ".weight": norm() for name in ("input_layernorm", "post_attention_layernorm")}
        shapes = {
            "self_attn.q_proj": (heads * dim, hidden),
            "self_attn.k_proj": (kv_heads * dim, hidden),
            "self_attn.v_proj": (kv_heads * dim, hidden),
            "self_attn.o_proj": (hidden, heads * dim),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        found |= {f"{layer}{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        if qk_norm:
            found |= {f"{layer}self_attn.{x}_norm.weight": norm(dim) for x in "qk"}
        if gate_rows:
            found[f"{layer}self_attn.g_proj.weight"] = matrix(gate_rows * heads, hidden)
    return found


def write_folder(folder: Path, record: dict, tensors: dict[str, torch.Tensor]) -> Path:
    """Writes config.json and one file of weights; returns the folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SIZES | record))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def llama_record(*, tied: bool = False, rope: dict | None = None, theta: float = 500_000.0) -> dict:
    """Returns what config.json of a Llama says besides its sizes, in transformers 4's words."""
    return {"model_type": "llama", "tie_word_embeddings": tied, "rope_scaling": rope, "rope_theta": theta}


def released_record(*, block_size: int = 16, block_counts: int = 4, window_size: int = 0) -> dict:
    """Returns what config.json of a released model says besides its sizes."""
    blocks = {"block_size": block_size, "block_counts": block_counts, "window_size": window_size}
    return llama_record(tied=True) | {"model_type": "llama-nsa"} | blocks
