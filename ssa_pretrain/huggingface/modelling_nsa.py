"""A Llama with NSA's attention for Hugging Face transformers, beside modelling_ssa.py, whose configuration, rows and selection it uses.

An exported folder holds a copy of both files, and `trust_remote_code=True` runs them. Each layer sums three branches, with a sigmoid gate each per
token and query head (arXiv 2502.11089, in the form of the released NSA-1B of arXiv 2511.20102):

* compressed: attention over the mean keys and mean values of the blocks that are complete at the query;
* selected: the `top_k` blocks of largest probability in the compressed branch, the own block included; in `attention_mode="full"` every earlier token;
* window: the last `window` tokens.

Padding and blocks are those of modelling_ssa.py. In both modes each layer of a DynamicCache or StaticCache also holds the mean key and the mean value of each
block, as there. With any other cache, and where gradients are wanted, the means are computed from its keys and values at each call.

*Which code runs.* `ssa_kernels` serves a prompt on an empty cache, or a call without a cache, in sparse mode, on CUDA with sdpa; everything else is
plain torch: attention under masks, by chunks of queries.

Not here: other attention functions than eager and sdpa, packed rows, a learned compression. Attention weights are those of the selected branch.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, StaticLayer

from .modelling_ssa import (
    QUERIES_PER_CHUNK,
    BlockMeans,
    Rows,
    SSALlamaAttention,
    SSALlamaConfig,
    SSALlamaDecoderLayer,
    SSALlamaForCausalLM,
    SSALlamaModel,
    choose_blocks,
    ssa_kernels,
)

SCORES = ("compressed", "official_compat")
COMPRESSED, SELECTED, WINDOW = 0, 1, 2  # a head's rows of g_proj


@strict
class NSALlamaConfig(SSALlamaConfig):
    """The configuration of modelling_ssa.py with NSA's window.

    Args:
        window: tokens per query in the sliding window, its own included.
        score: "compressed" (NSA) or "official_compat" (the same probabilities in the search of the official code).

    Raises:
        ValueError: for values that do not fit each other.
    """

    model_type = "nsa_llama"

    score: str = "compressed"
    window: int = 128

    @property
    def layer_types(self) -> list[str]:
        """The type of each layer's cache, in both modes; not saved."""
        return [NSADynamicLayer._layer_type] * self.num_hidden_layers

    @property
    def uses_rows(self) -> bool:
        """Whether layers need to know where each row's tokens are."""
        return True

    def check_score(self) -> None:
        """Raises ValueError for a score that is not NSA's, and for no gates or no window."""
        if self.score not in SCORES:
            raise ValueError(f"score={self.score} must be compressed or official_compat; try compressed")
        if self.key_convolution:
            raise ValueError(f"key_convolution={self.key_convolution} has no place in NSA; try 0")
        if not self.attention_gate:
            raise ValueError("attention_gate=False leaves NSA's branches without the gates that sum them; try True")
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1: a token sees itself; try 128")


class ValueMeans(BlockMeans):
    """What NSA's cache layers add: the mean key and the mean value of each block."""

    value_means: Tensor | None = None


class NSADynamicLayer(ValueMeans, DynamicLayer):
    """A growing cache layer with keys, values and their means by block."""

    _layer_type = "ssa_nsa"


class NSAStaticLayer(ValueMeans, StaticLayer):
    """The same of fixed size, for torch.compile."""

    _layer_type = "ssa_nsa"


class NSALlamaAttention(SSALlamaAttention):
    """One layer's attention: three branches, their gated sum, then the output projection."""

    def __init__(self, config: NSALlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.g_proj = nn.Linear(config.hidden_size, 3 * config.num_attention_heads, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache=None,
        past_key_values=None,
        *,
        rows: Rows,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (output [B, T, M], the selected branch's attention weights or None)."""
        cache = past_key_values if cache is None else cache
        shape = hidden_states.shape[:-1]
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2) for p in projections)
        q, k = self._normed_and_rotated(q, k, position_embeddings)
        new, means, size = (k, v), None, self.config.block_size
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx, kwargs=kwargs)
            layer = cache.layers[self.layer_idx]
            if hasattr(layer, "value_means"):
                means = [layer.update_means(k, rows, size), layer.update_means(v, rows, size, "value_means")]
        if rows.packing is not None:
            branches, weights = self._packed_branches(q, *new, *rows.packing), None
        else:
            if means is None or torch.is_grad_enabled():  # those of a cache have no gradient
                means = [_means(x, rows.order, size) for x in (k, v)]
            branches, weights = self._plain_branches(q, k, v, means, rows, **kwargs)
        wide = torch.promote_types(v.dtype, torch.float32)
        gates = self.g_proj(hidden_states).view(*shape, -1, 3).to(wide).sigmoid()
        out = sum(branch.to(wide) * gates[..., i, None] for i, branch in enumerate(branches))
        return self.o_proj(out.to(v.dtype).reshape(*shape, -1)), weights

    def _packed_branches(self, q: Tensor, k: Tensor, v: Tensor, order: Tensor, documents) -> list[Tensor]:
        """Returns the branches [B, T, H, D] by ssa_kernels: rows are packed, the tokens of each as a document and then its padding as another."""
        c, shape, place = self.config, (q.shape[0], q.shape[2], q.shape[1], q.shape[3]), order[..., None, None]
        if documents.cu_seqlens.device != q.device:  # layers on several devices
            documents = ssa_kernels.documents.layout_to(documents, q.device)
        q, k, v = (torch.take_along_dim(x.transpose(1, 2), place, dim=1).flatten(0, 1) for x in (q, k, v))
        common = {"cu_seqlens": documents, "scale": self.scaling}
        blocks = common | {"block_size": c.block_size}
        indices = ssa_kernels.select_blocks(q.detach(), k.detach(), top_k=c.top_k, score=c.score, **blocks)
        found = [
            ssa_kernels.compressed_attention(q, k, v, **blocks)[0],
            ssa_kernels.sparse_attention(q, k, v, indices, **blocks)[0],
            ssa_kernels.window_attention(q, k, v, window=c.window, **common)[0],
        ]
        return [torch.zeros_like(x.view(shape)).scatter(1, place.expand(shape), x.view(shape)) for x in found]

    def _plain_branches(
        self, q: Tensor, k: Tensor, v: Tensor, means: list[Tensor], rows: Rows, **kwargs
    ) -> tuple[list[Tensor], Tensor | None]:
        """Returns the branches [B, T, H, D] in plain torch, and the selected one's weights or None, by chunks of queries."""
        parts = zip(q.split(QUERIES_PER_CHUNK, 2), rows.queries.split(QUERIES_PER_CHUNK, 1), strict=True)
        chunks = [self._branches_of(part, k, v, means, query, rows, **kwargs) for part, query in parts]
        branches = [torch.cat(pieces, dim=1) for pieces in zip(*(found for found, _ in chunks), strict=True)]
        weights = None if chunks[0][1] is None else torch.cat([w for _, w in chunks], dim=2)
        return branches, weights

    def _branches_of(
        self, q: Tensor, k: Tensor, v: Tensor, means: list[Tensor], query_BT: Tensor, rows: Rows, **kwargs
    ) -> tuple[list[Tensor], Tensor | None]:
        """Returns the branches [B, T, H, D] of some queries [B, H, T, D] at positions [B, T], and the selected one's weights or None."""
        c, position, query = self.config, rows.positions[:, None, None], query_BT[:, None, :, None]
        nothing = (position < 0) & (
            query < 0
        )  # padding before a row's first token sees padding: an empty softmax is NaN
        earlier = ((position >= 0) & (position <= query)) | nothing
        if c.is_sparse:
            chosen = choose_blocks(q, means[0].detach(), query_BT, self.scaling, c)
            selected, weights = self._plain(q, k, v, chosen, query_BT, rows, **kwargs)
        else:
            selected, weights = self._attend(q, k, v, self._mask(earlier, q), **kwargs)
        near = (earlier & (position > query - c.window)) | nothing
        window, _ = self._attend(q, k, v, self._mask(near, q), **kwargs)
        complete = (query + 1).div(c.block_size, rounding_mode="floor")
        visible = torch.arange(means[0].shape[2], device=q.device) < complete
        none = complete == 0
        compressed, _ = self._attend(q, *means, self._mask(visible | none, q), **kwargs)
        return [compressed.masked_fill(none.transpose(1, 2), 0.0), selected, window], weights

    def _mask(self, visible: Tensor, q: Tensor) -> Tensor:
        """Returns a mask [B, 1, T, S] as the configured attention function takes it."""
        if self.config._attn_implementation != "eager":
            return visible
        return torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill(
            ~visible, torch.finfo(q.dtype).min
        )


def _means(x_BGSD: Tensor, order_BS: Tensor, block_size: int) -> Tensor:
    """Returns `[B, G, R, D]` in x's dtype: the mean of each block of each row's tokens, rounded as in training. Those of incomplete blocks have no meaning."""
    B, G, S, D = x_BGSD.shape
    count = (S - 1) // block_size + 1
    slot = nn.functional.pad(order_BS, (0, count * block_size - S))
    tokens = x_BGSD.gather(2, slot[:, None, :, None].expand(B, G, -1, D))
    wide = torch.promote_types(x_BGSD.dtype, torch.float32)
    return (tokens.view(B, G, count, block_size, D).to(wide).sum(3) / block_size).to(x_BGSD.dtype)


class NSALlamaDecoderLayer(SSALlamaDecoderLayer):
    """Llama's decoder layer with NSA's attention."""

    attention_class = NSALlamaAttention


class NSALlamaModel(SSALlamaModel):
    """The Llama without its output layer."""

    config: NSALlamaConfig
    layer_class = NSALlamaDecoderLayer
    _no_split_modules = ["NSALlamaDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": NSALlamaDecoderLayer, "attentions": NSALlamaAttention}  # noqa: RUF012

    def _masks_by_rows(self, rows: Rows) -> bool:
        """Returns True, in both modes."""
        return True

    def _kernels_decode(self, like: Tensor, attention_mask: Tensor | None, cache) -> bool:
        """Returns False: no kernel serves one new token."""
        return False


class NSALlamaForCausalLM(SSALlamaForCausalLM):
    """The Llama with its output layer."""

    config: NSALlamaConfig
    model_class = NSALlamaModel
    _no_split_modules = ["NSALlamaDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": NSALlamaDecoderLayer, "attentions": NSALlamaAttention}  # noqa: RUF012


NSALlamaConfig.register_for_auto_class()
NSALlamaModel.register_for_auto_class("AutoModel")
NSALlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
