"""Parameters and memory of a layout, computed without building a model.

Memory is an estimate for the rank that holds most: weights, gradients and optimizer states as megatron-core allocates
them, and activations by counting the tensors that the backward needs (after Korthikanti et al., arXiv 2205.05198, redone
for SwiGLU, RMSNorm and two attention streams). Under context parallelism a rank keeps 1 / cp of a microbatch's tokens,
but the keys and values of all of them. Allocator overhead and communication buffers are not included.
"""

from ssa_pretrain.config import Config, EngineName, PrecisionName, Recompute, Score
from ssa_pretrain.schedule import share_drawn


def count_parameters(config: Config, padded_vocab_size: int) -> tuple[int, int]:
    """Returns the number of parameters of the whole model (tied embeddings once) and of the rank that holds most."""
    model, tp, pp = config.model, config.parallel.tp, config.parallel.pp
    qkv = model.qkv_width(gate=config.attention.gate)
    matrices = model.hidden_size * (qkv + model.query_width + 3 * model.ffn_hidden_size)
    norms = 2 * model.hidden_size
    embedding = padded_vocab_size * model.hidden_size
    ends = embedding if model.tie_embeddings else 2 * embedding
    total = model.num_layers * (matrices + norms) + model.hidden_size + ends
    # With pp > 1 the first stage holds the embedding, the last one the final norm and the output layer (a copy if tied).
    ends = embedding if pp > 1 else ends
    return total, model.num_layers // pp * (matrices // tp + norms) + model.hidden_size + ends // tp


def state_bytes(config: Config, total: int, largest: int, replicas: int) -> dict[str, int]:
    """Returns the sizes of weights, gradients and AdamW's states on the fullest rank, and of a checkpoint.

    bf16 and fp8 keep fp32 main weights too, counted with the optimizer.

    Args:
        config: precision, engine and sharding.
        total: parameters of the whole model.
        largest: parameters of the rank that holds most.
        replicas: ranks with the same weights, dp * cp; the distributed optimizer shards over them.
    """
    fp32 = config.precision.name is PrecisionName.fp32
    weight, optimizer = (4, 8) if fp32 else (2, 12)
    gradient = 4 if fp32 or config.precision.grad_reduce_in_fp32 else 2
    stage = int(config.engine.distributed_optimizer)  # megatron-core shards as ZeRO-1 does
    offloaded = False
    if config.engine.name is EngineName.deepspeed:
        stage, offloaded = config.deepspeed.zero_stage, config.deepspeed.offload_optimizer
    weights, gradients, states = (replicas if stage >= needed else 1 for needed in (3, 2, 1))
    return {
        "weight_bytes": -(-largest * weight // weights),
        "gradient_bytes": -(-largest * gradient // gradients),
        "optimizer_bytes": 0 if offloaded else -(-largest * optimizer // states),
        # Optimizer states with fp32 main weights, the engine's weights, and the common weights.
        "checkpoint_bytes": total * (weight * (1 + config.checkpoint.weights) + 12),
    }


def activation_bytes(config: Config, padded_vocab_size: int, num_microbatches: int) -> int:
    """Returns the activations of the first stage (most microbatches in flight) or the last (the logits), whichever holds more."""
    model, parallel = config.model, config.parallel
    size = 4 if config.precision.name is PrecisionName.fp32 else 2
    tokens = config.training.micro_batch_size * config.data.sequence_length // parallel.cp
    chunk = model.num_layers // (parallel.pp * parallel.vpp)
    # Most (microbatch, chunk) pairs in flight on the first stage, in the 1F1B and the interleaved schedule.
    most = 2 * (parallel.pp - 1) + (parallel.vpp - 1) * parallel.pp + 1 if parallel.vpp > 1 else parallel.pp
    in_flight = min(most, num_microbatches * parallel.vpp)
    layer = tokens * _layer_bytes_per_token(config, size)
    kept = layer
    if config.engine.recompute is Recompute.full:
        shards = parallel.tp if parallel.sequence_parallel else 1
        kept = tokens * model.hidden_size * size // shards
    logits = tokens * padded_vocab_size // parallel.tp * size  # one buffer; the cross entropy works in place
    working = layer if config.engine.recompute is Recompute.full else 0
    first, last = in_flight * chunk * kept + working, chunk * parallel.vpp * kept + working + logits
    return max(first, last)


def _layer_bytes_per_token(config: Config, size: int) -> int:
    """Returns the bytes per token that one layer keeps for its backward."""
    model, tp, method = config.model, config.parallel.tp, config.attention.method
    shards = tp if config.parallel.sequence_parallel else 1
    # Keys and values are gathered over the context ranks: cp times as many tokens as queries.
    width = model.query_width
    qkv = width + 2 * model.kv_width * config.parallel.cp
    second = max(share_drawn(config.attention, main) for main in method.streams) if len(method.streams) > 1 else 0.0
    outputs = int((1.0 + second) * (width * size + 4 * model.num_attention_heads))  # with their log-sum-exps in fp32
    lists = model.num_attention_heads if config.attention.score is Score.per_head else model.num_kv_heads
    indices = 0 if "sparse" not in method.streams else 4 * config.attention.top_k * lists
    selective = config.engine.recompute is Recompute.selective
    # SwiGLU's input, and its output unless that is recomputed.
    feed_forward = (2 if selective else 3) * model.ffn_hidden_size * size
    norms = 4 * model.hidden_size * size // shards  # both norms' inputs and outputs
    attention = (qkv + width) * size + outputs + indices  # q, k, v; the gated output
    return norms + (attention + feed_forward) // tp
