"""One attention layer of SSA: one projection to queries, keys, values and gate logits, two streams, one gate, the alignment loss.

Method (arXiv 2511.20102, section 3). The full stream attends to every earlier key of the document, the sparse stream to the keys of the top-N
blocks. Both are multiplied by the same sigmoid gate. The layer's output is the main stream, and a SmoothL1 loss aligns the two streams. `full` and
`moba` are the same layer with one stream. The layer replaces `SelfAttention` in a megatron-core TransformerLayer.

The projection's rows are grouped by kv head: group_size * D for queries, D for keys, D for values, group_size for gates. Tensor parallelism
therefore shards queries, keys, values and gates together, and Transformer Engine's fused norm applies to the gates too. With `model.qk_norm`, RMSNorm
over the head dim follows on each query head and key, as in Qwen3, in the kernel that splits and rotates them (ssa_kernels.qkv_rope). A microbatch is one packed
sequence with hidden states [tokens, 1, M]. Document boundaries, positions and the main stream travel in `PackedTokens`, on every pipeline stage and
under recomputation. The layer does not know the schedule, the optimizer or the engine.

Texts are continued from a cache of keys, values and block means (text_cache.py): a forward over the texts fills it, and the forwards after it see only
each text's newest token.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ssa_kernels import (
    DocumentLayout,
    QKNorm,
    SampledQueries,
    full_attention,
    gate,
    qkv_rope,
    rope,
    select_blocks,
    sparse_attention,
    ssa_attention,
)
from ssa_pretrain.config import AttentionConfig, gates_per_head
from ssa_pretrain.model.alignment import attach_loss
from ssa_pretrain.model.keys import KeyConvolution
from ssa_pretrain.model.llama import HeadNorm
from ssa_pretrain.model.text_cache import Choice, TextCache


@dataclass
class LayerDiagnostics:
    """The metrics of one layer's forward over this rank's heads and tokens; detached scalars."""

    alignment_loss: Tensor | None = None
    captured_mass: Tensor | None = None
    index_loss: Tensor | None = None


@dataclass(kw_only=True)
class PackedTokens(PackedSeqParams):
    """One microbatch's packing and routing, passed to every layer.

    Attributes:
        positions: int64 [tokens], each token's position in its document.
        key_positions: under context parallelism, int32 [all tokens], the positions of the gathered keys; otherwise None.
        documents: boundaries of documents and blocks, built once per microbatch.
        num_rows: rows of the whole microbatch if each row is one document, otherwise None.
        gather: under context parallelism, (k, v) of this rank's tokens -> (k, v) of all tokens, which `documents` describes; otherwise None.
        main: the stream that becomes the layers' output, "full" or "sparse".
        counterpart: whether the other stream is computed too, for the alignment and the captured mass.
        sample: the queries of `documents` that compute the other stream; None: all of them.
        weight: what a query that computes the other stream counts for in the engine's means of alignment and captured mass.
        alignment_scale: d(total loss) / d(one layer's local alignment), a number or a scalar on the device; None: no gradient.
        index_scale: the same of one layer's local index loss (model/indexer.py); None: it is not computed.
        observe: called in each layer with (the layer, q [T, H, D], k of all tokens [S, G, D], this packing, v=values as k); None: nobody observes.
        keep: receives each layer's keys and values of the texts that the first documents are; None: nobody does.
        continues: the texts whose newest tokens the first tokens are, one each; the others are padding. None: documents are whole.
        diagnostics: by layer number (from 1); a recomputed layer overwrites its own entry with the same values.
    """

    positions: Tensor
    documents: DocumentLayout
    key_positions: Tensor | None = None
    num_rows: int | None = None
    gather: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    main: str = "full"
    counterpart: bool = False
    sample: SampledQueries | None = None
    weight: float = 1.0
    alignment_scale: float | Tensor | None = None
    index_scale: float | Tensor | None = None
    observe: Callable[..., None] | None = None
    keep: TextCache | None = None
    continues: TextCache | None = None
    diagnostics: dict[int, LayerDiagnostics] = field(default_factory=dict)


@dataclass
class SSAAttentionSubmodules:
    """The two projections: core's local ones or Transformer Engine's."""

    linear_qkv: ModuleSpec | type
    linear_proj: ModuleSpec | type


class SSAAttention(MegatronModule):
    """One layer's attention under the method ssa, full or moba. `impl` names the kernels' implementation, None to choose by device."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SSAAttentionSubmodules,
        layer_number: int,
        attention: AttentionConfig,
        impl: str | None,
        pg_collection: ProcessGroupCollection,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        self.attention = attention
        self.layer_number = layer_number
        self.head_dim = config.kv_channels
        self.group_size = config.num_attention_heads // config.num_query_groups
        self.num_kv_heads = config.num_query_groups // pg_collection.tp.size()
        self.num_gates = self.group_size * gates_per_head(attention)
        self.impl = impl
        self.q_layernorm = self.k_layernorm = self.key_convolution = None
        if config.qk_layernorm:
            self.q_layernorm, self.k_layernorm = (
                HeadNorm(config, self.head_dim, config.layernorm_epsilon) for _ in range(2)
            )
        if attention.key_convolution:
            filters = {"taps": attention.key_convolution, "tp_group": pg_collection.tp, "impl": impl}
            self.key_convolution = KeyConvolution(config, self.num_kv_heads, **filters)
        rows_per_group = (self.group_size + 2) * self.head_dim + self.num_gates
        common = {
            "config": config,
            "bias": False,
            "skip_bias_add": True,
            "is_expert": False,
            "tp_group": pg_collection.tp,
        }
        self.linear_qkv = build_module(
            submodules.linear_qkv,
            config.hidden_size,
            config.num_query_groups * rows_per_group,
            init_method=config.init_method,
            gather_output=False,
            tp_comm_buffer_name="qkv",
            **common,
        )
        self.linear_proj = build_module(
            submodules.linear_proj,
            config.num_attention_heads * self.head_dim,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            tp_comm_buffer_name="proj",
            **common,
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rotary_pos_emb: Tensor,
        packed_seq_params: PackedTokens,
        **_: object,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (output [tokens, 1, M], bias or None) for hidden states [tokens, 1, M]; under sequence parallelism, tokens / tp of them."""
        packed = packed_seq_params
        q, k, v, gate_logits = self._project(hidden_states, rotary_pos_emb, packed.positions)
        if packed.gather is not None:
            k, v = packed.gather(k, v)
        if self.key_convolution is not None:
            k = self._convolved(k, rotary_pos_emb, packed)
        if packed.observe is not None:
            packed.observe(self, q, k, packed, v=v)  # the values of all tokens, [S, G, D]
        if packed.keep is not None:
            packed.keep.keep(self.layer_number, k.detach(), v.detach(), self.impl)
        attend = self._main_stream if packed.continues is None else self._newest_tokens
        if packed.counterpart:
            attend = self._both_streams
        out = attend(q, k, v, gate_logits, packed)
        return self.linear_proj(out.flatten(1).unsqueeze(1))

    def _project(
        self, hidden_states: Tensor, rotary_pos_emb: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Returns rotated q [T, H, D] and k [T, G, D], v [T, G, D] and the gates' logits [T, gates], of this rank's heads.

        With a convolution of keys, k is as the projection has it.
        """
        mixed, _ = self.linear_qkv(hidden_states)
        norm = None
        if self.q_layernorm is not None and self.k_layernorm is not None:
            norm = QKNorm(self.q_layernorm(), self.k_layernorm(), self.config.layernorm_epsilon)
        q, k, v, gate_logits = qkv_rope(
            mixed.flatten(1),
            rotary_pos_emb.flatten(1),
            positions,
            num_kv_heads=self.num_kv_heads,
            group_size=self.group_size,
            head_dim=self.head_dim,
            num_gates=self.num_gates,
            norm=norm,
            rotate_keys=self.key_convolution is None,
            impl=self.impl,
        )
        if self.config.softmax_scale is not None:  # the kernels multiply by D^-1/2
            q = q * (self.config.softmax_scale * self.head_dim**0.5)
        return q, k, v, gate_logits

    def _convolved(self, k_SGD: Tensor, rotary_pos_emb: Tensor, packed: PackedTokens) -> Tensor:
        """Returns the keys of all tokens convolved, then normed and rotated."""
        assert self.key_convolution is not None
        positions = packed.positions if packed.key_positions is None else packed.key_positions
        texts = {"keep": packed.keep, "continues": packed.continues}
        k = self.key_convolution(k_SGD, positions, self.layer_number, **texts)
        weight = None if self.k_layernorm is None else self.k_layernorm()
        settings = {"weight": weight, "eps": self.config.layernorm_epsilon, "impl": self.impl}
        return rope(k, rotary_pos_emb.flatten(1), positions, **settings)

    def select(self, q: Tensor, k: Tensor, layout: DocumentLayout) -> Tensor:
        """Returns the blocks of the sparse stream, int32 [queries, G or H, N]. An attention method of its own overrides this.

        Blocks are numbered within the query's document, ascending and padded with -1, as `sparse_attention` takes them.
        A query with at most `attention.top_k` blocks up to its own gets all of them. q [queries, H, D] and k [keys, G, D] have no
        gradient here.
        """
        a = self.attention
        sizes = {"block_size": a.block_size, "top_k": a.top_k}
        return select_blocks(q, k, **sizes, cu_seqlens=layout, score=a.score.value, impl=self.impl)

    @classmethod
    def continues_from_cache(cls) -> bool:
        """Returns whether `_newest_tokens` computes this method's streams: not if a subclass chooses or attends differently and does not override it."""

        def definer(name: str) -> type:
            return next(kind for kind in cls.__mro__ if name in vars(kind))

        return all(issubclass(definer("_newest_tokens"), definer(name)) for name in ("select", "_main_stream"))

    def _newest_tokens(
        self, q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor | None, packed: PackedTokens
    ) -> Tensor:
        """Returns the gated main stream [T, H, D] of the newest tokens of cached texts, 0 for the padding after them."""
        texts, a = packed.continues, self.attention
        assert texts is not None
        count, choice = len(texts), Choice(packed.main, a.top_k, a.score.value, self.impl)
        newest = texts.attend(self.layer_number, q[:count], k[:count], v[:count], choice)
        out = torch.nn.functional.pad(newest, (0, 0, 0, 0, 0, len(q) - count))
        return out if gate_logits is None else gate(out, gate_logits, impl=self.impl)

    def _both_streams(
        self, q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor | None, packed: PackedTokens
    ) -> Tensor:
        """Returns the gated main stream [T, H, D] with the alignment loss attached; records the layer's diagnostics."""
        a = self.attention
        out, loss, mass = ssa_attention(
            q,
            k,
            v,
            gate_logits,
            block_size=a.block_size,
            top_k=a.top_k,
            cu_seqlens=packed.documents,
            select=self.select,
            num_rows=packed.num_rows,
            main=packed.main,
            weights=(a.sparsity_weight, a.commitment_weight),
            sample=packed.sample,
            impl=self.impl,
        )
        packed.diagnostics[self.layer_number] = LayerDiagnostics(loss.detach(), mass.detach())
        if packed.alignment_scale is not None and torch.is_grad_enabled():
            out = attach_loss(out, loss, packed.alignment_scale)
        return out

    def _main_stream(self, q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor | None, packed: PackedTokens) -> Tensor:
        """Returns the gated main stream [T, H, D] without computing the other one."""
        common = {"cu_seqlens": packed.documents, "impl": self.impl}
        if packed.main == "full":
            out, _ = full_attention(q, k, v, num_rows=packed.num_rows, **common)
        else:
            indices = self.select(q.detach(), k.detach(), packed.documents)
            out, _ = sparse_attention(q, k, v, indices, block_size=self.attention.block_size, **common)
        return out if gate_logits is None else gate(out, gate_logits, impl=self.impl)
