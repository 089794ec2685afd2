"""One attention layer of SSA: q, k, v and gate from one projection, two streams, one gate, the alignment loss.

Method (arXiv 2511.20102, section 3): the full stream attends to every earlier key of the document, the sparse stream to the keys of the
top-S blocks; both are multiplied by the same sigmoid gate; the layer's output is the main stream, and SmoothL1 draws the streams together.
`full` and `moba` are the same layer with one stream. Stands in a megatron-core TransformerLayer in place of `SelfAttention`.

The projection's rows are grouped by key-value head, [G*D queries, D keys, D values, G gates] each, so that tensor parallelism shards queries,
keys, values and gates together and Transformer Engine's fused norm feeds the gate too. A microbatch is one packed sequence, hidden states
[tokens, 1, M]; document boundaries, positions and the main stream travel in `PackedTokens`, on every pipeline stage and under recomputation.
It does not know the schedule, the optimizer or which engine runs it, and it holds no key-value cache.
"""

from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ssa_kernels import DocumentLayout, captured_mass, full_attention, gate_and_align, select_blocks, sparse_attention
from ssa_pretrain.config import AttentionConfig, KernelImpl, Method
from ssa_pretrain.model.alignment import attach_loss
from ssa_pretrain.model.rope import angles, rotate


@dataclass
class LayerDiagnostics:
    """What one layer's forward says of itself, local to this rank's heads and tokens; detached scalars."""

    alignment_loss: Tensor | None = None
    captured_mass: Tensor | None = None


@dataclass
class PackedTokens(PackedSeqParams):
    """One microbatch's packing and routing, handed to every layer.

    Attributes:
        positions: int64 [tokens], each token's place in its document.
        documents: where documents and blocks lie, built once a microbatch.
        main: the stream that becomes the layers' output, "full" or "sparse".
        counterpart: also compute the other stream, for the alignment and the captured mass.
        alignment_scale: d(total loss) / d(one layer's local alignment); 0 switches the gradient off.
        diagnostics: by layer number (from 1); a recomputed layer overwrites its own entry with the same values.
    """

    positions: Tensor = None
    documents: DocumentLayout = None
    main: str = "full"
    counterpart: bool = False
    alignment_scale: float = 0.0
    diagnostics: dict[int, LayerDiagnostics] = field(default_factory=dict)


@dataclass
class SSAAttentionSubmodules:
    """The two projections, local or Transformer Engine's."""

    linear_qkv: ModuleSpec | type
    linear_proj: ModuleSpec | type


class SSAAttention(MegatronModule):
    """Attention of one layer under `method` ssa, full or moba."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SSAAttentionSubmodules,
        layer_number: int,
        attention: AttentionConfig,
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
        self.impl = None if attention.impl is KernelImpl.auto else attention.impl.value
        rows_per_group = (self.group_size + 2) * self.head_dim + self.num_gates
        common = {"config": config, "bias": False, "skip_bias_add": True, "is_expert": False, "tp_group": pg_collection.tp}
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
        """Return (output [tokens, 1, M], bias or None) for hidden states [tokens, 1, M] (tokens / tp of them under sequence parallelism)."""
        packed = packed_seq_params
        q, k, v, gate = self._project(hidden_states)
        cos, sin = angles(rotary_pos_emb, packed.positions)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        streams = self._streams(q, k, v, packed)
        out = self._combine(streams, gate, packed)
        return self.linear_proj(out.flatten(1).unsqueeze(1))

    def _project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return q [T, H, D], k and v [T, H_kv, D] and the gates' logits [T, H], of this rank's heads."""
        mixed, _ = self.linear_qkv(hidden_states)
        tokens, kv, d = mixed.shape[0], self.num_kv_heads, self.head_dim
        parts = [self.group_size * d, d, d, self.num_gates]
        q, k, v, gate = mixed.view(tokens, kv, sum(parts)).split(parts, dim=-1)
        q = q.reshape(tokens, kv * self.group_size, d)
        return q, k, v.contiguous(), gate.reshape(tokens, -1) if self.num_gates else None

    def _streams(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedTokens) -> dict[str, tuple[Tensor, Tensor]]:
        """Return (output [T, H, D], lse [T, H]) of each stream that is wanted."""
        names = ["full", "sparse"] if packed.counterpart else [packed.main]

        def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            pairs = [self._full(q, k, v, packed) if name == "full" else self._sparse(q, k, v, packed) for name in names]
            return tuple(tensor for pair in pairs for tensor in pair)

        recompute = self.config.recompute_granularity == "selective" and self.training
        flat = checkpoint(run, False, q, k, v) if recompute else run(q, k, v)
        return {name: (flat[2 * i], flat[2 * i + 1]) for i, name in enumerate(names)}

    def _full(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedTokens) -> tuple[Tensor, Tensor]:
        return full_attention(q, k, v, cu_seqlens=packed.documents, return_lse=packed.counterpart, impl=self.impl)

    def _sparse(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedTokens) -> tuple[Tensor, Tensor]:
        a = self.attention
        common = {"block_size": a.block_size, "cu_seqlens": packed.documents, "impl": self.impl}
        indices = select_blocks(q.detach(), k.detach(), top_k=a.top_k, score=a.score.value, **common)
        return sparse_attention(q, k, v, indices, **common)

    def _combine(self, streams: dict[str, tuple[Tensor, Tensor]], gate: Tensor | None, packed: PackedTokens) -> Tensor:
        """Return the gated main stream [T, H, D], the alignment attached, the layer's diagnostics noted."""
        out, _ = streams[packed.main]
        if not packed.counterpart:
            return _gated(out, gate)
        (full, lse_full), (sparse, lse_sparse) = streams["full"], streams["sparse"]
        logits = gate if gate is not None else full.new_full(full.shape[:2], torch.inf)
        weights = (self.attention.sparsity_weight, self.attention.commitment_weight)
        out, loss = gate_and_align(full, sparse, logits, main=packed.main, weights=weights, impl=self.impl)
        packed.diagnostics[self.layer_number] = LayerDiagnostics(
            alignment_loss=loss.detach(), captured_mass=captured_mass(lse_full, lse_sparse).detach().mean()
        )
        if packed.alignment_scale and torch.is_grad_enabled():
            out = attach_loss(out, loss, packed.alignment_scale)
        return out


def _gated(out_THD: Tensor, gate_TH: Tensor | None) -> Tensor:
    """Return out * sigmoid(gate), computed in fp32, in out's dtype."""
    if gate_TH is None:
        return out_THD
    return (out_THD.float() * gate_TH.float().sigmoid().unsqueeze(-1)).to(out_THD.dtype)


def trained_streams(method: Method) -> tuple[str, ...]:
    """Return the streams that a method trains, the one it is evaluated in by default first."""
    return {Method.ssa: ("sparse", "full"), Method.full: ("full",), Method.moba: ("sparse",)}[method]
