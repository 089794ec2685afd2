"""An attention layer with a trained scorer of blocks (attention.score=indexer): index projections, their choice of blocks, and the index loss.

Method (docs/methods/indexer.md; MiniMax-M3's MSA, arXiv 2606.13392; DeepSeek-V3.2's lightning indexer). Beside its queries, keys and values a layer
projects the same normalised hidden states to J index queries and one index key per kv head, of the width of a head, with RoPE. They are a small
attention: a block's score is that attention's mass on it, and the sparse stream reads the blocks with the largest (`select`). The index loss is the KL
divergence from full attention's mass by block to the scorer's (`ssa_kernels.index_loss`).

The scorer and the model do not disturb each other: hidden states, and the queries and keys of the target, are detached, and the choice has no
gradient. The model learns from cross entropy (and alignment), the scorer from the index loss alone, as in both sources.

    method indexer  the main stream alone: full in the warm-up, then sparse. Drawn queries compute the index loss, not the other stream.
    method ssa      both streams as ever, with this choice; the queries that compute both also compute the index loss

The projection's rows are grouped by kv head, J * D for index queries and D for the key, so tensor parallelism shards them with that head, and no weight
is shared between tensor ranks. (MSA's groups share one key.) The layer's norm must not be fused into linear_qkv, because two projections read it.
Under context parallelism index keys are gathered as keys are.

Texts are continued from a cache that also holds the index keys of all their tokens (text_cache.py): a block's mass depends on the query, so nothing shorter
than its keys can stand for a block. In the full stream none are kept.
"""

from dataclasses import dataclass, replace

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ssa_kernels import DocumentLayout, choose_by_index, index_loss, rope
from ssa_pretrain.config import AttentionConfig, Method
from ssa_pretrain.model.alignment import attach_loss
from ssa_pretrain.model.attention import LayerDiagnostics, PackedTokens, SSAAttention, SSAAttentionSubmodules


@dataclass
class IndexerAttentionSubmodules(SSAAttentionSubmodules):
    """The projections, with that of the scorer; neither linear_qkv nor linear_index contains a norm."""

    linear_index: ModuleSpec | type


@dataclass(frozen=True, slots=True)
class _Index:
    """The scorer's tensors in one forward: iq [T, G * J, D] of this rank's queries, ik [S, G, D] of all tokens."""

    iq: Tensor
    ik: Tensor
    packed: PackedTokens

    def queries(self, layout: DocumentLayout) -> Tensor:
        """Returns the index queries of the microbatch's layout, or of its sample's."""
        if layout is self.packed.documents:
            return self.iq
        sample = self.packed.sample
        assert sample is not None and layout is sample.layout  # no other queries are chosen for
        return sample.take(self.iq)


class IndexerAttention(SSAAttention):
    """One layer's attention under the method indexer, or ssa with score=indexer."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: IndexerAttentionSubmodules,
        layer_number: int,
        attention: AttentionConfig,
        impl: str | None,
        pg_collection: ProcessGroupCollection,
        **rest: object,
    ) -> None:
        common = {"attention": attention, "impl": impl, "pg_collection": pg_collection}
        super().__init__(config, submodules, layer_number, **common, **rest)
        self.linear_index = build_module(
            submodules.linear_index,
            config.hidden_size,
            config.num_query_groups * (attention.indexer.heads + 1) * self.head_dim,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=True,
            is_expert=False,
            tp_group=pg_collection.tp,
            tp_comm_buffer_name="index",
        )
        self._index: _Index | None = None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rotary_pos_emb: Tensor,
        packed_seq_params: PackedTokens,
        **rest: object,
    ) -> tuple[Tensor, Tensor | None]:
        """See `SSAAttention.forward`; the scorer reads the same hidden states, and the layer holds its tensors meanwhile."""
        iq, ik = self._project_index(hidden_states.detach(), rotary_pos_emb, packed_seq_params.positions)
        if packed_seq_params.gather is not None:
            # In two halves: the gather takes two tensors, and its backward sums both.
            ik = torch.cat(packed_seq_params.gather(*(half.contiguous() for half in ik.chunk(2, dim=-1))), dim=-1)
        if packed_seq_params.keep is not None and packed_seq_params.main == "sparse":
            packed_seq_params.keep.keep_index_keys(self.layer_number, ik.detach())
        self._index = _Index(iq, ik, packed_seq_params)
        try:
            common = {"rotary_pos_emb": rotary_pos_emb, "packed_seq_params": packed_seq_params}
            return super().forward(hidden_states, attention_mask, **common, **rest)
        finally:
            self._index = None

    def _project_index(self, hidden_states: Tensor, rotary_pos_emb: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Returns rotated index queries [T, G * J, D] and keys [T, G, D] of this rank's kv heads."""
        mixed, _ = self.linear_index(hidden_states)
        groups, heads = self.num_kv_heads, self.attention.indexer.heads
        by_head = mixed.view(mixed.shape[0], groups * (heads + 1), self.head_dim)
        rotated = rope(by_head, rotary_pos_emb.flatten(1), positions, impl=self.impl)
        iq, ik = rotated.unflatten(1, (groups, heads + 1)).split([heads, 1], dim=2)
        return iq.flatten(1, 2).contiguous(), ik.squeeze(2).contiguous()

    def select(self, q: Tensor, k: Tensor, layout: DocumentLayout) -> Tensor:
        """Returns the blocks that the scorer chooses, as `SSAAttention.select`; q and k are not used."""
        index, a = self._index, self.attention
        assert index is not None  # only a forward chooses
        sizes = {"block_size": a.block_size, "top_k": a.top_k}
        return choose_by_index(index.queries(layout), index.ik, **sizes, cu_seqlens=layout, impl=self.impl)

    def _main_stream(self, q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor | None, packed: PackedTokens) -> Tensor:
        """See `SSAAttention._main_stream`. The scorer takes part in every backward, with gradients of 0."""
        out, index = super()._main_stream(q, k, v, gate_logits, packed), self._index
        assert index is not None
        return _Include.apply(out, index.iq, index.ik) if torch.is_grad_enabled() else out

    def _newest_tokens(
        self, q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor | None, packed: PackedTokens
    ) -> Tensor:
        """See `SSAAttention._newest_tokens`. The sparse stream runs training's operators, for one query per text over the pages of the cache."""
        if packed.main == "full":
            return super()._newest_tokens(q, k, v, gate_logits, packed)
        texts, index = packed.continues, self._index
        assert texts is not None and index is not None
        count = len(texts)
        keys, values = texts.append(self.layer_number, k[:count], v[:count], self.impl)
        ik = texts.append_index_keys(self.layer_number, index.ik[:count])
        newest = replace(packed, documents=texts.newest_queries(), num_rows=None)
        self._index = _Index(index.iq[:count], ik, newest)
        gates = None if gate_logits is None else gate_logits[:count]
        out = self._main_stream(q[:count], keys, values, gates, newest)
        return torch.nn.functional.pad(out, (0, 0, 0, 0, 0, len(q) - count))

    def _both_streams(
        self, q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor | None, packed: PackedTokens
    ) -> Tensor:
        """Returns the gated main stream [T, H, D] with the losses attached; records the layer's diagnostics.

        Training of the method indexer computes the main stream alone, its captured mass from the target of the index loss. An evaluation, which has
        no index loss, computes both streams under either method.
        """
        if packed.index_scale is None:
            return super()._both_streams(q, k, v, gate_logits, packed)
        if self.attention.method is Method.indexer:
            out = SSAAttention._main_stream(self, q, k, v, gate_logits, packed)
        else:
            out = super()._both_streams(q, k, v, gate_logits, packed)
        loss, mass = self._index_loss(q, k, packed)
        if self.attention.method is Method.indexer:
            packed.diagnostics[self.layer_number] = LayerDiagnostics(torch.zeros_like(mass), mass)
        packed.diagnostics[self.layer_number].index_loss = loss.detach()
        return attach_loss(out, loss, packed.index_scale) if torch.is_grad_enabled() else out

    def _index_loss(self, q: Tensor, k: Tensor, packed: PackedTokens) -> tuple[Tensor, Tensor]:
        """Returns the index loss and the captured mass of the queries that compute the counterpart, of this rank's kv heads."""
        index, a, layout = self._index, self.attention, packed.documents
        assert index is not None
        if packed.sample is not None:
            q, layout = packed.sample.take(q), packed.sample.layout
        sizes = {"block_size": a.block_size, "top_k": a.top_k}
        return index_loss(index.queries(layout), index.ik, q, k, **sizes, cu_seqlens=layout, impl=self.impl)


class _Include(torch.autograd.Function):
    """(x, tensors) -> x, whose backward gives the tensors gradients of 0.

    Without it a microbatch without an index loss would have a backward that leaves out the scorer: core's overlapped reduction waits for every
    weight's gradient, and under context parallelism the other ranks wait in the gather's backward.
    """

    @staticmethod
    def forward(ctx, x: Tensor, *tensors: Tensor) -> Tensor:
        ctx.like = [(tensor.shape, tensor.dtype) for tensor in tensors]
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad_x: Tensor):
        return grad_x, *(grad_x.new_zeros(shape, dtype=dtype) for shape, dtype in ctx.like)
