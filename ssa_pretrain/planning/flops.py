"""Floating-point operations of a row, and the peak of a device. MFU is the fraction of the peak that a run uses.

A multiply-add counts as two operations, and the backward as twice the forward. Recomputation is not counted. Causal
attention counts the (query, key) pairs that exist: half a square for one document, less for many. Each pair takes two
products of 2 * D operations per head.

MFU counts the matrix products and *one* attention stream per query: the full one where it is computed, else the sparse
one. full computes the full stream everywhere, moba nowhere. ssa computes it for all queries of the microbatches where
it is the main stream (the share p = full_ratio) and for the drawn queries of the others. At counterpart_share = 1 that
is everywhere. nsa's stream is all three of its branches, so MFU counts the compressed branch and the window too. The
extra work of SSA (the second stream, selection, gates, alignment) is the price of the method, not work of the model: it
is counted here and shown next to MFU, but never included in it. So is a trained scorer's. The method indexer is counted
as after its warm-up, with only the sparse stream. All counts are those of the algorithm.
A kernel that pads or masks does more. Counts are means over the draws of a training step.

Source of the peaks: NVIDIA's data sheets, dense (without 2:4 sparsity), at boost clocks. Standard library only.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ssa_pretrain.config import AttentionConfig, Method, ModelConfig, PrecisionName, Score, gates_per_head
from ssa_pretrain.schedule import share_drawn

TERA = 1e12

# Words in the device name that the driver reports; TFLOP/s in bf16, fp8 and fp32 (vector units, since TF32 is off).
# The first match wins.
_PEAKS: tuple[tuple[str, float, float | None, float], ...] = (
    ("GB300", 2500.0, 5000.0, 80.0),
    ("GB200", 2500.0, 5000.0, 80.0),
    ("B300", 2250.0, 4500.0, 75.0),
    ("B200", 2250.0, 4500.0, 75.0),
    ("RTX PRO 6000", 500.0, 1000.0, 120.0),
    ("MI300X", 1307.4, 2614.9, 163.4),
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
    """Forward operations of one row over all layers, if every query computes them. What the method does not compute is 0.

    Attributes:
        linear: projections to q, k, v, gates and output, and the feed-forward.
        logits: the output layer.
        full_attention: the full stream.
        sparse_attention: the sparse stream.
        selection: block means, logits against them and their softmax (one operation per step of it), or a trained scorer's attention over the
            tokens. It has no backward.
        gate: the gates of the main stream.
        alignment: SmoothL1 terms, and the gates of the other stream.
        covered: either stream, of the queries that the counterpart leaves out because the chosen blocks cover them.
        full_ratio: p, the share of microbatches whose main stream is full.
        share_if_full, share_if_sparse: share of a microbatch's queries that are drawn for the other stream, by its main stream.
        key_convolution: the convolution of keys.
        computes_both: whether drawn queries compute the other stream; under the method indexer only the index loss.
        index_projection: projections of a trained scorer. Their backward has only the weights' gradients.
        distillation: the index loss and its gradients: full attention's probabilities, the scorer's, and two products for the gradients.
        branches: nsa's compressed branch and sliding window, which belong to every query's stream.
        one_document: whether a row is one document; then spans of queries are dense matrices (ssa_kernels/full_attention/pieces.py).
    """

    linear: float
    logits: float
    full_attention: float
    sparse_attention: float
    selection: float
    gate: float
    alignment: float
    covered: float
    full_ratio: float
    share_if_full: float
    share_if_sparse: float
    key_convolution: float = 0.0
    computes_both: bool = True
    index_projection: float = 0.0
    distillation: float = 0.0
    branches: float = 0.0
    one_document: bool = False

    @property
    def model(self) -> float:
        """Forward and backward operations that MFU counts."""
        full = self.full_ratio + (1.0 - self.full_ratio) * self.share_if_sparse * self.computes_both
        attention = full * self.full_attention + (1.0 - full) * self.sparse_attention
        return 3.0 * (self.linear + self.logits + attention + self.branches)

    @property
    def overhead(self) -> float:
        """Forward and backward operations of the method that MFU does not count."""
        p = self.full_ratio
        both = p * self.share_if_full + (1.0 - p) * self.share_if_sparse
        second = both * self.computes_both * (self.sparse_attention - self.covered + self.alignment)
        selection = (p * self.share_if_full * self.computes_both + 1.0 - p) * self.selection
        trained = 2.0 * self.index_projection + both * self.distillation
        return 3.0 * (self.gate + self.key_convolution + second) + selection + trained

    def computed(self, main: str, share: float) -> float:
        """Returns all forward and backward operations of a row with a main stream, "full" or "sparse".

        Args:
            main: the main stream.
            share: the share of the row's queries that are drawn for the other stream.
        """
        streams = self.full_attention, self.sparse_attention
        first, second = streams if main == "full" else streams[::-1]
        both = share * self.computes_both * (second - self.covered + self.alignment)
        selection = self.selection * (share * self.computes_both if main == "full" else 1.0)
        index = 2.0 * self.index_projection + share * self.distillation
        stream = first + self.branches + self.gate + self.key_convolution
        return 3.0 * (self.linear + self.logits + stream + both) + selection + index


def row_flops(
    model: ModelConfig, attention: AttentionConfig, document_lengths: Sequence[int], vocab_size: int | None = None
) -> RowFlops:
    """Returns the operations of one row.

    Args:
        model: the shape of the model.
        attention: the method and its constants.
        document_lengths: tokens of each document in the row; [sequence_length] for a row without boundaries.
        vocab_size: V without padding, which is not work; None: model.vocab_size.
    """
    tokens, layers, streams = sum(document_lengths), model.num_layers, attention.method.streams
    width, gates = model.query_width, gates_per_head(attention)
    qkv = model.qkv_width(gates=gates)
    weights = model.hidden_size * (qkv + width + 3 * model.ffn_hidden_size)
    full = sum(causal_pairs(length) for length in document_lengths)
    sparse = sum(sparse_pairs(length, attention.block_size, attention.top_k) for length in document_lengths)
    has_full, has_sparse = (stream in streams for stream in ("full", "sparse"))
    has_both = has_full and has_sparse
    covered = [min(length, attention.top_k * attention.block_size) for length in document_lengths]
    left_out = attention.counterpart_share < 1.0 or sum(covered) == tokens
    # A gate is one product per output. The two SmoothL1 terms share difference, size, square and branch, and are summed.
    elements = float(tokens * width * layers)
    # Per key element a product and a sum per tap (one sum less), then sigmoid, product and residual.
    convolution = (2 * attention.key_convolution + 2) * bool(attention.key_convolution)
    free = full - sum(map(causal_pairs, covered))  # pairs of the queries that a trained scorer chooses for
    index_width = model.index_width(attention)
    return RowFlops(
        linear=2.0 * tokens * weights * layers,
        logits=2.0 * tokens * model.hidden_size * (vocab_size or model.vocab_size),
        full_attention=4.0 * width * layers * full * has_full,
        sparse_attention=4.0 * width * layers * sparse * has_sparse,
        selection=has_sparse * layers * sum(_selection(length, model, attention) for length in document_lengths),
        gate=gates * elements,
        alignment=has_both * (7 + attention.gate) * elements,
        covered=4.0 * width * layers * sum(map(causal_pairs, covered)) * (has_both and left_out),
        full_ratio=attention.full_ratio if has_both else float(has_full),
        share_if_full=share_drawn(attention, "full") if has_both else 0.0,
        share_if_sparse=share_drawn(attention, "sparse") if has_both else 0.0,
        key_convolution=float(convolution * tokens * model.kv_width * layers),
        computes_both=attention.method is not Method.indexer,
        index_projection=2.0 * tokens * model.hidden_size * index_width * layers,
        distillation=layers * free * _distillation_per_pair(model, attention) if index_width else 0.0,
        branches=layers * sum(_branches(length, model, attention) for length in document_lengths),
        one_document=len(document_lengths) == 1,
    )


def causal_pairs(length: int) -> int:
    """Returns the number of (query, key) pairs of a document in causal attention."""
    return length * (length + 1) // 2


def sparse_pairs(length: int, block_size: int, top_k: int) -> int:
    """Returns the number of pairs of a document's sparse stream: a query's own block up to itself, and up to top_k - 1 earlier blocks."""
    blocks, rest = divmod(length, block_size)
    own = blocks * causal_pairs(block_size) + causal_pairs(rest)
    # Block b has b earlier blocks. Each of its queries attends to min(top_k - 1, b) of them.
    ramp = min(top_k - 1, blocks)
    earlier = ramp * (ramp - 1) // 2 + (blocks - ramp) * (top_k - 1)
    return own + block_size * (block_size * earlier + rest * min(top_k - 1, blocks))


def window_pairs(length: int, window: int) -> int:
    """Returns the number of pairs of a document in a sliding window of so many keys."""
    return causal_pairs(min(length, window)) + max(0, length - window) * window


def block_pairs(length: int, block_size: int) -> int:
    """Returns the number of (query, block) pairs of a document whose block is complete at the query's position."""
    blocks, rest = divmod(length, block_size)
    # Each query at positions block_size * (b + 1) - 1 and later, up to the next such position, sees b + 1 blocks.
    return block_size * blocks * (blocks - 1) // 2 + blocks * (rest + 1)


def _branches(length: int, model: ModelConfig, attention: AttentionConfig) -> float:
    """Returns the operations of nsa's other two branches in one layer and document: mean values, both attentions."""
    if attention.method is not Method.nsa:
        return 0.0
    pairs = window_pairs(length, attention.window) + block_pairs(length, attention.block_size)
    return float(4 * model.query_width * pairs + length * model.kv_width)


def _selection(length: int, model: ModelConfig, attention: AttentionConfig) -> float:
    """Returns the operations of selection in one layer and document: mean keys, logits, a softmax per head, its sum per kv head."""
    if attention.score is Score.indexer:
        free = causal_pairs(length) - causal_pairs(min(length, attention.top_k * attention.block_size))
        return float(free * _index_heads(model, attention) * (2 * model.head_dim + 3))
    blocks, rest = divmod(length, attention.block_size)
    candidates = attention.block_size * blocks * (blocks - 1) // 2 + rest * blocks
    means = length * model.num_kv_heads * model.head_dim
    softmax = 0 if attention.score is Score.per_head else 3
    return float(means + candidates * model.num_attention_heads * (2 * model.head_dim + softmax))


def orthogonalisation_flops(shapes: Sequence[tuple[int, int]], iterations: int) -> float:
    """Returns the operations of Muon's Newton-Schulz iterations over matrices (engine/muon.py): three products each.

    Args:
        shapes: of the matrices.
        iterations: per matrix.
    """
    sides = [(min(shape), max(shape)) for shape in shapes]
    return float(sum(iterations * (4 * short * short * long + 2 * short**3) for short, long in sides))


def _index_heads(model: ModelConfig, attention: AttentionConfig) -> int:
    """Returns the number of index query heads of a layer."""
    return attention.indexer.heads * model.num_kv_heads


def _distillation_per_pair(model: ModelConfig, attention: AttentionConfig) -> int:
    """Returns the operations of the index loss and its gradients per (query, key) pair of a layer."""
    probability, gradients = 2 * model.head_dim + 3, 4 * model.head_dim + 3
    return model.num_attention_heads * probability + _index_heads(model, attention) * (probability + gradients)


def peak_flops(device_name: str, precision: PrecisionName) -> float | None:
    """Returns the dense peak of a device in operations per second, None if it is unknown.

    Args:
        device_name: the name that the driver reports, such as "NVIDIA H100 80GB HBM3".
        precision: number format of the matrix products.
    """
    if "MIG" in device_name:  # a part of a device
        return None
    for name, bf16, fp8, fp32 in _PEAKS:
        if re.search(rf"\b{name}\b", device_name):
            peak = {PrecisionName.bf16: bf16, PrecisionName.fp8: fp8, PrecisionName.fp32: fp32}[precision]
            return peak * TERA if peak is not None else None
    return None
