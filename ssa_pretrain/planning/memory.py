"""Parameters and memory of a layout, computed without building a model.

Memory is that of the rank that holds most: weights, gradients and optimizer states as the engine allocates them, and activations by counting the
tensors that the backward needs (after Korthikanti et al., arXiv 2205.05198, redone for SwiGLU, RMSNorm and two attention streams). Under context
parallelism a rank keeps 1 / cp of a microbatch's tokens, but the keys and values of all of them.

*Peak.* When the backward begins, the layers' activations are all kept. Beside them lies either the output layer (one buffer of logits, and the hidden
states' gradients in fp32) or, once that is freed, the temporary tensors of one layer's backward with the kernels' workspaces. The larger of the two
counts. With a vocabulary of 128k it is the output layer.

*Workspaces* are those that kernels/ssa_kernels states: the segment sums and the inverted index of the sparse backward (sparse_attention/index.py),
and what selection needs in the forward (select/launch.py).

Peaks are compared with measured ones in measured_runs.csv. They are what tensors hold: the allocator's splits, NCCL and the CUDA context come on top
(estimate.py).
"""

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
from ssa_pretrain.config.stages import layers_per_stage
from ssa_pretrain.model.matrices import owners, whole_shapes
from ssa_pretrain.schedule import share_drawn

MOMENT = 4  # bytes of a moment of the optimizer per parameter, fp32
SELECTION_WORKSPACE = 64 * 2**20  # bytes, the bound in kernels/ssa_kernels/select/launch.py
INDEX_WORKSPACE = (
    8 * 32 * 2**20
)  # of the index loss: the bound in kernels/ssa_kernels/indexer/launch.py, and the tensors of its arithmetic
USER_BUFFERS = 93  # hidden states of a microbatch that Transformer Engine's user buffers take, by the measured run with engine.overlap_tp


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspaces:
    """Bytes that the sparse stream's kernels need in one layer beyond their results.

    Attributes:
        segment_sums: dK and dV of each segment of the inverted index, fp32; in the backward.
        index: the inverted index; in the backward.
        selection: the blocks' means, one fp32 per query and head, and the workspace of importance; in the forward.
    """

    segment_sums: int = 0
    index: int = 0
    selection: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """Bytes of activations on the stage that holds most.

    Attributes:
        layers: kept by the layers for the backward of the microbatches in flight.
        output_layer: the final norm, the logits and their gradients; 0 on a stage without an output layer.
        layer: temporary tensors of one layer's backward, its workspaces and recomputed activations included.
        workspaces: of the kernels, a part of `layer` (the backward's) or free again before it (selection's).
        buffers: of the communication between ranks, and of DeepSpeed.
    """

    layers: int
    output_layer: int
    layer: int
    workspaces: Workspaces
    buffers: int

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return self.layers + max(self.output_layer, self.layer) + self.buffers


def count_parameters(config: Config, padded_vocab_size: int) -> tuple[int, int]:
    """Returns the number of parameters of the whole model (tied embeddings once) and of the rank that holds most."""
    model, tp, pp = config.model, config.parallel.tp, config.parallel.pp
    qkv = model.qkv_width(gates=gates_per_head(config.attention)) + model.index_width(config.attention)
    matrices = model.hidden_size * (qkv + model.query_width + 3 * model.ffn_hidden_size)
    matrices += model.kv_width * config.attention.key_convolution
    norms = 2 * model.hidden_size + 2 * model.head_dim * model.qk_norm
    embedding = padded_vocab_size * model.hidden_size
    ends = embedding if model.tie_embeddings else 2 * embedding
    total = model.num_layers * (matrices + norms) + model.hidden_size + ends
    # With pp > 1 the first stage holds the embedding, the last one the final norm and the output layer (a copy if tied).
    ends = embedding if pp > 1 else ends
    return total, max(layers_per_stage(config)) * (matrices // tp + norms) + model.hidden_size + ends // tp


def optimizer_shards(config: Config, replicas: int) -> int:
    """Returns the ranks over which the optimizer's states are sharded.

    Args:
        config: the engine and its sharding.
        replicas: ranks with the same weights, dp * cp.
    """
    return replicas if _zero_stage(config) >= 1 else 1


def _zero_stage(config: Config) -> int:
    """Returns the ZeRO stage; megatron-core's distributed optimizer shards as stage 1 does."""
    if config.engine.name is EngineName.deepspeed:
        return config.deepspeed.zero_stage
    return int(config.engine.distributed_optimizer)


def _layer_parameters(config: Config) -> int:
    """Returns the parameters of the layers' matrices on one rank."""
    index = config.model.hidden_size * config.model.index_width(config.attention)
    return max(layers_per_stage(config)) * (_matrices_per_layer(config) + index) // config.parallel.tp


def _matrices_per_layer(config: Config) -> int:
    """Returns the parameters of a layer's matrices on all ranks, without those of a trained scorer."""
    model = config.model
    qkv = model.qkv_width(gates=gates_per_head(config.attention))
    return model.hidden_size * (qkv + model.query_width + 3 * model.ffn_hidden_size)


def state_bytes(config: Config, total: int, largest: int, replicas: int) -> dict[str, int]:
    """Returns the sizes of weights, gradients and the optimizer's states on the fullest rank, and of a checkpoint.

    bf16 and fp8 keep fp32 main weights too, counted with the optimizer, and so is the running mean of the weights (optim.ema_decay).

    Args:
        config: precision, engine and sharding.
        total: parameters of the whole model.
        largest: parameters of the rank that holds most.
        replicas: ranks with the same weights, dp * cp; the distributed optimizer shards over them.
    """
    fp32 = config.precision.name is PrecisionName.fp32
    weight, optimizer = (4, 8) if fp32 else (2, 12)
    mean = 4 * bool(config.optim.ema_decay)  # the running mean of the weights, in fp32 and sharded like the states
    gradient = 4 if fp32 or config.precision.grad_reduce_in_fp32 else 2
    stage, offloaded = _zero_stage(config), False
    if config.engine.name is EngineName.deepspeed:
        offloaded = config.deepspeed.offload_optimizer
    weights, gradients, states = (replicas if stage >= needed else 1 for needed in (3, 2, 1))
    # FP8 keeps the layers' matrices in one byte per element, and transposed, beside the weights in bf16.
    copies = 2 * _layer_parameters(config) if config.precision.name is PrecisionName.fp8 else 0
    per_rank, saved = -(-largest * (optimizer + mean) // states), 0
    if config.optim.name is OptimizerName.muon:
        per_rank = _muon_bytes(config, largest, states)
        saved = MOMENT * config.model.num_layers * _matrices_per_layer(config)
    return {
        "weight_bytes": -(-largest * weight // weights) + copies,
        "gradient_bytes": -(-largest * gradient // gradients),
        "optimizer_bytes": 0 if offloaded else per_rank,
        # Optimizer states with fp32 main weights, the engine's weights, the common weights, and the mean of the weights.
        "checkpoint_bytes": total * (weight * (1 + config.checkpoint.weights) + 12 + mean) - saved,
    }


def _muon_bytes(config: Config, largest: int, ranks: int) -> int:
    """Returns the bytes of Muon's and AdamW's states and fp32 weights on the data rank that holds most.

    Muon keeps one moment of the layers' matrices in place of two. Data ranks share whole parameters (model/matrices.py), under ZeRO equal pieces of each.

    Args:
        config: the run.
        largest: parameters of the rank that holds most.
        ranks: data ranks that share them.
    """
    model, parallel = config.model, config.parallel
    main = (0 if config.precision.name is PrecisionName.fp32 else 4) + 4 * bool(config.optim.ema_decay)
    matrices = [rows * columns // parallel.tp for rows, columns in whole_shapes(config).values()]
    layers = max(layers_per_stage(config))
    norms = [model.hidden_size] * (2 * layers + 1)
    rest = largest - layers * sum(matrices) - sum(norms)
    ends = [rest // 2] * 2 if not model.tie_embeddings and parallel.pp == 1 else [rest]
    sizes = matrices * layers + norms + ends
    each = [size * (main + (1 if i < layers * len(matrices) else 2) * MOMENT) for i, size in enumerate(sizes)]
    if config.engine.name is EngineName.deepspeed:
        return -(-sum(each) // ranks)
    held = [0] * ranks
    for count, owner in zip(each, owners(sizes, ranks), strict=True):
        held[owner] += count
    return max(held)


def activation_bytes(config: Config, padded_vocab_size: int, num_microbatches: int) -> int:
    """Returns the peak of `activations`."""
    return activations(config, padded_vocab_size, num_microbatches).peak


def activations(
    config: Config, padded_vocab_size: int, num_microbatches: int, largest: int = 0, dp: int = 1
) -> Activations:
    """Returns the activations of the first stage (most microbatches in flight) or the last (the logits), whichever holds more.

    Args:
        config: the model, its precision, layout and microbatch.
        padded_vocab_size: rows of the embedding.
        num_microbatches: per data rank and step.
        largest: parameters of the rank that holds most, for the buffers of DeepSpeed.
        dp: data ranks, for the same.
    """
    model, parallel = config.model, config.parallel
    size = _element(config)
    tokens = config.training.micro_batch_size * config.data.sequence_length // parallel.cp
    shards = parallel.tp if parallel.sequence_parallel else 1
    on_others, on_last = layers_per_stage(config)
    # Most (microbatch, chunk) pairs in flight on the first stage, in the 1F1B and the interleaved schedule.
    most = 2 * (parallel.pp - 1) + (parallel.vpp - 1) * parallel.pp + 1 if parallel.vpp > 1 else parallel.pp
    in_flight = min(most, num_microbatches * parallel.vpp)
    whole = tokens * _layer_bytes_per_token(config, size)
    kept, recomputed = whole, 0
    if config.engine.recompute is Recompute.full:
        kept, recomputed = tokens * model.hidden_size * size // shards, whole
    workspaces = workspace_bytes(config)
    layer = tokens * _backward_bytes_per_token(config, size) + recomputed + workspaces.segment_sums + workspaces.index
    # One buffer of logits, in which the cross entropy works; the final norm's input and output; the gradient of the hidden states.
    logits = tokens * padded_vocab_size // parallel.tp * size
    hidden = tokens * model.hidden_size * (2 * size // shards + 2 * size + 4)
    common = {"layer": layer, "workspaces": workspaces, "buffers": _buffer_bytes(config, tokens, largest, dp)}
    last = Activations(layers=on_last * kept, output_layer=logits + hidden, **common)
    first = Activations(layers=in_flight * (on_others // parallel.vpp) * kept, output_layer=0, **common)
    return max(first, last, key=lambda stage: stage.peak)


def workspace_bytes(config: Config) -> Workspaces:
    """Returns the workspaces of the sparse stream's kernels for one microbatch on a rank; zeros without that stream.

    With `attention.counterpart_share` below 1 they are those of a microbatch whose main stream is sparse, which has all queries.
    """
    model, attention, parallel = config.model, config.attention, config.parallel
    if "sparse" not in attention.method.streams:
        return Workspaces()
    keys = config.training.micro_batch_size * config.data.sequence_length
    queries = keys // parallel.cp
    heads, kv_heads = model.num_attention_heads // parallel.tp, max(1, model.num_kv_heads // parallel.tp)
    lists = heads if attention.score is Score.per_head else kv_heads
    width = 1 << (model.head_dim - 1).bit_length()
    choices, block_rows = queries * lists * attention.top_k, keys // attention.block_size
    segment = max(1024 // (heads // lists), 32)
    segments = choices // segment + min(kv_heads * block_rows, choices)
    means = block_rows * kv_heads * width * _element(config)
    sums = 0 if attention.score is Score.per_head else 4 * queries * heads
    workspace = min(SELECTION_WORKSPACE, 4 * queries * lists * block_rows)
    if attention.score is Score.indexer:  # no means; softmax sums of the target, and the scorer's gradients in fp32
        means, sums = 0, sums + 4 * keys * model.index_width(attention) // parallel.tp
        workspace = min(INDEX_WORKSPACE, 8 * 4 * queries * lists * block_rows)
    return Workspaces(
        segment_sums=segments * 2 * attention.block_size * width * 4,
        index=8 * choices + 20 * segments,
        selection=means + sums + workspace,
    )


def _element(config: Config) -> int:
    """Returns the bytes of an activation."""
    return 4 if config.precision.name is PrecisionName.fp32 else 2


def _layer_bytes_per_token(config: Config, size: int) -> int:
    """Returns the bytes per token that one layer keeps for its backward."""
    model, tp, method = config.model, config.parallel.tp, config.attention.method
    shards = tp if config.parallel.sequence_parallel else 1
    # In FP8 the products keep their inputs with one byte per element: both norms' outputs, the gated output, SwiGLU's output.
    product = 1 if config.precision.name is PrecisionName.fp8 else size
    # Keys and values are gathered over the context ranks: cp times as many tokens as queries.
    width = model.query_width
    qkv = width + 2 * model.kv_width * config.parallel.cp
    both = len(method.streams) > 1 and method is not Method.indexer
    second = max(share_drawn(config.attention, main) for main in method.streams) if both else 0.0
    branches = 2.0 if method is Method.nsa else 0.0  # beside the sparse stream
    # With their log-sum-exps in fp32.
    outputs = int((1.0 + second + branches) * (width * size + 4 * model.num_attention_heads))
    lists = model.num_attention_heads if config.attention.score is Score.per_head else model.num_kv_heads
    indices = 0 if "sparse" not in method.streams else 4 * config.attention.top_k * lists
    gates = size * model.num_attention_heads * gates_per_head(config.attention)
    selective = config.engine.recompute is Recompute.selective
    # With QK-norm the whole projection; with a convolution of keys the plain ones, and the convolved ones if they are normed then.
    plain = model.qkv_width(gates=gates_per_head(config.attention)) * model.qk_norm
    if config.attention.key_convolution:
        plain += model.kv_width * config.parallel.cp * (1 + model.qk_norm)
    # SwiGLU's input, and its output unless that is recomputed.
    feed_forward = model.ffn_hidden_size * (2 * size + (0 if selective else product))
    norms = 2 * model.hidden_size * (size + product) // shards  # both norms' inputs and outputs
    # Index queries and keys, and the gradients that the index loss keeps; its keys are gathered too.
    index = model.index_width(config.attention)
    index = 2 * size * (index + model.kv_width * (config.parallel.cp - 1)) if index else 0
    attention = (qkv + plain) * size + width * product + outputs + indices + gates + index  # q, k, v; the gated output
    return norms + (attention + feed_forward) // tp


def _backward_bytes_per_token(config: Config, size: int) -> int:
    """Returns the bytes per token of the temporary tensors of one layer's backward: those of the feed-forward or of attention."""
    model, tp = config.model, config.parallel.tp
    width, method = model.query_width, config.attention.method
    streams = {Method.indexer: 1, Method.nsa: 3}.get(method, len(method.streams))  # nsa's branches each have an output
    qkv = model.qkv_width(gates=gates_per_head(config.attention))
    feed_forward = 3 * model.ffn_hidden_size * size // tp
    # The gradients of each stream's output and of q, k, v, before and after RoPE; dQ in fp32 inside the full stream's kernel.
    attention = ((streams + 1) * width * size + 2 * qkv * size + 4 * width + 8 * model.num_attention_heads) // tp
    return 2 * model.hidden_size * size + max(feed_forward, attention)


def _buffer_bytes(config: Config, tokens: int, largest: int, dp: int) -> int:
    """Returns the buffers of communication, as far as measured runs show them."""
    engine, deepspeed = config.engine, config.deepspeed
    if engine.name is EngineName.deepspeed:
        weight = 4 if config.precision.name is PrecisionName.fp32 else 2
        if deepspeed.zero_stage <= 1:
            return weight * largest  # gradients before they are added to the accumulated ones
        # Stage 3 reduces from a bucket in fp32 and keeps gathered weights.
        return (4 * deepspeed.reduce_bucket_size + weight * largest * (dp > 1)) * (deepspeed.zero_stage == 3)
    if engine.overlap_tp and config.parallel.tp > 1:
        return USER_BUFFERS * tokens * config.model.hidden_size * _element(config)
    return 0
