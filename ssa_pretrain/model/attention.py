"""One attention layer of SSA: one projection to queries, keys, values and gate logits, two streams, one gate, the alignment loss.

Method (arXiv 2511.20102, section 3). The full stream attends to every earlier key of the document, the sparse stream to the keys of the top-N
blocks. Both are multiplied by the same sigmoid gate. The layer's output is the main stream, and a SmoothL1 loss aligns the two streams. `full` and
`moba` are the same layer with one stream. The layer replaces `SelfAttention` in a megatron-core TransformerLayer.

The projection's rows are grouped by kv head: group_size * D for queries, D for keys, D for values, group_size for gates. Tensor parallelism
therefore shards queries, keys, values and gates together, and Transformer Engine's fused norm applies to the gates too. A microbatch is one packed
sequence with hidden states [tokens, 1, M]. Document boundaries, positions and the main stream travel in `PackedTokens`, on every pipeline stage and
under recomputation. The layer does not know the schedule, the optimizer or the engine, and it has no key-value cache.
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
    captured_mass,
    full_attention,
    gate,
    gate_and_align,
    qkv_rope,
    select_blocks,
    sparse_attention,
    ssa_attention,
)
from ssa_pretrain.config import AttentionConfig
from ssa_pretrain.model.alignment import attach_loss


@dataclass
class LayerDiagnostics:
    """The metrics of one layer's forward over this rank's heads and tokens; detached scalars."""

    alignment_loss: Tensor | None = None
    captured_mass: Tensor | None = None


@dataclass(kw_only=True)
class PackedTokens(PackedSeqParams):
    """One microbatch's packing and routing, passed to every layer.

    Attributes:
        positions: int64 [tokens], each token's position in its document.
        documents: boundaries of documents and blocks, built once per microbatch.
        num_rows: rows of the microbatch if each row is one document, otherwise None.
        gather: under context parallelism, (k, v) of this rank's tokens -> (k, v) of all tokens, which `documents` describes; otherwise None.
        main: the stream that becomes the layers' output, "full" or "sparse".
        counterpart: whether the other stream is computed too, for the alignment and the captured mass.
        sample: the spans of queries that compute the other stream; None: all queries.
        alignment_scale: d(total loss) / d(one layer's local alignment), a number or a scalar on the device; None: no gradient.
        diagnostics: by layer number (from 1); a recomputed layer overwrites its own entry with the same values.
    """

    positions: Tensor
    documents: DocumentLayout
    num_rows: int | None = None
    gather: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    main: str = "full"
    counterpart: bool = False
    sample: DocumentLayout | None = None
    alignment_scale: float | Tensor | None = None
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
        self.num_gates = self.group_size if attention.gate else 0
        self.impl = impl
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
        attend = self._main_stream
        if packed.counterpart:
            attend = self._both_streams if packed.sample is None else self._sampled_streams
        out = attend(q, k, v, gate_logits, packed)
        return self.linear_proj(out.flatten(1).unsqueeze(1))

    def _project(
        self, hidden_states: Tensor, rotary_pos_emb: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Returns rotated q [T, H, D] and k [T, G, D], v [T, G, D] and the gates' logits [T, H], of this rank's heads."""
        mixed, _ = self.linear_qkv(hidden_states)
        return qkv_rope(
            mixed.flatten(1),
            rotary_pos_emb.flatten(1),
            positions,
            num_kv_heads=self.num_kv_heads,
            group_size=self.group_size,
            head_dim=self.head_dim,
            num_gates=self.num_gates,
            impl=self.impl,
        )

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
            score=a.score.value,
            cu_seqlens=packed.documents,
            num_rows=packed.num_rows,
            main=packed.main,
            weights=(a.sparsity_weight, a.commitment_weight),
            impl=self.impl,
        )
        return self._align(out, loss, mass, packed)

    def _align(self, out: Tensor, loss: Tensor, mass: Tensor, packed: PackedTokens) -> Tensor:
        """Returns `out` with the alignment loss attached; records the layer's diagnostics."""
        packed.diagnostics[self.layer_number] = LayerDiagnostics(loss.detach(), mass.detach())
        if packed.alignment_scale is not None and torch.is_grad_enabled():
            out = attach_loss(out, loss, packed.alignment_scale)
        return out

    def _sampled_streams(
        self, q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor | None, packed: PackedTokens
    ) -> Tensor:
        """Returns the gated main stream [T, H, D] of all queries, aligned with the other stream on the queries of `packed.sample`."""
        a, layout = self.attention, packed.sample
        assert layout is not None  # forward() has checked
        main, lse_main = self._stream(packed.main, q, k, v, packed.documents, packed.num_rows, return_lse=True)
        other_name = "sparse" if packed.main == "full" else "full"
        logits = q.new_full(q.shape[:2], torch.inf) if gate_logits is None else gate_logits

        def sampled(x: Tensor) -> Tensor:
            return torch.cat([x[span.first : span.end] for span in layout.spans])

        other, lse_other = self._stream(other_name, sampled(q), k, v, layout, return_lse=True)
        streams = {packed.main: (sampled(main), sampled(lse_main)), other_name: (other, lse_other)}
        (o_full, lse_full), (o_sparse, lse_sparse) = streams["full"], streams["sparse"]
        weights = (a.sparsity_weight, a.commitment_weight)
        _, loss = gate_and_align(o_full, o_sparse, sampled(logits), main=packed.main, weights=weights, impl=self.impl)
        mass = captured_mass(lse_full, lse_sparse).mean()
        return self._align(gate(main, logits, impl=self.impl), loss, mass, packed)

    def _stream(
        self,
        name: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: DocumentLayout,
        num_rows: int | None = None,
        *,
        return_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns a stream's ungated output [queries, H, D] and its log-sum-exp [queries, H]; the full stream's only if `return_lse`."""
        a, common = self.attention, {"cu_seqlens": layout, "impl": self.impl}
        if name == "full":
            return full_attention(q, k, v, return_lse=return_lse, num_rows=num_rows, **common)
        sizes = {"block_size": a.block_size}
        indices = select_blocks(q.detach(), k.detach(), top_k=a.top_k, score=a.score.value, **sizes, **common)
        return sparse_attention(q, k, v, indices, **sizes, **common)

    def _main_stream(self, q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor | None, packed: PackedTokens) -> Tensor:
        """Returns the gated main stream [T, H, D] without computing the other one."""
        out, _ = self._stream(packed.main, q, k, v, packed.documents, packed.num_rows)
        return out if gate_logits is None else gate(out, gate_logits, impl=self.impl)
