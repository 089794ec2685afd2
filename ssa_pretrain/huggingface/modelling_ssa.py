"""A Llama with SSA's sparse attention for Hugging Face transformers: configuration, KV cache and model, in one file without other files.

An exported folder holds a copy of this file, and `trust_remote_code=True` runs it. It needs torch and transformers 5.16.1 to 5.24, and uses
the package `ssa_kernels` where it is installed. What SSA does not change is transformers' own Llama, of whatever version is installed.

*Modes.* `attention_mode` is a field of the configuration: `from_pretrained(folder, attention_mode="sparse")` chooses it, and
`model.config.attention_mode = "full"` changes it. `full` is causal softmax attention with transformers' attention functions. In `sparse`, each
query attends to its own block of keys and to the `top_k - 1` earlier blocks of largest importance, as in training (arXiv 2511.20102, section 3.2;
the definition is the reference of `ssa_kernels.select_blocks`). In both, a sigmoid gate per token and query head multiplies the output.

*Blocks and padding.* A row is one document. Its blocks are counted from its first token, so left padding moves no block, and the first token is
read from the attention mask. Padding is allowed on the left, on the right, or on both sides. A mask with gaps is refused, and so are packed rows.

*Cache.* In sparse mode each layer of a DynamicCache or StaticCache also holds the mean key of each block. An update computes the means of the blocks
that it touches. Only complete blocks before a query's own are scored, and their means do not change. With any other cache the means
are computed from its keys at each call: the same results, more slowly.

*Which code runs in sparse mode.* `ssa_kernels` serves a prompt on an empty cache, or a call without a cache, if it is installed, the tensors are on
CUDA, the attention function is sdpa, `16 <= head_dim <= 128`, there are at most 32 query heads per kv head, and the dtype is not float64. Everything
else is plain torch: one new token attends to its gathered blocks, several attend under a mask, by chunks of queries. The results differ by rounding.

Not here: sparse mode with other attention functions than eager and sdpa (vLLM, SGLang, FlashAttention and flex run mode full only), packed rows
in sparse mode, the alignment loss of training.
"""

import inspect

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

try:
    import ssa_kernels
except ImportError:
    ssa_kernels = None

MODES = ("full", "sparse")
SCORES = ("softmax_sum", "per_head", "official_compat")
BLOCK_SIZES = (16, 32, 64, 128)
QUERIES_PER_CHUNK = 128  # bounds the masks and the importance of a long prompt in plain torch
TINY = torch.finfo(torch.float32).tiny
# 5.24 renamed the argument.
CACHE_NAME = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


@strict
class SSALlamaConfig(LlamaConfig):
    """Llama's configuration with the constants of SSA.

    Args:
        attention_mode: "full" or "sparse".
        block_size: K, keys per block: 16, 32, 64 or 128.
        top_k: N, blocks per query, the own block included.
        attention_gate: whether a sigmoid gate per token and query head multiplies the attention's output.
        score: how a query scores earlier blocks: "softmax_sum" (SSA), "per_head" (MoBA) or "official_compat" (SSA's official code).

    Raises:
        ValueError: for values that do not fit each other.
    """

    model_type = "ssa_llama"
    base_model_tp_plan = {**(LlamaConfig.base_model_tp_plan or {}), "layers.*.self_attn.g_proj": "colwise"}  # noqa: RUF012

    attention_mode: str = "sparse"
    block_size: int = 16
    top_k: int = 16
    attention_gate: bool = True
    score: str = "softmax_sum"

    @property
    def is_sparse(self) -> bool:
        """Whether the mode is sparse."""
        if self.attention_mode not in MODES:
            raise ValueError(f"attention_mode={self.attention_mode} must be full or sparse; try sparse")
        return self.attention_mode == "sparse"

    @property
    def layer_types(self) -> list[str]:
        """The type of each layer's cache. Absent in full mode, as in a plain Llama. Follows `attention_mode`, and is therefore not saved."""
        if not self.is_sparse:
            raise AttributeError("layer_types")
        return [SSADynamicLayer._layer_type] * self.num_hidden_layers

    def validate_layer_type(self) -> None:
        """Accepts the sparse cache's layer type, which transformers does not know."""

    def validate_architecture(self) -> None:
        """Raises ValueError for values that do not fit each other."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if kv_heads and heads % kv_heads:
            raise ValueError(f"num_key_value_heads={kv_heads} must divide num_attention_heads={heads}; try {heads}")
        if self.head_dim and self.head_dim % 2:
            advice = f"try {self.head_dim + 1}"
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE rotates pairs; {advice}")
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size={self.block_size} must be 16, 32, 64 or 128 keys; try 16")
        if self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1: the own block is always chosen; try 16")
        if self.score not in SCORES:
            raise ValueError(f"score={self.score} must be softmax_sum, per_head or official_compat; try softmax_sum")
        if self.score == "official_compat" and not 2 <= self.top_k <= self.block_size:
            rule = f"must lie in 2 to block_size={self.block_size} under score=official_compat"
            raise ValueError(f"top_k={self.top_k} {rule}; try {self.block_size}")
        _ = self.is_sparse

    def _get_generation_parameters(self) -> dict:
        """Returns generation parameters among the fields. `top_k` has the name of one of sampling's, but is a constant of the model."""
        return {name: value for name, value in super()._get_generation_parameters().items() if name != "top_k"}


def block_means(k_BGSD: Tensor, first_slot_B: Tensor, first_block_B: Tensor, count: int, block_size: int) -> Tensor:
    """Returns `[B, G, count, D]` in k's dtype: the mean keys of `count` blocks of each row from its block `first_block_B` on.

    They are summed in float32 (float64 for float64) and then rounded, as in training. Means of incomplete blocks have no meaning.

    Args:
        k_BGSD: keys after RoPE, by slot; padding included.
        first_slot_B: slot of each row's first token.
        first_block_B: int64.
        count: blocks per row.
        block_size: keys per block.
    """
    B, G, S, D = k_BGSD.shape
    block_BR = first_block_B[:, None] + torch.arange(count, device=k_BGSD.device)
    place = torch.arange(block_size, device=k_BGSD.device)
    slot = (first_slot_B[:, None, None] + block_BR[..., None] * block_size + place).flatten(1).clamp(max=S - 1)
    keys = k_BGSD.detach().gather(2, slot[:, None, :, None].expand(B, G, -1, D))
    wide = torch.promote_types(keys.dtype, torch.float32)
    return (keys.view(B, G, count, block_size, D).to(wide).sum(3) / block_size).to(keys.dtype)


class BlockMeans:
    """What both sparse cache layers add to keys and values: the mean key of each block, `[B, G, R, D]`, and its updates.

    After `crop`, the block of the next token and later ones hold old means; each is computed again before a query can score it.
    """

    block_means: Tensor | None = None

    def update_means(
        self, keys: Tensor, first_slot: Tensor, offset: int | Tensor, added: int, block_size: int
    ) -> Tensor:
        """Returns the means of all blocks, with those of the blocks that `added` new keys from slot `offset` on belong to.

        Args:
            keys: `[B, G, S, D]`, as the layer's `update` returned them.
            first_slot: int64 `[B]`, slot of each row's first token.
            offset: keys before the update.
            added: keys of the update.
            block_size: keys per block.
        """
        count = (added + block_size - 2) // block_size + 1
        first_block = (offset - first_slot).clamp(min=0) // block_size
        new = block_means(keys, first_slot, first_block, count, block_size)
        room = self._means_room(offset, count, block_size)
        old = self.block_means
        if old is None:
            old = new.new_zeros(*new.shape[:2], room, new.shape[3])
            if isinstance(self, StaticLayer) and not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(old)
        elif old.shape[2] < room:
            old = torch.cat([old, old.new_zeros(*old.shape[:2], room - old.shape[2], old.shape[3])], dim=2)
        place = (first_block[:, None] + torch.arange(count, device=new.device))[:, None, :, None].expand_as(new)
        self.block_means = old.scatter_(2, place, new)
        return self.block_means

    def reset(self) -> None:
        """Empties the layer."""
        super().reset()  # type: ignore[misc]
        if isinstance(self, StaticLayer) and self.block_means is not None:
            self.block_means.zero_()  # in place: a compiled graph holds its address
        else:
            self.block_means = None

    def _change_rows(self, change) -> None:
        if self.block_means is not None:
            self.block_means = change(self.block_means)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replaces row i by row `beam_idx[i]`."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._change_rows(lambda means: means.index_select(0, beam_idx.to(means.device)))


class SSADynamicLayer(BlockMeans, DynamicLayer):
    """A growing cache layer with keys, values and block means."""

    _layer_type = "ssa_sparse"

    def _means_room(self, offset: int | Tensor, count: int, block_size: int) -> int:
        return int(offset) // block_size + count

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row."""
        super().batch_repeat_interleave(repeats)
        self._change_rows(lambda means: means.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows."""
        super().batch_select_indices(indices)
        self._change_rows(lambda means: means[indices, ...])


class SSAStaticLayer(BlockMeans, StaticLayer):
    """A cache layer of fixed size with keys, values and block means, for torch.compile."""

    _layer_type = "ssa_sparse"

    def _means_room(self, offset: int | Tensor, count: int, block_size: int) -> int:
        return (self.max_cache_len + block_size - 2) // block_size + 1


def choose_blocks(q_BHTD: Tensor, means_BGRD: Tensor, own_BT: Tensor, scale: float, config: SSALlamaConfig) -> Tensor:
    """Returns the chosen blocks, int64 `[B, G, T, N]` (`[B, H, T, N]` for per_head): ascending, padded with -1 at the end.

    The own block always, and the `top_k - 1` earlier blocks of largest importance; of equal ones, the more recent. No gradient.

    Args:
        q_BHTD: queries after RoPE.
        means_BGRD: mean key of each block; only those before a query's own are read.
        own_BT: block of each query, below 0 for padding, which chooses nothing.
        scale: factor of the logits.
        config: `top_k`, `score` and `block_size`.
    """
    B, H, T, _ = q_BHTD.shape
    G, R = means_BGRD.shape[1:3]
    wide = torch.promote_types(q_BHTD.dtype, torch.float32)
    block = torch.arange(R, device=own_BT.device)
    later = block >= own_BT[..., None]
    logits = q_BHTD.detach().to(wide).reshape(B, G, -1, q_BHTD.shape[3]) @ means_BGRD.to(wide).transpose(2, 3) * scale
    logits = logits.view(B, H, T, R).masked_fill(later[:, None], float("-inf"))
    importance = logits
    if config.score != "per_head":
        # Without any candidate the softmax is NaN; those queries are masked again below.
        importance = logits.softmax(-1).view(B, G, H // G, T, R).sum(2)
        importance = torch.where(importance < TINY, 0.0, importance).masked_fill(later[:, None], float("-inf"))
    if config.score == "official_compat":
        importance = _drop_unofficial(importance, own_BT[:, None, :, None], config.block_size)
    best = _most_important(importance, min(config.top_k - 1, R))
    absent = torch.iinfo(torch.int64).max
    best = torch.where(importance.gather(-1, best) > float("-inf"), best, absent)
    own = torch.where(own_BT < 0, absent, own_BT)[:, None, :, None].expand(*best.shape[:3], 1)
    chosen = torch.cat([best, own], dim=-1).sort(-1).values
    return torch.where(chosen == absent, -1, chosen)


def _most_important(importance: Tensor, count: int) -> Tensor:
    """Returns the `count` most important blocks; a stable descending sort in reverse order puts the more recent of equals first."""
    order = importance.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return importance.shape[-1] - 1 - order


def _drop_unofficial(importance: Tensor, own: Tensor, block_size: int) -> Tensor:
    """Returns importance with -inf at the blocks that the official code's merge loses: see `ssa_kernels.select_blocks`."""
    block = torch.arange(importance.shape[-1], device=own.device)
    chunk_start = own.clamp(min=0) // block_size * block_size
    kept = chunk_start == 0
    for part, count in ((block < chunk_start, block_size // 2), (block >= chunk_start, block_size // 2 - 1)):
        best = _most_important(importance.masked_fill(~part, float("-inf")), count)
        kept = kept | (torch.zeros_like(importance, dtype=torch.bool).scatter_(-1, best, True) & part)
    return importance.masked_fill(~kept, float("-inf"))


def first_slots(attention_mask: Tensor | None, like: Tensor) -> Tensor:
    """Returns int64 `[B]`, the slot of each row's first token, from a mask `[B, S]` or `[B, 1, T, S]` for inputs `like` `[B, T, ...]`.

    Raises:
        ValueError: on a CPU, for a mask with gaps. On CUDA that is a device-side assertion, because raising would mean waiting.
    """
    if attention_mask is None:
        return torch.zeros(like.shape[0], dtype=torch.int64, device=like.device)
    visible = attention_mask[:, 0, -1] if attention_mask.dim() == 4 else attention_mask
    visible = visible if visible.dtype == torch.bool else visible == (0 if attention_mask.dim() == 4 else 1)
    visible = visible.to(like.device)
    message = "attention_mask has a gap within a row, and blocks count every key of a row; try padding at the ends of rows only"
    runs = visible[:, 0].int() + (visible[:, 1:] & ~visible[:, :-1]).sum(1)
    if torch.compiler.is_compiling():
        pass  # generate compiles with masks that create_masks_for_generate has checked
    elif visible.is_cuda:
        torch._assert_async((runs <= 1).all(), message)
    elif (runs > 1).any():
        raise ValueError(message)
    return visible.int().argmax(-1)


class SSALlamaRotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's RoPE with cosines and sines in float32: products are rounded once, as in training, and block means with them."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (cos, sin), `[B, T, D]`."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return super().forward(torch.empty(0, dtype=wide, device=x.device), position_ids)


class SSALlamaAttention(LlamaAttention):
    """One layer's attention: full or sparse as the configuration says, then the gate, then the output projection."""

    def __init__(self, config: SSALlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.g_proj = None
        if config.attention_gate:
            self.g_proj = nn.Linear(config.hidden_size, config.num_attention_heads, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache=None,
        past_key_values=None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (output [B, T, M], attention weights or None). The cache is `cache` from transformers 5.24 on, `past_key_values` before."""
        cache = past_key_values if cache is None else cache
        shape = hidden_states.shape[:-1]
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2) for p in projections)
        q, k = (x.to(v.dtype) for x in apply_rotary_pos_emb(q, k, *position_embeddings))
        attend = self._sparse if self.config.is_sparse else self._full
        out, weights = attend(q, k, v, attention_mask, cache, **kwargs)
        if self.g_proj is not None:
            out, logits = out.reshape(*shape, -1, self.head_dim), self.g_proj(hidden_states)
            wide = torch.promote_types(out.dtype, torch.float32)
            out = (out.to(wide) * logits.to(wide).sigmoid().unsqueeze(-1)).to(out.dtype)
        return self.o_proj(out.reshape(*shape, -1)), weights

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Returns what the configured attention function does."""
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        return attend(self, q, k, v, mask, dropout=dropout, scaling=self.scaling, **kwargs)

    def _full(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cache, **kwargs):
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx, kwargs=kwargs)
        return self._attend(q, k, v, mask, **kwargs)

    def _sparse(self, q: Tensor, k: Tensor, v: Tensor, _, cache, *, first_slot: Tensor, documents=None, **kwargs):
        """Returns (output, weights or None) of sparse attention. `documents` is the kernels' layout, or None for plain torch."""
        offset, size, new_k, new_v, means = 0, self.config.block_size, k, v, None
        if cache is not None:
            offset = cache.get_seq_length(self.layer_idx) + 0  # a static cache returns its counter, which update moves
            k, v = cache.update(k, v, self.layer_idx, kwargs=kwargs)
            layer = cache.layers[self.layer_idx]
            if isinstance(layer, BlockMeans):
                means = layer.update_means(k, first_slot, offset, q.shape[2], size)
        if documents is not None:
            return self._kernels(q, new_k, new_v, documents), None
        if means is None:
            means = block_means(k, first_slot, torch.zeros_like(first_slot), (k.shape[2] - 1) // size + 1, size)
        position = offset + torch.arange(q.shape[2], device=q.device) - first_slot[:, None]
        outs = [
            self._plain(q_part, k, v, means, position_part, first_slot, **kwargs)
            for q_part, position_part in zip(
                q.split(QUERIES_PER_CHUNK, 2), position.split(QUERIES_PER_CHUNK, 1), strict=True
            )
        ]
        if len(outs) == 1:
            return outs[0]
        weights = None if outs[0][1] is None else torch.cat([w for _, w in outs], dim=2)
        return torch.cat([out for out, _ in outs], dim=1), weights

    def _kernels(self, q: Tensor, k: Tensor, v: Tensor, documents) -> Tensor:
        """Returns [B, T, H, D]: rows are packed, and the padding on their left is a document of its own."""
        c, shape = self.config, (q.shape[0], q.shape[2], q.shape[1], q.shape[3])
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        common = {"block_size": c.block_size, "cu_seqlens": documents, "scale": self.scaling}
        indices = ssa_kernels.select_blocks(q.detach(), k.detach(), top_k=c.top_k, score=c.score, **common)
        return ssa_kernels.sparse_attention(q, k, v, indices, **common)[0].view(shape)

    def _plain(
        self, q: Tensor, k: Tensor, v: Tensor, means: Tensor, position: Tensor, first_slot: Tensor, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (output [B, T, H, D], weights or None) of some queries [B, H, T, D] at positions [B, T] of their rows."""
        size, eager = self.config.block_size, self.config._attn_implementation == "eager"
        own = position.div(size, rounding_mode="floor")
        chosen = choose_blocks(q, means, own, self.scaling, self.config)
        heads = q.shape[1] // chosen.shape[1]
        if q.shape[2] == 1 and chosen.shape[1] == k.shape[1] and chosen.shape[3] * size < k.shape[2] and not eager:
            # One token reads the keys of its blocks only.
            place = torch.arange(size, device=q.device)
            key_position = (chosen.transpose(2, 3) * size + place).flatten(2)  # [B, G, N K]; a block -1 lies before the row
            slot = (key_position + first_slot[:, None, None]).clamp(0, k.shape[2] - 1)
            k, v = (x.gather(2, slot[..., None].expand(*slot.shape, x.shape[3])) for x in (k, v))
            mask = ((key_position >= 0) & (key_position <= position[:, None])).unsqueeze(2)
        else:
            key_position = torch.arange(k.shape[2], device=q.device) - first_slot[:, None]  # [B, S]
            R = means.shape[2]
            table = torch.zeros(*chosen.shape[:3], R + 1, dtype=torch.bool, device=q.device)
            table.scatter_(3, torch.where(chosen < 0, R, chosen), True)
            block = key_position.div(size, rounding_mode="floor").clamp(0, R - 1)[:, None, None]
            mask = table.gather(3, block.expand(*chosen.shape[:3], -1))
            key_position, query = key_position[:, None, None], position[:, None, :, None]
            # Padding sees itself, because an empty softmax is NaN.
            mask = (mask & (key_position >= 0) & (key_position <= query)) | (key_position == query)
        mask = mask.repeat_interleave(heads, 1)
        if eager:
            mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, torch.finfo(q.dtype).min)
        return self._attend(q, k, v, mask, **kwargs)


class SSALlamaDecoderLayer(LlamaDecoderLayer):
    """Llama's decoder layer with SSA's attention."""

    def __init__(self, config: SSALlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = SSALlamaAttention(config, layer_idx)


class SSALlamaPreTrainedModel(LlamaPreTrainedModel):
    """What both models share."""

    config: SSALlamaConfig
    _no_split_modules = ["SSALlamaDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": SSALlamaDecoderLayer, "attentions": SSALlamaAttention}  # noqa: RUF012


class SSALlamaModel(SSALlamaPreTrainedModel, LlamaModel):
    """The Llama without its output layer."""

    def __init__(self, config: SSALlamaConfig) -> None:
        super(LlamaModel, self).__init__(config)  # the fields of LlamaModel.__init__, with other layers
        config.validate_architecture()  # from_pretrained sets fields after the configuration's own check
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([SSALlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = SSALlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, inputs_embeds=None, **kwargs):
        """Returns what LlamaModel.forward does. `past_key_values` is the cache's name before transformers 5.24."""
        past = kwargs.pop("past_key_values", None)
        cache = past if cache is None else cache
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        if self.config.is_sparse:
            like = input_ids if inputs_embeds is None else inputs_embeds
            self._check_sparse(attention_mask, position_ids, cache)
            kwargs["first_slot"] = first_slots(attention_mask, like)
            kwargs["documents"] = self._documents(kwargs["first_slot"], like, cache)
            attention_mask = None  # the sparse mask is made from first_slot
        common = {"attention_mask": attention_mask, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        return super().forward(input_ids=input_ids, **common, **kwargs)

    def _check_sparse(self, attention_mask, position_ids: Tensor | None, cache) -> None:
        """Raises ValueError for what sparse mode does not support."""
        name = self.config._attn_implementation
        if name not in ("eager", "sdpa"):
            rule = "must be sdpa or eager under attention_mode=sparse"
            raise ValueError(f"attn_implementation={name} {rule}; try attn_implementation=sdpa, or attention_mode=full")
        if position_ids is None or attention_mask is not None or cache is not None or torch.compiler.is_compiling():
            return
        if (position_ids.diff(dim=-1) < 1).any():
            rule = "restart within a row, and under attention_mode=sparse a row is one document"
            raise ValueError(f"position_ids {rule}; try a row per document, or attention_mode=full")

    def _documents(self, first_slot: Tensor, like: Tensor, cache):
        """Returns the kernels' layout of the rows if ssa_kernels serves this call, otherwise None: the rule is at the top of this file."""
        c, (rows, tokens) = self.config, like.shape[:2]
        if ssa_kernels is None or not like.is_cuda or tokens == 1 or torch.compiler.is_compiling():
            return None
        fits = 16 <= c.head_dim <= 128 and c.num_attention_heads // c.num_key_value_heads <= 32
        if not fits or c._attn_implementation != "sdpa" or self.dtype == torch.float64:
            return None
        if cache is not None and int(cache.get_seq_length()) > 0:
            return None
        return pack_rows(first_slot, tokens, c.block_size)


class SSALlamaForCausalLM(SSALlamaPreTrainedModel, LlamaForCausalLM):
    """The Llama with its output layer."""

    def __init__(self, config: SSALlamaConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)  # the fields of LlamaForCausalLM.__init__, with another model
        self.model = SSALlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self._keep_top_k_out_of_sampling()

    def adjust_generation_fn(self, *args, **kwargs) -> None:
        """Loads the generation configuration of a folder."""
        super().adjust_generation_fn(*args, **kwargs)
        self._keep_top_k_out_of_sampling()

    def _keep_top_k_out_of_sampling(self) -> None:
        """Without a generation configuration of its own, transformers takes sampling's `top_k` from the model's field of the same name."""
        if self.generation_config is not None and self.generation_config._from_model_config:
            self.generation_config.top_k = None

    @staticmethod
    def create_masks_for_generate(config: SSALlamaConfig, attention_mask: Tensor | None = None, **kwargs):
        """Returns the mask of a step on a static cache: [B, 1, T, cache length], so that a compiled step keeps its shapes."""
        if config.is_sparse and attention_mask is not None:
            first_slots(attention_mask, attention_mask)  # the check
        names = ("inputs_embeds", "position_ids", CACHE_NAME)
        return create_causal_mask(config, attention_mask=attention_mask, **{name: kwargs[name] for name in names})


def pack_rows(first_slot_B: Tensor, tokens: int, block_size: int):
    """Returns the kernels' layout of rows packed one after another, each the padding on its left and then its tokens."""
    start = torch.arange(len(first_slot_B), device=first_slot_B.device) * tokens
    ends = torch.stack([start, start + first_slot_B], dim=1).flatten()
    total = len(first_slot_B) * tokens
    boundaries = torch.cat([ends, ends.new_full((1,), total)]).int()
    return ssa_kernels.build_layout(boundaries, num_tokens=total, block_size=block_size, max_length=tokens)


SSALlamaConfig.register_for_auto_class()
SSALlamaModel.register_for_auto_class("AutoModel")
SSALlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
