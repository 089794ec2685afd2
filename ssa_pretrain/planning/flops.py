"""Floating-point operations of a row, part by part, and the peak of a device, of which MFU is the share that a run uses.

Counting: a multiply-add is two operations; the backward is twice the forward; recomputation is not counted. Causal
attention is counted over the pairs (query, key) that exist, so half a square for one document and less for many: two
products of 2 * D operations a pair and head.

MFU counts the matrix products and *one* attention stream: the full one for ssa and full, the sparse one for moba, whose
model has no other. What SSA does besides (sparse stream, selection, gates and alignment) is its price, not the model's
work: it is counted here, shown beside MFU and never in it. The numbers are those of the algorithm: a kernel that pads or
masks does more.

Source of the peaks: NVIDIA's data sheets, dense (without 2:4 sparsity), at boost clocks. Stdlib only.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ssa_pretrain.config import AttentionConfig, Method, ModelConfig, PrecisionName, Score

TERA = 1e12

# Words in the device's name as the driver reports it; TFLOP/s in bf16, fp8 and fp32 (vector units: TF32 is off).
# The first match counts.
_PEAKS: tuple[tuple[str, float, float | None, float], ...] = (
    ("GB200", 2500.0, 5000.0, 80.0),
    ("B200", 2250.0, 4500.0, 75.0),
    ("GH200", 989.4, 1978.9, 66.9),
    ("H200 NVL", 835.5, 1671.0, 60.0),
    ("H200", 989.4, 1978.9, 66.9),
    ("H100 NVL", 835.5, 1671.0, 60.0),
    ("H100 PCIe", 756.5, 1513.0, 51.2),
    ("H100", 989.4, 1978.9, 66.9),
    ("H800 PCIe", 756.5, 1513.0, 51.2),
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
    """Forward operations of one row in training, all layers; a part that the method does not compute is 0.

    Attributes:
        linear: projections of q, k, v, gate and output, and the feed-forward.
        logits: the output layer.
        full_attention: the full stream.
        sparse_attention: the sparse stream.
        selection: block means, logits against them and their softmax (each step of it one operation); it has no backward.
        alignment: gates and SmoothL1 terms.
    """

    linear: float
    logits: float
    full_attention: float
    sparse_attention: float
    selection: float
    alignment: float

    @property
    def model(self) -> float:
        """Forward and backward operations that MFU counts."""
        return 3.0 * (self.linear + self.logits + (self.full_attention or self.sparse_attention))

    @property
    def beside(self) -> float:
        """Forward and backward operations that the method does besides."""
        counterpart = self.sparse_attention if self.full_attention else 0.0
        return 3.0 * (counterpart + self.alignment) + self.selection


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
    tokens, layers = sum(document_lengths), model.num_layers
    width, qkv = model.query_width, model.qkv_width(gate=attention.gate)
    weights = model.hidden_size * (qkv + width + 3 * model.ffn_hidden_size)
    full = sum(causal_pairs(length) for length in document_lengths)
    sparse = sum(sparse_pairs(length, attention.block_size, attention.top_k) for length in document_lengths)
    has_full, has_sparse = attention.method is not Method.moba, attention.method is not Method.full
    # A gate is one product an output; the two SmoothL1 terms share difference, size, square and choice, and are summed.
    elementwise = (has_full + has_sparse) * attention.gate + (7 if has_full and has_sparse else 0)
    return RowFlops(
        linear=2.0 * tokens * weights * layers,
        logits=2.0 * tokens * model.hidden_size * (vocab_size or model.vocab_size),
        full_attention=4.0 * width * layers * full * has_full,
        sparse_attention=4.0 * width * layers * sparse * has_sparse,
        selection=has_sparse * layers * sum(_selection(length, model, attention) for length in document_lengths),
        alignment=float(elementwise * tokens * width * layers),
    )


def causal_pairs(length: int) -> int:
    """Returns the pairs (query, key not after it) of a document."""
    return length * (length + 1) // 2


def context_pairs(document_lengths: Sequence[int], cp: int) -> list[int]:
    """Returns the pairs of the full stream that each context-parallel rank computes; their sum is that of one process.

    Rank i has chunks i and 2 * cp - 1 - i of the packed tokens. Over one document, or over rows of one document each, all ranks have the same.
    The slowest rank's share over the mean is what the full stream of many documents loses.

    Args:
        document_lengths: tokens of each document of the microbatch, in order; their sum is a multiple of 2 * cp.
        cp: context-parallel degree.
    """
    chunk = sum(document_lengths) // (2 * cp)
    pairs, first = [0] * cp, 0
    for length in document_lengths:
        for number in range(first // chunk, -(-(first + length) // chunk)):
            rank = min(number, 2 * cp - 1 - number)
            begin, end = max(number * chunk - first, 0), min((number + 1) * chunk - first, length)
            pairs[rank] += causal_pairs(end) - causal_pairs(begin)
        first += length
    return pairs


def sparse_pairs(length: int, block_size: int, top_k: int) -> int:
    """Returns the pairs of a document's sparse stream: the own block up to the query, and up to top_k - 1 whole ones."""
    blocks, rest = divmod(length, block_size)
    own = blocks * causal_pairs(block_size) + causal_pairs(rest)
    # Block b has b earlier blocks: a full block's queries each attend to min(top_k - 1, b) of them.
    ramp = min(top_k - 1, blocks)
    earlier = ramp * (ramp - 1) // 2 + (blocks - ramp) * (top_k - 1)
    return own + block_size * (block_size * earlier + rest * min(top_k - 1, blocks))


def _selection(length: int, model: ModelConfig, attention: AttentionConfig) -> float:
    """Operations of one layer's selection in a document: means of keys, logits, a softmax a head, its sum over a group."""
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
    if "MIG" in device_name:  # a slice of a device
        return None
    for name, bf16, fp8, fp32 in _PEAKS:
        if re.search(rf"\b{name}\b", device_name):
            peak = {PrecisionName.bf16: bf16, PrecisionName.fp8: fp8, PrecisionName.fp32: fp32}[precision]
            return peak * TERA if peak is not None else None
    return None
