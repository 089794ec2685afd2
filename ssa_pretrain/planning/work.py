"""The device's work in a step, as the time that each kind of it would take at the peak of the GPU: the terms of the cost model.

Matrix products and attention are operations over the peak of bf16 (or FP8); everything else is bytes over the bandwidth of the memory. calibration.py
multiplies each term by a factor that it fits to measured runs: how many times longer than at the peak this kind of work takes. So a factor is a
property of the kernels, and another GPU changes the peaks only.

A term counts what the kernels do: both streams where both are computed, selection, the gates and the alignment, recomputation. One microbatch is
counted for a main stream ("full" or "sparse") and the share of queries that compute the other one; `mean_work` weights the two kinds as training draws
them. The rank is one of the stage that works longest: the last one, which has the output layer.

Standard library only.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ssa_pretrain.config import (
    Config,
    EngineName,
    Method,
    OptimizerName,
    PrecisionName,
    Recompute,
    Score,
    gates_per_head,
)
from ssa_pretrain.config.hardware import HardwareConfig
from ssa_pretrain.model.matrices import matrix_shapes
from ssa_pretrain.planning.flops import TERA, RowFlops, orthogonalisation_flops

# The terms, and what each of them counts.
TERMS = {
    "products": "matrix products in bf16",
    "fp8 products": "matrix products in FP8",
    "full stream": "full attention of whole rows",
    "sampled full stream": "full attention of a sample of queries, or of a context rank's",
    "sparse stream": "sparse attention, and nsa's other two branches",
    "selection": "the choice of blocks by means of keys",
    "trained scorer": "the choice of blocks by a trained scorer, and the index loss with its gradients",
    "memory traffic": "norms, RoPE, SwiGLU, gates, alignment, cross entropy, gradient accumulation",
    "optimizer": "the optimizer and the gradient norm",
    "zero 1": "DeepSpeed's work per layer in stage 1 (or 0), mostly the host's; at the peak: 1 ms",
    "zero 2": "in stage 2",
    "zero 3": "in stage 3",
    "offload": "DeepSpeed's optimizer on the host",
}
HOST_MS_PER_LAYER = {
    1: 61 / 16,
    2: 88 / 16,
}  # by the number of streams: docs/results/h200.md, "Where the host is the limit"

Work = Mapping[str, float]  # seconds at the peak, by term


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """What one rank of a stage holds and computes.

    Attributes:
        layers: of the stage.
        has_output: whether the stage has the output layer.
        parameters: of the rank.
        padded_vocab_size: rows of the embedding.
        num_microbatches: per step.
        sharded: ranks over which the optimizer is sharded.
    """

    layers: int
    has_output: bool
    parameters: int
    padded_vocab_size: int
    num_microbatches: int
    sharded: int


def microbatch_work(
    config: Config, hardware: HardwareConfig, row: RowFlops, rank: Rank, main: str, share: float
) -> dict[str, float]:
    """Returns the work of one microbatch's forward and backward on a rank.

    Args:
        config: precision, layout, recomputation, rows per microbatch.
        hardware: the peaks.
        row: operations of a row in the forward, over all layers and ranks.
        rank: what the rank holds.
        main: the main stream.
        share: share of the queries that compute the other stream.
    """
    parallel = config.parallel
    part = config.training.micro_batch_size / (parallel.tp * parallel.cp)
    layers = part * rank.layers / config.model.num_layers
    again = config.engine.recompute is Recompute.full  # the layers' forward runs twice
    passes = 4.0 if again else 3.0
    peak = hardware.bf16_tflops * TERA
    full, spans, sparse, selection = _attention(row, main, share, dense=parallel.cp == 1 or row.one_document)
    work = dict.fromkeys(TERMS, 0.0)
    linear = passes * row.linear * layers
    if config.precision.name is PrecisionName.fp8 and hardware.fp8_tflops:
        work["fp8 products"] = linear / (hardware.fp8_tflops * TERA)
        linear = 0.0
    linear += (passes - 1.0) * row.index_projection * layers  # its input needs no gradient
    work["products"] = (linear + 3.0 * row.logits * part * rank.has_output) / peak
    chooser = "trained scorer" if config.attention.score is Score.indexer else "selection"
    for name, flops, times in (
        ("full stream", full, passes),
        ("sampled full stream", spans, passes),
        ("sparse stream", sparse, passes),
        (chooser, selection, passes - 2.0),  # it has no backward
    ):
        work[name] = times * flops * layers / peak
    # The index loss's gradients are counted with it, and computed in the forward.
    work["trained scorer"] += share * row.distillation * layers / peak
    work["memory traffic"] = _traffic(config, rank, share, again=again) / (hardware.hbm_tb_per_s * TERA)
    return work


def mean_work(config: Config, hardware: HardwareConfig, row: RowFlops, rank: Rank) -> dict[str, float]:
    """Returns the mean work of a microbatch over both main streams, as training draws them."""
    kinds = ((row.full_ratio, "full", row.share_if_full), (1.0 - row.full_ratio, "sparse", row.share_if_sparse))
    works = [(p, microbatch_work(config, hardware, row, rank, main, share)) for p, main, share in kinds if p]
    return {term: sum(p * work[term] for p, work in works) for term in TERMS}


def step_work(config: Config, hardware: HardwareConfig, rank: Rank) -> dict[str, float]:
    """Returns the work that a step has once: the optimizer, and what DeepSpeed does with gradients after each microbatch."""
    work = dict.fromkeys(TERMS, 0.0)
    hbm = hardware.hbm_tb_per_s * TERA
    own = rank.parameters / rank.sharded
    # Reads the gradient twice (norm and update); reads and writes two moments and the main weight; writes the weight.
    work["optimizer"] = own * (2 * 4 + 3 * 8 + 2) / hbm
    if config.optim.name is OptimizerName.muon:
        # Whole matrices on every tensor rank, under DeepSpeed on every data rank too.
        orthogonal = orthogonalisation_flops(matrix_shapes(config), config.optim.muon.ns_steps)
        shared = 1 if config.engine.name is EngineName.deepspeed else rank.sharded
        work["products"] = orthogonal * rank.layers / shared / (hardware.bf16_tflops * TERA)
    if config.engine.name is EngineName.deepspeed:
        stage = config.deepspeed.zero_stage
        # Hooks around modules and gradients: as long on one GPU as under tensor parallelism, so it is not the device's work.
        work[f"zero {max(1, stage)}"] = rank.num_microbatches * rank.layers * 1e-3
        if config.deepspeed.offload_optimizer:
            work["optimizer"] = 0.0
            work["offload"] = own * 6 / (hardware.host_copy_gb_per_s * 1e9)
    return work


def host_seconds(config: Config, hardware: HardwareConfig, layers: int) -> float:
    """Returns how long the host needs to launch a microbatch's forward and backward, from what a slow one took."""
    streams = len(config.attention.method.streams)
    again = 4 / 3 if config.engine.recompute is Recompute.full else 1.0
    selects = config.attention.method in (Method.moba, Method.nsa)  # selection has 13 launches
    both = 2 if streams == 2 or selects else 1
    return HOST_MS_PER_LAYER[both] * 1e-3 * layers * again / hardware.host_speed


def _attention(row: RowFlops, main: str, share: float, *, dense: bool) -> tuple[float, float, float, float]:
    """Returns the forward operations of the full stream of dense rows or parts of rows, of other spans of queries, of the sparse stream and of selection."""
    full, spans, sparse, selection = 0.0, 0.0, row.sparse_attention + row.branches, row.selection
    if not row.computes_both:  # drawn queries compute no other stream
        full, sparse, selection = (row.full_attention, 0.0, 0.0) if main == "full" else (0.0, sparse, selection)
    elif main == "full":
        full = row.full_attention
        sparse, selection = share * (row.sparse_attention - row.covered), share * row.selection
    elif share == 1.0:
        full = row.full_attention
    else:
        spans = share * (row.full_attention - row.covered)
    return (full, spans, sparse, selection) if dense else (0.0, full + spans, sparse, selection)


def _traffic(config: Config, rank: Rank, share: float, *, again: bool) -> float:
    """Returns the bytes that a microbatch moves beside matrix products and attention, each tensor counted once per kernel."""
    model, parallel = config.model, config.parallel
    size = 4 if config.precision.name is PrecisionName.fp32 else 2
    tokens = config.training.micro_batch_size * config.data.sequence_length / parallel.cp
    shards = parallel.tp if parallel.sequence_parallel else 1
    width, ffn = model.query_width / parallel.tp, model.ffn_hidden_size / parallel.tp
    qkv = model.qkv_width(gates=gates_per_head(config.attention)) / parallel.tp
    # Forward and backward: norms and residuals; split and RoPE; gate and alignment; SwiGLU. FP8 also reads and casts the products' inputs.
    norms, rope, gate, swiglu = 20 * model.hidden_size / shards, 4 * qkv, (5 + 3 * share) * width, 8 * ffn
    # QK-norm reads the projection again in the backward; convolved keys are written and read once more in each direction, of all tokens.
    rope += qkv * model.qk_norm + 9 * model.kv_width / parallel.tp * parallel.cp * bool(
        config.attention.key_convolution
    )
    casts = 3 * (2 * model.hidden_size + width + 3 * ffn) if config.precision.name is PrecisionName.fp8 else 0
    if config.engine.recompute is Recompute.selective:
        swiglu += 3 * ffn
    if config.attention.method is Method.nsa:
        gate += 6 * width  # two more branches: read in both directions, and their gradients written
    elements = norms + rope + gate + swiglu + casts
    if again:
        elements += norms * 0.3 + rope / 2 + gate / 2 + 3 * ffn
    logits = 4 * rank.padded_vocab_size / parallel.tp * rank.has_output
    # Weights are read twice and their fp32 gradients read and written.
    return size * tokens * (elements * rank.layers + logits) + 12 * rank.parameters
