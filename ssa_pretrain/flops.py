"""Floating-point operations of a row, part by part, the peak of a device, and the share of it that a run uses (MFU).

Counting: a multiply-add is two operations; the backward is twice the forward; recomputation is not counted. Causal attention is counted
over the pairs (query, key) that exist, so half a square for one document and less for many: 2 products of 2 * D operations a pair and head.

MFU counts the matrix products and *one* attention stream: the full one for ssa and full, the sparse one for moba, whose model has no other.
What SSA does besides (sparse stream, selection, gates and alignment) is its price, not the model's work: it is counted here, shown beside
MFU and never in it. The numbers are those of the algorithm: a kernel that pads or masks does more.

Sources of peaks: NVIDIA's data sheets, dense (without 2:4 sparsity), at boost clocks. Stdlib only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ssa_pretrain.config import AttentionConfig, Method, ModelConfig, PrecisionName, Score

TERA = 1e12

# Device name as the driver reports it: TFLOP/s in bf16, fp8 and fp32 (vector units; TF32 is off). First match wins.
_PEAKS: tuple[tuple[str, float, float | None, float], ...] = (
    ("GB200", 2500.0, 5000.0, 80.0),
    ("B200", 2250.0, 4500.0, 75.0),
    ("GH200", 989.4, 1978.9, 66.9),
    ("H200 NVL", 835.5, 1671.0, 60.0),
    ("H200", 989.4, 1978.9, 66.9),
    ("H100 NVL", 835.5, 1671.0, 60.0),
    ("H100 PCIe", 756.5, 1513.0, 51.2),
    ("H100", 989.4, 1978.9, 66.9),
    ("H800", 989.4, 1978.9, 66.9),
    ("H20", 148.0, 296.0, 44.0),
    ("A100", 312.0, None, 19.5),
    ("A800", 312.0, None, 19.5),
    ("L40S", 362.05, 733.0, 91.6),
    ("L40", 181.05, 362.0, 90.5),
    ("L4", 121.0, 242.5, 30.3),
    ("A10", 125.0, None, 31.2),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFlops:
    """Forward operations of one row, all layers.

    Attributes:
        linear: projections of q, k, v, gate and output, and the feed-forward.
        logits: the output layer.
        full_attention: the full stream.
        sparse_attention: the sparse stream.
        selection: block means, importance and top-k scores (its exponentials count one each).
        alignment: gates and SmoothL1 terms.
        counted_attention: the stream that MFU counts.
        computed: names of the parts that the method computes in training.
    """

    linear: float
    logits: float
    full_attention: float
    sparse_attention: float
    selection: float
    alignment: float
    counted_attention: float
    computed: tuple[str, ...]

    @property
    def model(self) -> float:
        """Forward and backward operations that MFU counts."""
        return 3.0 * (self.linear + self.logits + self.counted_attention)

    @property
    def beside(self) -> float:
        """Forward and backward operations that the method adds to the model's; selection has no backward."""
        parts = {name: getattr(self, name) for name in self.computed}
        selection = parts.pop("selection", 0.0)
        total = 3.0 * sum(parts.values()) + selection
        return total - 3.0 * (self.linear + self.logits + self.counted_attention)


def row_flops(
    model: ModelConfig, attention: AttentionConfig, document_lengths: Sequence[int], vocab_size: int | None = None
) -> RowFlops:
    """Returns the forward operations of one row.

    Args:
        model: the shape.
        attention: the method and its constants.
        document_lengths: tokens of each document in the row; [sequence_length] for a row without boundaries.
        vocab_size: V where the model's is the tokenizer's; padding is not work.
    """
    tokens = sum(document_lengths)
    vocab = vocab_size or model.vocab_size
    gate = model.num_attention_heads if attention.gate else 0
    width = model.num_attention_heads * model.head_dim
    qkv = width + 2 * model.num_kv_heads * model.head_dim + gate
    weights = model.hidden_size * (qkv + width + 3 * model.ffn_hidden_size)
    pair = 4.0 * width * model.num_layers
    full = pair * sum(causal_pairs(length) for length in document_lengths)
    sparse = pair * sum(sparse_pairs(length, attention.block_size, attention.top_k) for length in document_lengths)
    streams = {Method.ssa: 2, Method.full: 1, Method.moba: 1}[attention.method]
    elementwise = streams * (1 if attention.gate else 0) + (7 if attention.method is Method.ssa else 0)
    computed = {
        Method.ssa: ("linear", "logits", "full_attention", "sparse_attention", "selection", "alignment"),
        Method.full: ("linear", "logits", "full_attention", "alignment"),
        Method.moba: ("linear", "logits", "sparse_attention", "selection", "alignment"),
    }
    return RowFlops(
        linear=2.0 * tokens * weights * model.num_layers,
        logits=2.0 * tokens * model.hidden_size * vocab,
        full_attention=full,
        sparse_attention=sparse,
        selection=model.num_layers * sum(_selection(length, model, attention) for length in document_lengths),
        alignment=float(elementwise * tokens * width * model.num_layers),
        counted_attention=sparse if attention.method is Method.moba else full,
        computed=computed[attention.method],
    )


def causal_pairs(length: int) -> int:
    """Returns the pairs (query, key not after it) of a document."""
    return length * (length + 1) // 2


def sparse_pairs(length: int, block_size: int, top_k: int) -> int:
    """Returns the pairs of a document's sparse stream: the own block up to the query, and min(top_k - 1, earlier blocks) whole ones."""
    blocks, rest = divmod(length, block_size)
    own = blocks * causal_pairs(block_size) + causal_pairs(rest)
    # Block b has b earlier blocks: a full block's queries each attend to min(top_k - 1, b) of them.
    ramp = min(top_k - 1, blocks)
    earlier = ramp * (ramp - 1) // 2 + (blocks - ramp) * (top_k - 1)
    return own + block_size * (block_size * earlier + rest * min(top_k - 1, blocks))


def _selection(length: int, model: ModelConfig, attention: AttentionConfig) -> float:
    """Operations of one layer's selection in a document: means of keys, logits against them, a softmax a head, its sum over the group."""
    blocks, rest = divmod(length, attention.block_size)
    candidates = attention.block_size * blocks * (blocks - 1) // 2 + rest * blocks
    means = length * model.num_kv_heads * model.head_dim
    softmax = 0 if attention.score is Score.per_head else 3
    return float(means + candidates * model.num_attention_heads * (2 * model.head_dim + softmax))


def peak_flops(device_name: str, precision: PrecisionName) -> float | None:
    """Returns the dense peak of a device in operations a second, None where it is not known.

    Args:
        device_name: as the driver reports it, such as "NVIDIA H100 80GB HBM3".
        precision: of the matrix products.
    """
    for name, bf16, fp8, fp32 in _PEAKS:
        if name in device_name:
            peak = {PrecisionName.bf16: bf16, PrecisionName.fp8: fp8, PrecisionName.fp32: fp32}[precision]
            return peak * TERA if peak is not None else None
    return None


def mfu(flops: float, seconds: float, world_size: int, peak: float | None) -> float | None:
    """Returns the share of the devices' peak that a step used, None where the peak is not known.

    Args:
        flops: model operations of the step over all ranks (`RowFlops.model` summed over rows).
        seconds: the step's duration.
        world_size: devices.
        peak: of one device, from `peak_flops`.
    """
    return None if peak is None else flops / (seconds * world_size * peak)
