"""A Llama with SSA's sparse attention for Hugging Face transformers: configuration, KV cache and model, in one file without other files.

An exported folder holds a copy of this file, and `trust_remote_code=True` runs it. It needs torch and transformers 5.16.1 to 5.24, and uses
the package `ssa_kernels` where it is installed. What SSA does not change is transformers' own Llama, of whatever version is installed.

*Modes.* `attention_mode` is a field of the configuration: `from_pretrained(folder, attention_mode="sparse")` chooses it, and
`model.config.attention_mode = "full"` changes it. `full` is causal softmax attention with transformers' attention functions. In `sparse`, each
query attends to its own block of keys and to the `top_k - 1` earlier blocks of largest importance, as in training (arXiv 2511.20102, section 3.2;
the definition is the reference of `ssa_kernels.select_blocks`). In both, a sigmoid gate per token and query head multiplies the output.

*A trained scorer.* Under `score="indexer"` a layer also projects its input to index queries and keys, a small attention of its own, and a block's importance
is that attention's mass on it (`ssa_kernels.choose_by_index`). Full mode does not use it.

*Blocks and padding.* A row is one document. Its blocks are counted over its tokens, wherever the attention mask has padding: left, right or
between. So padding moves no block. Packed rows are refused in sparse mode, and so are attention masks of a shape of one's own.

*A convolution of keys.* With `key_convolution` 3 or 5, each channel of a key is convolved with those of the tokens before it in its row, after the projection
and before RoPE: k + silu(sum of w_l k[t - l]), in both modes and for both the choice of blocks and attention.

*Cache.* In sparse mode each layer of a DynamicCache or StaticCache also holds the mean key of each block. An update computes the means of the blocks
that it touches. Only complete blocks before a query's own are scored, and their means do not change. With any other cache the means
are computed from its keys at each call: the same results, more slowly. Under a trained scorer no means are kept. A token's index key lies beside its key, so
in sparse mode the cached keys, of any cache, are twice as wide. With a convolution of keys, each layer also holds the last RECENT keys of each row as they
were before it, so only caches that were made with the model's configuration will do, and no more than RECENT - 4 tokens can be cropped.

*Which code runs.* `ssa_kernels` serves, if it is installed, the tensors are on CUDA, the attention function is sdpa, `16 <= head_dim <= 256`, there
are at most 32 query heads per kv head, and the dtype is not float64:
- in both modes, one new token per row on a cache, without gradients, also inside torch.compile; in sparse mode with `top_k <= 128` and any score but
  official_compat and indexer, in full mode with a mask that is not additive;
- in sparse mode, a prompt on an empty cache, or a call without a cache; under a trained scorer with `head_dim <= 128` and `index_heads <= 32`.
Everything else is transformers' own in full mode, and plain torch in sparse mode: one new token attends to its gathered blocks, several attend
under a mask, by chunks of queries. The results differ by rounding.

Not here: sparse mode or a convolution of keys with other attention functions than eager and sdpa (vLLM, SGLang, FlashAttention and flex run mode full
only) or with packed rows, a convolution of keys under tensor parallelism, the alignment loss and the index loss of training (a trained scorer has no gradient here).
"""

import inspect
from typing import NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.generation import GenerationMixin
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
SCORES = ("softmax_sum", "per_head", "official_compat", "indexer")
BLOCK_SIZES = (16, 32, 64, 128)
TAPS = (0, 3, 5)
RECENT = 128  # keys of a row that a cache keeps as they were before the convolution: what it needs, and what drafts may be rejected of
QUERIES_PER_CHUNK = 128  # bounds the masks and the importance of a long prompt in plain torch
NOTHING = -1e30  # the index score of a token that a query does not see; finite, so that no softmax is NaN
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
        qk_norm: whether RMSNorm with a learnt weight over the head comes before RoPE, on each query head and key, as in Qwen3.
        score: how a query scores earlier blocks: "softmax_sum" (SSA), "per_head" (MoBA), "official_compat" (SSA's official code) or "indexer" (a
            trained scorer).
        index_heads: J, index queries per kv head, under score="indexer".
        key_convolution: W, taps of the convolution of keys, 3 or 5; 0: none.

    Raises:
        ValueError: for values that do not fit each other.
    """

    model_type = "ssa_llama"
    attention_mode: str = "sparse"
    block_size: int = 16
    top_k: int = 16
    attention_gate: bool = True
    score: str = "softmax_sum"
    qk_norm: bool = False
    index_heads: int = 1
    key_convolution: int = 0

    @property
    def is_sparse(self) -> bool:
        """Whether the mode is sparse."""
        if self.attention_mode not in MODES:
            raise ValueError(f"attention_mode={self.attention_mode} must be full or sparse; try sparse")
        return self.attention_mode == "sparse"

    def __post_init__(self, **kwargs) -> None:
        """Adds to a Llama's plan of tensor parallelism the projections that this model has: transformers warns of others."""
        own = ["g_proj"] * self.attention_gate + ["index_q_proj", "index_k_proj"] * (self.score == "indexer")
        plan = {f"layers.*.self_attn.{name}": "colwise" for name in own}
        self.base_model_tp_plan = (LlamaConfig.base_model_tp_plan or {}) | plan
        super().__post_init__(**kwargs)

    @property
    def uses_rows(self) -> bool:
        """Whether layers need to know where each row's tokens are."""
        return self.is_sparse or self.key_convolution > 0

    @property
    def is_indexed(self) -> bool:
        """Whether blocks are chosen by a trained scorer: never in full mode."""
        return self.is_sparse and self.score == "indexer"

    @property
    def layer_types(self) -> list[str]:
        """The type of each layer's cache. Absent for plain caches, as in a plain Llama. Follows `attention_mode`, and is therefore not saved."""
        sparse = self.is_sparse and not self.is_indexed
        if not sparse and not self.key_convolution:
            raise AttributeError("layer_types")
        layer = SSADynamicLayer if sparse else ConvolvedDynamicLayer
        if sparse and self.key_convolution:
            layer = ConvolvedSSADynamicLayer
        return [layer._layer_type] * self.num_hidden_layers

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
        self.check_score()
        if self.score == "official_compat" and not 2 <= self.top_k <= self.block_size:
            rule = f"must lie in 2 to block_size={self.block_size} under score=official_compat"
            raise ValueError(f"top_k={self.top_k} {rule}; try {self.block_size}")
        _ = self.is_sparse

    def check_score(self) -> None:
        """Raises ValueError for an unknown score."""
        if self.score not in SCORES:
            raise ValueError(f"score={self.score} must be {', '.join(SCORES[:-1])} or {SCORES[-1]}; try softmax_sum")
        if self.key_convolution not in TAPS:
            raise ValueError(f"key_convolution={self.key_convolution} must be 0, 3 or 5 tokens; try 3")
        if self.key_convolution and self.score == "indexer":
            rule = "is for blocks that are chosen by mean keys, and score=indexer chooses them by a trained scorer"
            raise ValueError(f"key_convolution={self.key_convolution} {rule}; try 0")
        if self.index_heads < 1:
            raise ValueError(f"index_heads={self.index_heads} must be at least 1 index query per kv head; try 1")

    def _get_generation_parameters(self) -> dict:
        """Returns generation parameters among the fields. `top_k` has the name of one of sampling's, but is a constant of the model."""
        return {name: value for name, value in super()._get_generation_parameters().items() if name != "top_k"}


class Rows(NamedTuple):
    """Where the tokens of a batch's rows are among the slots of the keys; the same for every layer.

    Attributes:
        positions: int64 [B, S], the position of each slot's token in its row, -1 for padding.
        order: int64 [B, S], the slots of each row's tokens in order, then the others.
        queries: int64 [B, T], the position of each query, for padding that of the last token before it; -1 if there is none.
        before: int64 [B], tokens of each row before the first query.
        offset: the slot of the first query.
        packing: (order [B, T] of the queries, the kernels' layout) if ssa_kernels serves this call's prompt, otherwise None.
        decoding: (int32 [B * G, at least S] where each token's key lies, int32 [B * G] tokens of each row) if they serve its one new token.
    """

    positions: Tensor
    order: Tensor
    queries: Tensor
    before: Tensor
    offset: int | Tensor = 0
    packing: tuple | None = None
    decoding: tuple | None = None


def locate_tokens(visible_BS: Tensor, offset: int | Tensor, tokens: int) -> Rows:
    """Returns the rows for a mask of their tokens, for `tokens` queries from slot `offset` on."""
    seen = visible_BS.long().cumsum(1)
    slot = torch.arange(visible_BS.shape[1], device=visible_BS.device)
    query = seen.index_select(1, offset + slot[:tokens]) - 1
    before = (visible_BS & (slot < offset)).sum(1)
    return Rows(torch.where(visible_BS, seen - 1, -1), tokens_first(visible_BS), query, before, offset)


def tokens_first(visible_BS: Tensor) -> Tensor:
    """Returns int64 `[B, S]`: the slots of tokens, then the others."""
    tokens, others = visible_BS.long().cumsum(1), (~visible_BS).long().cumsum(1)
    place = torch.where(visible_BS, tokens, tokens[:, -1:] + others) - 1
    slot = torch.arange(visible_BS.shape[1], device=visible_BS.device).expand_as(place)
    return torch.empty_like(place).scatter_(1, place, slot)


def visible_slots(mask: Tensor | None, shape: tuple[int, int], offset: int | Tensor, device: torch.device) -> Tensor:
    """Returns bool `[B, S]` of that shape, whether a slot holds a token, from a mask `[B, at most S]` or `[B, 1, T, S]`.

    Raises:
        ValueError: for a mask of another shape, or of four dims and not causal; of one query, that cannot be known.
    """
    rows, slots = shape
    if mask is None:
        return torch.ones(rows, slots, dtype=torch.bool, device=device)
    if mask.dim() == 4:
        visible = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
        slot = torch.arange(visible.shape[2], device=visible.device)
        causal = visible[:, -1:] & (slot <= offset + slot[: visible.shape[1], None])
        if visible.shape[1] > 1 and not torch.compiler.is_compiling() and not torch.equal(visible, causal):
            rule = "of four dims must be causal apart from padding in sparse mode and with key_convolution"
            raise ValueError(f"attention_mask {rule}; try a mask [rows, keys]")
        return visible[:, -1].expand(rows, slots)
    if mask.dim() != 2 or mask.shape[1] > slots:
        rule = f"must be [rows, keys] with {slots} keys"
        raise ValueError(f"attention_mask {tuple(mask.shape)} {rule}; try a mask as long as the text so far")
    return nn.functional.pad(mask.to(device=device, dtype=torch.bool), (0, slots - mask.shape[1]))


def block_means(k_BGSD: Tensor, order_BS: Tensor, first_block_B: Tensor, count: int, block_size: int) -> Tensor:
    """Returns `[B, G, count, D]` in k's dtype: the mean keys of `count` blocks of each row from its block `first_block_B` on.

    They are summed in float32 (float64 for float64) and then rounded, as in training. Means of incomplete blocks have no meaning.

    Args:
        k_BGSD: keys after RoPE, by slot; padding included.
        order_BS: see Rows.
        first_block_B: int64.
        count: blocks per row.
        block_size: keys per block.
    """
    B, G, S, D = k_BGSD.shape
    token = first_block_B[:, None] * block_size + torch.arange(count * block_size, device=k_BGSD.device)
    slot = order_BS.gather(1, token.clamp(max=S - 1))
    keys = k_BGSD.detach().gather(2, slot[:, None, :, None].expand(B, G, -1, D))
    wide = torch.promote_types(keys.dtype, torch.float32)
    return (keys.view(B, G, count, block_size, D).to(wide).sum(3) / block_size).to(keys.dtype)


def blocks_of(slots: int, block_size: int) -> int:
    """Returns the blocks that a cache of so many slots has room for: an update of its last token may write one more than it fills."""
    return (slots + block_size - 2) // block_size + 1


class RowTensors:
    """What a cache layer holds beside keys and values: tensors with a row per row of the batch, which change with them."""

    _names = ("block_means", "value_means", "recent_keys")

    def _change_rows(self, change) -> None:
        for name in self._names:
            if (held := getattr(self, name, None)) is not None:
                setattr(self, name, change(held))

    def _hold(self, name: str, new: Tensor) -> Tensor:
        """Returns a new tensor, which the layer holds from now on; a compiled graph will use its address."""
        if isinstance(self, StaticLayer) and not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(new)
        setattr(self, name, new)
        return new

    def reset(self) -> None:
        """Empties the layer."""
        super().reset()  # type: ignore[misc]
        static = isinstance(self, StaticLayer)  # emptied in place: a compiled graph holds its address
        self._change_rows(lambda held: held.zero_() if static else None)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replaces row i by row `beam_idx[i]`."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._change_rows(lambda held: held.index_select(0, beam_idx.to(held.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row; dynamic layers only."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._change_rows(lambda held: held.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows; dynamic layers only."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._change_rows(lambda held: held[indices, ...])


class BlockMeans(RowTensors):
    """What sparse cache layers add: the mean key of each block, `[B, G, R, D]`, and its updates.

    After `crop`, the block of the next token and later ones hold old means; each is computed again before a query can score it.
    """

    block_means: Tensor | None = None

    def update_means(self, keys: Tensor, rows: Rows, block_size: int, name: str = "block_means") -> Tensor:
        """Returns the means of all blocks, after computing those that the call's new keys belong to.

        Args:
            keys: `[B, G, S, D]`, as the layer's `update` returned them.
            rows: where the tokens are.
            block_size: keys per block.
            name: of the means; NSA also keeps those of values.
        """
        count = (rows.queries.shape[1] + block_size - 2) // block_size + 1
        first_block = rows.before // block_size
        new = block_means(keys, rows.order, first_block, count, block_size)
        place = (first_block[:, None] + torch.arange(count, device=new.device))[:, None, :, None].expand_as(new)
        return self.means_for(keys, block_size, name).scatter_(2, place, new)

    def means_for(self, keys: Tensor, block_size: int, name: str = "block_means") -> Tensor:
        """Returns the means with room for the blocks of the keys; new ones are 0."""
        (B, G, S, D), old = keys.shape, getattr(self, name)
        room = blocks_of(S, block_size)
        if old is None:
            return self._hold(name, keys.new_zeros(B, G, room, D))
        if old.shape[2] < room:
            old = torch.cat([old, old.new_zeros(B, G, room - old.shape[2], D)], dim=2)
        setattr(self, name, old)
        return old


class RecentKeys(RowTensors):
    """What cache layers under a convolution of keys add: the keys before it of each row's last RECENT tokens, at their position modulo RECENT.

    Padding is not kept, so neither does it lie between the keys of a row. The last place, `[B, G, RECENT + 1, D]`, is for what is not kept.
    """

    recent_keys: Tensor | None = None
    longest: int = 0  # most slots before any crop

    def exchange(self, k: Tensor, rows: Rows, count: int) -> Tensor:
        """Returns the last `count` keys of each row before the call, `[B, G, count, D]`, zeros where it has none, and keeps the call's.

        Args:
            k: `[B, G, T, D]`, the keys of the call before the convolution, by slot.
            rows: where the tokens are.
            count: fewer than RECENT.
        """
        (B, G, T, D), held = k.shape, self.recent_keys
        if held is None:
            held = self._hold("recent_keys", k.new_zeros(B, G, RECENT + 1, D))
        slot = torch.arange(max(T, count), device=k.device)
        position = rows.before[:, None] - count + slot[:count]
        place = torch.where(position < 0, RECENT, position % RECENT)
        earlier = held.gather(2, place[:, None, :, None].expand(B, G, count, D))
        earlier = earlier.masked_fill((position < 0)[:, None, :, None], 0.0)
        position = rows.positions.index_select(1, rows.offset + slot[:T])
        kept = (position >= 0) & (position > rows.queries[:, -1:] - RECENT)
        place = torch.where(kept, position % RECENT, RECENT)
        held.scatter_(2, place[:, None, :, None].expand(B, G, T, D), k.detach())
        return earlier

    def reset(self) -> None:
        """Empties the layer."""
        super().reset()
        self.longest = 0

    def crop(self, tokens: int) -> None:
        """Removes the last tokens as transformers does. Raises ValueError if the keys before what is left are no longer kept."""
        length = int(self.get_seq_length())  # type: ignore[attr-defined]
        left = min(tokens, length) if tokens > 0 else length + tokens  # before 5.24, above 0 it is what is left
        self.longest = max(self.longest, length)
        if left > 0 and self.longest > RECENT and self.longest - left > RECENT - max(TAPS) + 1:
            rule = f"can be cropped by at most {RECENT - max(TAPS) + 1} tokens with key_convolution"
            raise ValueError(f"a cache of {self.longest} tokens {rule}; try a new cache")
        super().crop(tokens)  # type: ignore[misc]


class SSADynamicLayer(BlockMeans, DynamicLayer):
    """A growing cache layer with keys, values and block means."""

    _layer_type = "ssa_sparse"


class SSAStaticLayer(BlockMeans, StaticLayer):
    """A cache layer of fixed size with keys, values and block means, for torch.compile."""

    _layer_type = "ssa_sparse"


class ConvolvedDynamicLayer(RecentKeys, DynamicLayer):
    """A growing cache layer with keys, values and recent keys before the convolution, for full mode."""

    _layer_type = "ssa_convolved"


class ConvolvedStaticLayer(RecentKeys, StaticLayer):
    """The same of fixed size."""

    _layer_type = "ssa_convolved"


class ConvolvedSSADynamicLayer(RecentKeys, SSADynamicLayer):
    """A growing cache layer that also holds block means, for sparse mode."""

    _layer_type = "ssa_convolved_sparse"


class ConvolvedSSAStaticLayer(RecentKeys, SSAStaticLayer):
    """The same of fixed size."""

    _layer_type = "ssa_convolved_sparse"


def choose_blocks(q_BHTD: Tensor, means_BGRD: Tensor, query_BT: Tensor, scale: float, config: SSALlamaConfig) -> Tensor:
    """Returns the chosen blocks, int64 `[B, G, T, N]` (`[B, H, T, N]` for per_head): ascending, padded with -1 at the end.

    The own block always, and the `top_k - 1` earlier blocks of largest importance; of equal ones, the more recent. No gradient.

    Args:
        q_BHTD: queries after RoPE.
        means_BGRD: mean key of each block; only those of complete blocks are read.
        query_BT: position of each query, -1 for padding, which chooses nothing.
        scale: factor of the logits.
        config: `top_k`, `score` and `block_size`.
    """
    B, H, T, _ = q_BHTD.shape
    G, R = means_BGRD.shape[1:3]
    wide = torch.promote_types(q_BHTD.dtype, torch.float32)
    own_BT = query_BT.div(config.block_size, rounding_mode="floor")
    # The softmax of NSA's compressed branch and of the official code also counts the own block, once that is complete.
    complete = config.score in ("compressed", "official_compat")
    counted = (query_BT + 1).div(config.block_size, rounding_mode="floor") if complete else own_BT
    block = torch.arange(R, device=own_BT.device)
    later = block >= own_BT[..., None]
    logits = q_BHTD.detach().to(wide).reshape(B, G, -1, q_BHTD.shape[3]) @ means_BGRD.to(wide).transpose(2, 3) * scale
    logits = logits.view(B, H, T, R).masked_fill((block >= counted[..., None])[:, None], float("-inf"))
    importance = logits
    if config.score != "per_head":
        # Without any candidate the softmax is NaN; those queries are masked again below.
        importance = logits.softmax(-1).view(B, G, H // G, T, R).sum(2)
        importance = torch.where(importance < TINY, 0.0, importance).masked_fill(later[:, None], float("-inf"))
    if config.score == "official_compat":
        importance = _drop_unofficial(importance, own_BT[:, None, :, None], config.block_size)
    return _best_and_own(importance, own_BT, config.top_k)


def choose_by_index(
    iq_BHTD: Tensor, ik_BGSD: Tensor, query_BT: Tensor, order_BS: Tensor, scale: float, config: SSALlamaConfig
) -> Tensor:
    """Returns the chosen blocks, int64 `[B, G, T, N]`, as `choose_blocks` does, by a trained scorer.

    A block's importance is the share of the index queries' softmax over the row's tokens that falls on it, a mean over the J queries of a kv head.

    Args:
        iq_BHTD: index queries after RoPE, J per kv head.
        ik_BGSD: index keys after RoPE, by slot.
        query_BT: position of each query, -1 for padding, which chooses nothing.
        order_BS: see Rows.
        scale: factor of the index scores.
        config: `top_k` and `block_size`.
    """
    (B, H, T, D), (G, S), size = iq_BHTD.shape, ik_BGSD.shape[1:3], config.block_size
    R, wide = (S - 1) // size + 1, torch.promote_types(iq_BHTD.dtype, torch.float32)
    logits = iq_BHTD.detach().to(wide).reshape(B, G, -1, D) @ ik_BGSD.detach().to(wide).transpose(2, 3) * scale
    logits = logits.view(B, H, T, S).gather(3, order_BS[:, None, None].expand(B, H, T, S))
    later = torch.arange(S, device=logits.device) > query_BT[..., None]
    logits = nn.functional.pad(logits.masked_fill(later[:, None], NOTHING), (0, R * size - S), value=NOTHING)
    of_block = logits.view(B, G, H // G, T, R, size).logsumexp(-1)
    importance = (of_block - of_block.logsumexp(-1, keepdim=True)).logsumexp(2)
    own_BT = query_BT.div(size, rounding_mode="floor")
    later = torch.arange(R, device=logits.device) >= own_BT[..., None]
    return _best_and_own(importance.masked_fill(later[:, None], float("-inf")), own_BT, config.top_k)


def _best_and_own(importance: Tensor, own_BT: Tensor, top_k: int) -> Tensor:
    """Returns the own block and the `top_k - 1` of largest importance [B, G or H, T, R], -inf for blocks that are not earlier."""
    best = _most_important(importance, min(top_k - 1, importance.shape[-1]))
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


class SSALlamaRotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's RoPE with cosines and sines in float32: products are rounded once, as in training, and block means with them."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (cos, sin), `[B, T, D]`."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return super().forward(torch.empty(0, dtype=wide, device=x.device), position_ids)


class KeyConvolution(nn.Conv1d):
    """The convolution of keys, with a depthwise Conv1d's weight `[G * D, 1, W]`: its last tap is the token's own."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__(channels, channels, taps, groups=channels, bias=False)

    def forward(self, k_BGTD: Tensor, earlier: Tensor, rows: Rows) -> Tensor:
        """Returns the convolved keys; in float32 (float64 for float64), and rounded once, as in training.

        Args:
            k_BGTD: the keys of a call, by slot.
            earlier: `[B, G, W - 1, D]`, each row's last keys before the call.
            rows: where the tokens are. Padding is convolved with any tokens.
        """
        (B, G, T, D), (width, _, W) = k_BGTD.shape, self.weight.shape
        if width != G * D:
            rule = "does not work under tensor parallelism"
            raise ValueError(f"key_convolution={W} {rule}; try device_map in place of tp_plan")
        wide = torch.promote_types(k_BGTD.dtype, torch.float32)
        k, source = k_BGTD.to(wide), torch.cat([earlier, k_BGTD], dim=2).to(wide)
        taps = self.weight.to(wide).view(G, D, W).unbind(-1)
        total = k * taps[-1][:, None]
        for distance in range(1, W):
            position = rows.queries - distance
            slot = rows.order.gather(1, position.clamp(min=0)) - rows.offset
            place = torch.where(position < rows.before[:, None], position - rows.before[:, None], slot) + W - 1
            keys = source.gather(2, place.clamp(min=0)[:, None, :, None].expand(B, G, T, D))
            total = total + keys.masked_fill((position < 0)[:, None, :, None], 0.0) * taps[-1 - distance][:, None]
        return (k + nn.functional.silu(total)).to(k_BGTD.dtype)


class SSALlamaAttention(LlamaAttention):
    """One layer's attention: full or sparse as the configuration says, then the gate, then the output projection."""

    def __init__(self, config: SSALlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.g_proj = None
        if config.attention_gate:
            self.g_proj = nn.Linear(config.hidden_size, config.num_attention_heads, bias=False)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm, self.k_norm = (LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps) for _ in range(2))
        self.k_conv = None
        if config.key_convolution:
            self.k_conv = KeyConvolution(config.num_key_value_heads * self.head_dim, config.key_convolution)
        self.index_q_proj = self.index_k_proj = None
        if config.score == "indexer":
            width, heads = config.hidden_size, config.num_key_value_heads
            self.index_q_proj = nn.Linear(width, heads * config.index_heads * self.head_dim, bias=False)
            self.index_k_proj = nn.Linear(width, heads * self.head_dim, bias=False)

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
        if self.k_conv is not None:
            k = self._convolved(k, cache, kwargs["rows"])
        q, k = self._normed_and_rotated(q, k, position_embeddings)
        if self.config.is_indexed:
            projections = (self.index_q_proj, self.index_k_proj)
            index = (p(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2) for p in projections)
            kwargs["index"] = tuple(x.to(v.dtype) for x in apply_rotary_pos_emb(*index, *position_embeddings))
        attend = self._sparse if self.config.is_sparse else self._full
        out, weights = attend(q, k, v, attention_mask, cache, **kwargs)
        if self.g_proj is not None:
            out, logits = out.reshape(*shape, -1, self.head_dim), self.g_proj(hidden_states)
            wide = torch.promote_types(out.dtype, torch.float32)
            out = (out.to(wide) * logits.to(wide).sigmoid().unsqueeze(-1)).to(out.dtype)
        return self.o_proj(out.reshape(*shape, -1)), weights

    def _normed_and_rotated(
        self, q: Tensor, k: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Returns queries and keys after QK-norm and RoPE."""
        dtype = q.dtype
        if self.q_norm is not None:  # in float32, so that nothing is rounded between the norm and RoPE, as in training
            wide = torch.promote_types(dtype, torch.float32)
            q, k = self.q_norm(q.to(wide)), self.k_norm(k.to(wide))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        return q.to(dtype), k.to(dtype)

    def _convolved(self, k: Tensor, cache, rows: Rows) -> Tensor:
        """Returns the convolved keys of a call; a cache gives the keys before them, and keeps the call's."""
        count = self.config.key_convolution - 1
        if cache is None:
            return self.k_conv(k, k.new_zeros(*k.shape[:2], count, k.shape[3]), rows)
        layer = cache.layers[self.layer_idx] if self.layer_idx < len(cache.layers) else None
        if not hasattr(layer, "recent_keys"):
            rule = "needs a cache that keeps keys before the convolution"
            raise ValueError(f"key_convolution={count + 1} {rule}; try DynamicCache(config=model.config)")
        return self.k_conv(k, layer.exchange(k, rows, count), rows)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Returns what the configured attention function does."""
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        return attend(self, q, k, v, mask, dropout=dropout, scaling=self.scaling, **kwargs)

    def _full(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cache, *, rows: Rows | None = None, **kwargs):
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx, kwargs=kwargs)
        if rows is not None and rows.decoding is not None:
            return self._decode(q, k, v, None, rows.decoding), None
        return self._attend(q, k, v, mask, **kwargs)

    def _sparse(self, q: Tensor, k: Tensor, v: Tensor, _, cache, *, rows: Rows, index: tuple | None = None, **kwargs):
        """Returns (output, attention weights or None) of sparse attention. Under a trained scorer, `index` are the tokens' index queries and keys."""
        if index is not None:
            return self._indexed(q, k, v, *index, cache, rows=rows, **kwargs)
        size, new_k, new_v, means = self.config.block_size, k, v, None
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx, kwargs=kwargs)
            layer = cache.layers[self.layer_idx]
            keeps_means = hasattr(layer, "block_means")  # its class may be that of another folder's copy of this file
            if keeps_means and rows.decoding is not None:
                return self._decode(q, k, v, layer.means_for(k, size), rows.decoding), None
            if keeps_means:
                means = layer.update_means(k, rows, size)
        if rows.packing is not None:
            return self._kernels(q, new_k, new_v, *rows.packing), None
        if means is None:
            means = block_means(k, rows.order, torch.zeros_like(rows.before), (k.shape[2] - 1) // size + 1, size)
        if rows.decoding is not None:
            return self._decode(q, k, v, means, rows.decoding), None

        def choose(some: slice, query_BT: Tensor) -> Tensor:
            return choose_blocks(q[:, :, some], means, query_BT, self.scaling, self.config)

        return self._by_chunks(choose, q, k, v, rows, **kwargs)

    def _indexed(self, q: Tensor, k: Tensor, v: Tensor, iq: Tensor, ik: Tensor, cache, *, rows: Rows, **kwargs):
        """Returns (output, attention weights or None) of attention to the blocks that the trained scorer chooses."""
        out = None if rows.packing is None else self._kernels(q, k, v, *rows.packing, iq, ik)
        if cache is not None:
            both, v = cache.update(torch.cat([k, ik], dim=-1), v, self.layer_idx, kwargs=kwargs)
            k, ik = both.chunk(2, dim=-1)
        if out is not None:
            return out, None

        def choose(some: slice, query_BT: Tensor) -> Tensor:
            return choose_by_index(iq[:, :, some], ik, query_BT, rows.order, self.scaling, self.config)

        return self._by_chunks(choose, q, k, v, rows, **kwargs)

    def _by_chunks(self, choose, q: Tensor, k: Tensor, v: Tensor, rows: Rows, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Returns (output, weights or None) in plain torch; `choose`: (some of the queries, their positions) -> their blocks."""
        outs = []
        for first in range(0, q.shape[2], QUERIES_PER_CHUNK):
            some = slice(first, first + QUERIES_PER_CHUNK)
            query_BT = rows.queries[:, some]
            outs.append(self._plain(q[:, :, some], k, v, choose(some, query_BT), query_BT, rows, **kwargs))
        if len(outs) == 1:
            return outs[0]
        weights = None if outs[0][1] is None else torch.cat([w for _, w in outs], dim=2)
        return torch.cat([out for out, _ in outs], dim=1), weights

    def _kernels(self, q: Tensor, k: Tensor, v: Tensor, order: Tensor, documents, *index: Tensor) -> Tensor:
        """Returns [B, T, H, D]: rows are packed, the tokens of each as a document and then its padding as another."""
        c, shape = self.config, (q.shape[0], q.shape[2], q.shape[1], q.shape[3])
        if documents.cu_seqlens.device != q.device:  # layers on several devices
            documents = ssa_kernels.documents.layout_to(documents, q.device)
        place = order[..., None, None]
        packed = (torch.take_along_dim(x.transpose(1, 2), place, dim=1).flatten(0, 1) for x in (q, k, v, *index))
        q, k, v, *index = packed
        common = {"block_size": c.block_size, "cu_seqlens": documents, "scale": self.scaling}
        if index:
            indices = ssa_kernels.choose_by_index(*index, top_k=c.top_k, **common)
        else:
            indices = ssa_kernels.select_blocks(q.detach(), k.detach(), top_k=c.top_k, score=c.score, **common)
        out = ssa_kernels.sparse_attention(q, k, v, indices, **common)[0].view(shape)
        return torch.zeros_like(out).scatter(1, place.expand(shape), out)

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, means: Tensor | None, decoding: tuple) -> Tensor:
        """Returns [B, 1, H, D]: to the kernels, each kv head of each row is a sequence. Without means, of full attention.

        The mean of the block that the new token completes is written to `means`.
        """
        c, (B, G, S, D), H = self.config, k.shape, q.shape[1]
        room, (key_table, lengths) = blocks_of(S, c.block_size), decoding
        if len(lengths) != B * G:  # a tensor-parallel rank's kv heads
            key_table, lengths = (x.view(B, -1, *x.shape[1:])[:, :G].flatten(0, 1) for x in (key_table, lengths))
        held = k.new_empty(B, G, room, D) if means is None else means
        if more := held.shape[2] - room:  # a cropped cache has more blocks
            key_table = nn.functional.pad(key_table, (0, more * c.block_size))
        k, v, held = (x.reshape(B * G, -1, 1, D).contiguous() for x in (k, v, held))
        where = {"key_table": key_table.to(q.device), "seq_lens": lengths.to(q.device)}
        held = ssa_kernels.KeyValueCache(k=k, v=v, means=held, **where)
        common: dict = {"scale": self.scaling}
        if c.is_sparse:
            ssa_kernels.update_block_means(held, num_tokens=1)
            common |= {"top_k": c.top_k, "score": c.score}
        out, _ = ssa_kernels.decode_attention(q.reshape(B * G, 1, H // G, D), held, mode=c.attention_mode, **common)
        return out.view(B, 1, H, D)

    def _plain(
        self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, query_BT: Tensor, rows: Rows, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (output [B, T, H, D], weights or None) of some queries [B, H, T, D] at positions [B, T] over their chosen blocks."""
        size, eager = self.config.block_size, self.config._attn_implementation == "eager"
        kv_heads, keys = k.shape[1:3]
        if q.shape[2] == 1 and chosen.shape[1] == kv_heads and chosen.shape[3] * size < keys and not eager:
            # One token reads the keys of its blocks only.
            place = torch.arange(size, device=q.device)
            token = (chosen.transpose(2, 3) * size + place).flatten(2)  # [B, G, N K]; below 0 in a block of -1
            slot = rows.order[:, None].expand(-1, kv_heads, -1).gather(2, token.clamp(0, keys - 1))
            k, v = (x.gather(2, slot[..., None].expand(*slot.shape, x.shape[3])) for x in (k, v))
            mask = ((token >= 0) & (token <= query_BT[:, None])).unsqueeze(2)
        else:
            mask = _chosen_keys(chosen, blocks_of(keys, size), rows.positions, query_BT, size)
        mask = mask.repeat_interleave(q.shape[1] // mask.shape[1], 1)
        if eager:
            mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, torch.finfo(q.dtype).min)
        return self._attend(q, k, v, mask, **kwargs)


def _chosen_keys(chosen: Tensor, num_blocks: int, position_BS: Tensor, query_BT: Tensor, block_size: int) -> Tensor:
    """Returns bool [B, G or H, T, S], whether a query may see a key. Padding before a row's first token sees padding, because an empty softmax is NaN."""
    table = torch.zeros(*chosen.shape[:3], num_blocks + 1, dtype=torch.bool, device=chosen.device)
    table.scatter_(3, torch.where(chosen < 0, num_blocks, chosen), True)
    position, query = position_BS[:, None, None], query_BT[:, None, :, None]
    block = position.div(block_size, rounding_mode="floor").clamp(0, num_blocks - 1)
    mask = table.gather(3, block.expand(*chosen.shape[:3], -1))
    return (mask & (position >= 0) & (position <= query)) | ((position < 0) & (query < 0))


class SSALlamaDecoderLayer(LlamaDecoderLayer):
    """Llama's decoder layer with SSA's attention."""

    attention_class: type[SSALlamaAttention] = SSALlamaAttention

    def __init__(self, config: SSALlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = self.attention_class(config, layer_idx)


class SSALlamaPreTrainedModel(LlamaPreTrainedModel):
    """What both models share."""

    config: SSALlamaConfig
    _no_split_modules = ["SSALlamaDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": SSALlamaDecoderLayer, "attentions": SSALlamaAttention}  # noqa: RUF012


class SSALlamaModel(SSALlamaPreTrainedModel, LlamaModel):
    """The Llama without its output layer."""

    layer_class: type[SSALlamaDecoderLayer] = SSALlamaDecoderLayer

    def __init__(self, config: SSALlamaConfig) -> None:
        super(LlamaModel, self).__init__(config)  # the fields of LlamaModel.__init__, with other layers
        config.validate_architecture()  # from_pretrained sets fields after the configuration's own check
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([self.layer_class(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = SSALlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, inputs_embeds=None, **kwargs):
        """Returns what LlamaModel.forward does. `past_key_values` is the cache's name before transformers 5.24, and accepted by it."""
        if cache is None:
            cache = kwargs.get("past_key_values")
        else:
            kwargs[CACHE_NAME] = cache
        like = input_ids if inputs_embeds is None else inputs_embeds
        self._check_index_keys(cache)
        if self.config.uses_rows:
            self._check_rows(attention_mask, position_ids, cache)
        if self.config.uses_rows or self._kernels_decode(like, attention_mask, cache):
            rows = kwargs["rows"] = self._rows(attention_mask, like, cache)
            if self._masks_by_rows(rows):
                attention_mask = torch.ones(
                    1, 1, 1, 1, dtype=torch.bool, device=like.device
                )  # of four dims, it is taken as it is; layers use the rows
        common = {"attention_mask": attention_mask, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        return super().forward(input_ids=input_ids, **common, **kwargs)

    def _check_rows(self, attention_mask, position_ids: Tensor | None, cache) -> None:
        """Raises ValueError for what does not go by rows: sparse mode, a convolution of keys, and NSA."""
        name, taps = self.config._attn_implementation, self.config.key_convolution
        where = f"key_convolution={taps}" if taps else "attention_mode=sparse"
        full = "" if taps else ", or attention_mode=full"
        if name not in ("eager", "sdpa"):
            rule = f"must be sdpa or eager under {where}"
            raise ValueError(f"attn_implementation={name} {rule}; try attn_implementation=sdpa{full}")
        if position_ids is None or attention_mask is not None or cache is not None or torch.compiler.is_compiling():
            return
        if (position_ids.diff(dim=-1) < 1).any():
            rule = f"restart within a row, and under {where} a row is one document"
            raise ValueError(f"position_ids {rule}; try a row per document{full}")

    def _masks_by_rows(self, rows: Rows) -> bool:
        """Returns whether layers mask by the rows, and need no mask."""
        return self.config.is_sparse or rows.decoding is not None

    def _check_index_keys(self, cache) -> None:
        """Raises ValueError for a trained scorer on a cache that was filled in the other mode."""
        c = self.config
        held = cache.layers[0].keys if c.score == "indexer" and cache is not None and cache.layers else None
        if held is not None and held.dim() == 4 and held.shape[3] != c.head_dim * (1 + c.is_indexed):
            rule = "cannot go on from a cache of the other mode under score=indexer: only sparse mode keeps index keys"
            raise ValueError(f"attention_mode={c.attention_mode} {rule}; try a new cache")

    def _rows(self, attention_mask: Tensor | None, like: Tensor, cache) -> Rows:
        """Returns where the tokens are, for inputs `like` [B, T, ...]."""
        count, tokens = like.shape[:2]
        offset, slots = (
            (0, tokens) if cache is None else (cache.get_seq_length() + 0, cache.get_mask_sizes(tokens, 0)[0])
        )
        visible = visible_slots(attention_mask, (count, slots), offset, like.device)
        rows = locate_tokens(visible, offset, tokens)
        if self._kernels_decode(like, attention_mask, cache):
            return rows._replace(decoding=self._key_table(rows))
        return rows._replace(packing=self._pack(visible[:, :tokens])) if self._kernels_serve(like, offset) else rows

    def _kernels_serve(self, like: Tensor, offset: int | Tensor) -> bool:
        """Returns whether ssa_kernels serves a prompt: the rule is at the top of this file."""
        if not self.config.is_sparse or like.shape[1] == 1 or torch.compiler.is_compiling():
            return False
        scored = self.config.score != "indexer" or (self.config.head_dim <= 128 and self.config.index_heads <= 32)
        return scored and self._kernels_take(like) and int(offset) == 0

    def _kernels_decode(self, like: Tensor, attention_mask: Tensor | None, cache) -> bool:
        """Returns whether ssa_kernels serves one new token per row: the rule is at the top of this file."""
        c = self.config
        if like.shape[1] != 1 or cache is None or torch.is_grad_enabled():
            return False
        if c.is_sparse:
            return c.top_k <= 128 and c.score not in ("official_compat", "indexer") and self._kernels_take(like)
        additive = attention_mask is not None and attention_mask.dim() == 4 and attention_mask.dtype != torch.bool
        return not additive and self._kernels_take(like)

    def _kernels_take(self, like: Tensor) -> bool:
        """Returns whether ssa_kernels takes the model's shapes and dtype, for inputs on this device."""
        c = self.config
        if ssa_kernels is None or not like.is_cuda or c._attn_implementation != "sdpa" or self.dtype == torch.float64:
            return False
        return 16 <= c.head_dim <= 256 and c.num_attention_heads // c.num_key_value_heads <= 32

    def _key_table(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Returns `Rows.decoding`, each row once per kv head."""
        heads, size, slots = self.config.num_key_value_heads, self.config.block_size, rows.order.shape[1]
        table = nn.functional.pad(rows.order.int(), (0, blocks_of(slots, size) * size - slots))
        return table.repeat_interleave(heads, 0), (rows.queries[:, 0] + 1).int().repeat_interleave(heads)

    def _pack(self, visible_BT: Tensor) -> tuple:
        """Returns `Rows.packing`: rows one after another, each its tokens and then its padding, which is a document of its own."""
        count, tokens = visible_BT.shape
        start = torch.arange(count, device=visible_BT.device) * tokens
        ends = torch.stack([start, start + visible_BT.sum(1)], dim=1).flatten()
        boundaries = torch.cat([ends, ends.new_full((1,), count * tokens)]).int()
        sizes = {"num_tokens": count * tokens, "block_size": self.config.block_size, "max_length": tokens}
        return tokens_first(visible_BT), ssa_kernels.build_layout(boundaries, **sizes)


class SSALlamaForCausalLM(SSALlamaPreTrainedModel, LlamaForCausalLM, GenerationMixin):
    """The Llama with its output layer."""

    model_class: type[SSALlamaModel] = SSALlamaModel

    def __init__(self, config: SSALlamaConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)  # the fields of LlamaForCausalLM.__init__, with another model
        self.model = self.model_class(config)
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
        names = ("inputs_embeds", "position_ids", CACHE_NAME)
        return create_causal_mask(config, attention_mask=attention_mask, **{name: kwargs[name] for name in names})


SSALlamaConfig.register_for_auto_class()
SSALlamaModel.register_for_auto_class("AutoModel")
SSALlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
