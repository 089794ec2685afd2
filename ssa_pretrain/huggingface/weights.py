"""The one map between the training model's tensors and Hugging Face's: names and layout, in both directions.

    training (checkpoint/weights.py)          Hugging Face
    embedding.word_embeddings.weight          model.embed_tokens.weight
    decoder.layers.N.input_layernorm.weight   model.layers.N.input_layernorm.weight
    …self_attention.linear_qkv.weight         …self_attn.{q,k,v,g}_proj.weight
    …self_attention.{q,k}_layernorm.weight    …self_attn.{q,k}_norm.weight, with model.qk_norm only
    …self_attention.linear_index.weight       …self_attn.index_{q,k}_proj.weight, with attention.score=indexer only
    …self_attention.key_convolution.weight    …self_attn.k_conv.weight, with attention.key_convolution only
    …self_attention.linear_proj.weight        …self_attn.o_proj.weight
    …pre_mlp_layernorm.weight                 …post_attention_layernorm.weight
    …mlp.linear_fc1.weight                    …mlp.{gate,up}_proj.weight
    …mlp.linear_fc2.weight                    …mlp.down_proj.weight
    decoder.final_layernorm.weight            model.norm.weight
    output_layer.weight                       lm_head.weight; both are absent if tied to the embedding

The rows of linear_qkv are grouped by kv head: group_size * D of q, D of k, D of v, group_size of g (3 * group_size under NSA, a head's together). Hugging Face's projections list the same
rows by head, so query head h belongs to kv head h // group_size in both. The rows of linear_index, J * D of index queries and D of keys per kv head, are
treated alike. linear_fc1 is [gate; up]. RoPE rotates the two halves of a head in both
models, so no row moves within a head. Rows that pad the vocabulary are rows of the embedding like any other: they take part in the softmax of the
training loss, so a folder without them would be another model.

Every conversion copies values and changes none, so both directions together give the same bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ssa_pretrain.config import Config, Score, gates_per_head
from ssa_pretrain.model.sharding import is_head_norm

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
HF_EMBEDDING = "model.embed_tokens.weight"
HF_OUTPUT = "lm_head.weight"
INDEX, FILTERS = "self_attention.linear_index.weight", "self_attention.key_convolution.weight"
LAYER = (  # of a layer: the training model's tensor, and the tensors that it becomes
    ("input_layernorm.weight", ("input_layernorm.weight",)),
    (
        "self_attention.linear_qkv.weight",
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.g_proj.weight"),
    ),
    (FILTERS, ("self_attn.k_conv.weight",)),
    (INDEX, ("self_attn.index_q_proj.weight", "self_attn.index_k_proj.weight")),
    ("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",)),
    ("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",)),
    ("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",)),
    ("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",)),
    ("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    ("mlp.linear_fc2.weight", ("mlp.down_proj.weight",)),
)

BY_GROUP = ("linear_qkv.weight", INDEX)  # whose rows are grouped by kv head


@dataclass(frozen=True, slots=True)
class Llama:
    """The sizes that decide names and shapes; M, F, V, H, G and D are those of the legend, V with its padding."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    gates: int  # per query head
    tied: bool
    qk_norm: bool = False
    index_heads: int = 0  # J; 0 without a trained scorer
    key_taps: int = 0  # W; 0 without a convolution of keys

    @classmethod
    def of(cls, config: Config, padded_vocab_size: int) -> "Llama":
        """Returns the sizes of a run's model."""
        model = config.model
        return cls(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            vocab_size=padded_vocab_size,
            num_heads=model.num_attention_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            gates=gates_per_head(config.attention),
            tied=model.tie_embeddings,
            qk_norm=model.qk_norm,
            index_heads=config.attention.indexer.heads if config.attention.score is Score.indexer else 0,
            key_taps=config.attention.key_convolution,
        )

    @property
    def group_size(self) -> int:
        """Query heads per kv head."""
        return self.num_heads // self.num_kv_heads


def tensor_names(llama: Llama) -> dict[str, tuple[str, ...]]:
    """Returns the Hugging Face tensors that each tensor of the training model becomes, in the model's order."""
    names: dict[str, tuple[str, ...]] = {EMBEDDING: (HF_EMBEDDING,)}
    for number in range(llama.num_layers):
        for ours, theirs in LAYER:
            if is_head_norm(ours) and not llama.qk_norm:
                continue
            if not {INDEX: llama.index_heads, FILTERS: llama.key_taps}.get(ours, True):
                continue
            kept = [name for name in theirs if llama.gates or name != "self_attn.g_proj.weight"]
            names[f"decoder.layers.{number}.{ours}"] = tuple(f"model.layers.{number}.{name}" for name in kept)
    names["decoder.final_layernorm.weight"] = ("model.norm.weight",)
    return names if llama.tied else names | {OUTPUT: (HF_OUTPUT,)}


def tensor_shapes(llama: Llama) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each Hugging Face tensor, by name."""
    m, f, vocabulary = llama.hidden_size, llama.ffn_hidden_size, (llama.vocab_size, llama.hidden_size)
    queries, keys = llama.num_heads * llama.head_dim, llama.num_kv_heads * llama.head_dim
    matrices = {
        "q_proj": (queries, m),
        "k_proj": (keys, m),
        "v_proj": (keys, m),
        "g_proj": (llama.gates * llama.num_heads, m),
        "o_proj": (m, queries),
        "gate_proj": (f, m),
        "up_proj": (f, m),
        "down_proj": (m, f),
        "q_norm": (llama.head_dim,),
        "k_norm": (llama.head_dim,),
        "index_q_proj": (llama.index_heads * keys, m),
        "index_k_proj": (keys, m),
        "k_conv": (keys, 1, llama.key_taps),
        "embed_tokens": vocabulary,
        "lm_head": vocabulary,
    }
    every = [name for names in tensor_names(llama).values() for name in names]
    return {name: matrices.get(name.split(".")[-2], (m,)) for name in every}


def training_shapes(llama: Llama) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor of the training model, by name."""
    theirs = tensor_shapes(llama)
    joined = {}
    for name, parts in tensor_names(llama).items():
        joined[name] = (sum(theirs[part][0] for part in parts), *theirs[parts[0]][1:])
    return joined


def to_hugging_face(name: str, tensor: Tensor, llama: Llama) -> dict[str, Tensor]:
    """Returns the Hugging Face tensors of one tensor of the training model, by name; they may be views.

    Args:
        name: in the training model.
        tensor: whole, as the common weights hold it.
        llama: the model's sizes.
    """
    names = tensor_names(llama)[name]
    if name.endswith(BY_GROUP):
        by_group = tensor.unflatten(0, (llama.num_kv_heads, -1)).split(_rows_per_group(name, llama), 1)
        return {part: rows.flatten(0, 1) for part, rows in zip(names, by_group, strict=True)}
    return dict(zip(names, tensor.chunk(len(names)), strict=True))


def from_hugging_face(name: str, tensors: Mapping[str, Tensor], llama: Llama) -> Tensor:
    """Returns one tensor of the training model from the Hugging Face tensors of the same layer.

    Args:
        name: in the training model.
        tensors: at least those that `tensor_names` lists for it, by name.
        llama: the model's sizes.
    """
    parts = [tensors[part] for part in tensor_names(llama)[name]]
    if name.endswith(BY_GROUP):
        by_group = [part.unflatten(0, (llama.num_kv_heads, -1)) for part in parts]
        return torch.cat(by_group, 1).flatten(0, 1)
    return torch.cat(parts)


def _rows_per_group(name: str, llama: Llama) -> list[int]:
    """Returns a kv head's rows of linear_qkv that are queries, keys, values and, with a gate, gates; of linear_index, index queries and keys."""
    if name.endswith(INDEX):
        return [llama.index_heads * llama.head_dim, llama.head_dim]
    rows = [llama.group_size * llama.head_dim, llama.head_dim, llama.head_dim]
    return [*rows, llama.gates * llama.group_size] if llama.gates else rows
