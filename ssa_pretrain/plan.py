"""What a configuration means on a machine: steps, layout, parameters, memory, files. Pure arithmetic, no torch, no GPU.

    python -m ssa_pretrain.plan experiment=ssa_1b_8k parallel.world_size=64

`make_plan` is what the trainer runs by; `describe` is the table that `dry_run=true` prints. Memory is an estimate: weights, gradients and
optimizer states exactly as megatron-core allots them, activations by counting the tensors that the backward needs (README of the method:
Korthikanti et al., arXiv 2205.05198, redone for SwiGLU, RMSNorm and two attention streams); allocator overhead is not in it.
"""

import sys
from dataclasses import dataclass

from ssa_pretrain.config import Config, Method, PrecisionName, Recompute
from ssa_pretrain.flops import RowFlops, row_flops
from ssa_pretrain.problems import ConfigError, Problem

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The numbers of a run.

    Attributes:
        world_size, tp, pp, vpp, cp, dp: processes and degrees; dp = world_size / (tp * pp * cp).
        num_microbatches: forward-backward passes a rank runs a step.
        rows_per_step, tokens_per_step: over all ranks.
        steps, warmup_steps: optimizer steps of the whole schedule, and of its warm-up.
        total_tokens: steps * tokens_per_step.
        vocab_size, padded_vocab_size: the tokenizer's, and the embedding's rows.
        parameters: of the whole model, padding included, tied embeddings once.
        parameters_per_rank: of the rank that holds most.
        weight_bytes, gradient_bytes, optimizer_bytes, activation_bytes: estimates for that rank.
        checkpoint_bytes: one checkpoint, all ranks' files.
        row: operations of one row that holds one document.
    """

    world_size: int
    tp: int
    pp: int
    vpp: int
    cp: int
    dp: int
    num_microbatches: int
    rows_per_step: int
    tokens_per_step: int
    steps: int
    warmup_steps: int
    total_tokens: int
    vocab_size: int
    padded_vocab_size: int
    parameters: int
    parameters_per_rank: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    checkpoint_bytes: int
    row: RowFlops

    @property
    def memory_bytes(self) -> int:
        """The estimate for the rank that holds most."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes

    @property
    def flops_per_token(self) -> float:
        """Model operations a token (forward and backward), as MFU counts them."""
        return self.row.model / (self.tokens_per_step // self.rows_per_step)


def make_plan(config: Config, world_size: int, vocab_size: int | None = None) -> Plan:
    """Returns the plan of a checked configuration.

    Args:
        config: a configuration without problems.
        world_size: processes.
        vocab_size: the tokenizer's vocabulary, for model.vocab_size=0.

    Raises:
        ConfigError: where world_size or the vocabulary leaves the plan open.
    """
    parallel, training = config.parallel, config.training
    model_ranks = parallel.tp * parallel.pp * parallel.cp
    if world_size < 1 or world_size % model_ranks:
        raise ConfigError([Problem("world_size", world_size, f"must be a multiple of tp * pp * cp = {model_ranks}")])
    vocab = config.model.vocab_size or vocab_size
    if not vocab:
        advice = "prepare the data first, or try model.vocab_size=4096"
        raise ConfigError([Problem("model.vocab_size", 0, "means the tokenizer's, and no data was found", advice)])
    dp = world_size // model_ranks
    rows = training.global_batch_tokens // config.data.sequence_length
    if rows % (dp * training.micro_batch_size) or rows * config.data.sequence_length != training.global_batch_tokens:
        rule = f"must be a multiple of sequence_length * micro_batch_size * dp = {config.data.sequence_length} * "
        rule += f"{training.micro_batch_size} * {dp}"
        raise ConfigError([Problem("training.global_batch_tokens", training.global_batch_tokens, rule)])
    steps = training.steps or -(-training.total_tokens // training.global_batch_tokens)
    padded = padded_vocab_size(vocab, config.model.vocab_divisor, parallel.tp)
    total, largest = parameters(config, padded)
    return Plan(
        world_size=world_size,
        tp=parallel.tp,
        pp=parallel.pp,
        vpp=parallel.vpp,
        cp=parallel.cp,
        dp=dp,
        num_microbatches=rows // (dp * training.micro_batch_size),
        rows_per_step=rows,
        tokens_per_step=training.global_batch_tokens,
        steps=steps,
        warmup_steps=round(config.optim.warmup_fraction * steps),
        total_tokens=steps * training.global_batch_tokens,
        vocab_size=vocab,
        padded_vocab_size=padded,
        parameters=total,
        parameters_per_rank=largest,
        **_state_bytes(config, total, largest, dp),
        activation_bytes=_activation_bytes(config, padded, rows // (dp * training.micro_batch_size)),
        row=row_flops(config.model, config.attention, [config.data.sequence_length], vocab),
    )


def padded_vocab_size(vocab_size: int, divisor: int, tp: int) -> int:
    """Returns the embedding's rows: the next multiple of divisor * tp."""
    unit = divisor * tp
    return -(-vocab_size // unit) * unit


def parameters(config: Config, padded_vocab: int) -> tuple[int, int]:
    """Returns the parameters of the whole model (tied embeddings once) and those of the rank that holds most."""
    model, tp, pp = config.model, config.parallel.tp, config.parallel.pp
    width = model.num_attention_heads * model.head_dim
    gate = model.num_attention_heads if config.attention.gate else 0
    qkv = width + 2 * model.num_kv_heads * model.head_dim + gate
    matrices = model.hidden_size * (qkv + width + 3 * model.ffn_hidden_size)
    norms = 2 * model.hidden_size
    embedding = padded_vocab * model.hidden_size
    output = 0 if model.tie_embeddings else embedding
    total = model.num_layers * (matrices + norms) + model.hidden_size + embedding + output
    layers = model.num_layers // pp * (matrices // tp + norms)
    if pp == 1:
        return total, layers + model.hidden_size + (embedding + output) // tp
    # The first stage holds the embedding; the last one the final norm and the output layer, a copy of the embedding if tied.
    return total, layers + model.hidden_size + embedding // tp


def _state_bytes(config: Config, total: int, largest: int, dp: int) -> dict[str, int]:
    """Weights, gradients and optimizer states of a rank, and a checkpoint of all: AdamW with fp32 main weights under bf16 and fp8."""
    fp32 = config.precision.name is PrecisionName.fp32
    gradient = 4 if fp32 or config.precision.grad_reduce_in_fp32 else 2
    optimizer = 8 if fp32 else 12
    shards = dp if config.engine.distributed_optimizer else 1
    return {
        "weight_bytes": largest * (4 if fp32 else 2),
        "gradient_bytes": largest * gradient,
        "optimizer_bytes": -(-largest * optimizer // shards),
        "checkpoint_bytes": total * ((4 if fp32 else 2) + optimizer),
    }


def _activation_bytes(config: Config, padded_vocab: int, num_microbatches: int) -> int:
    """What the backward needs of the microbatches in flight on the first stage, and the logits of one."""
    model, parallel = config.model, config.parallel
    size = 4 if config.precision.name is PrecisionName.fp32 else 2
    tokens = config.training.micro_batch_size * config.data.sequence_length // parallel.cp
    shared = parallel.tp if parallel.sequence_parallel else 1
    stages = (
        1
        if parallel.pp == 1
        else min(
            num_microbatches * parallel.vpp,
            parallel.pp * parallel.vpp + parallel.pp - 1 if parallel.vpp > 1 else parallel.pp,
        )
    )
    in_flight = model.num_layers // (parallel.pp * parallel.vpp) * stages if parallel.pp > 1 else model.num_layers
    layer = tokens * _layer_bytes_per_token(config, size, shared)
    if config.engine.recompute is Recompute.full:
        kept = in_flight * tokens * model.hidden_size * size // shared + layer
    else:
        kept = in_flight * layer
    # Logits in the model's format, and in fp32 with their gradient inside the cross entropy.
    logits = tokens * padded_vocab // parallel.tp * (size + 8)
    return int(kept + logits)


def _layer_bytes_per_token(config: Config, size: int, shared: int) -> int:
    """Bytes a token that one layer keeps for its backward."""
    model, tp = config.model, config.parallel.tp
    width = model.num_attention_heads * model.head_dim
    qkv = width + 2 * model.num_kv_heads * model.head_dim
    streams = 2 if config.attention.method is Method.ssa else 1
    lse = 4 * streams * model.num_attention_heads
    indices = 0 if config.attention.method is Method.full else 4 * config.attention.top_k * model.num_kv_heads
    replicated = 4 * model.hidden_size * size // shared  # both norms' inputs and outputs
    attention = (qkv + streams * width + width) * size + lse + indices  # q, k, v, the streams' outputs, the gated one
    if config.engine.recompute is Recompute.selective:
        attention -= streams * width * size + lse
    return replicated + (attention + 3 * model.ffn_hidden_size * size) // tp


def describe(config: Config, plan: Plan) -> str:
    """Returns the plan as a table for people."""
    gib = f"{plan.weight_bytes / GIB:.2f} weights + {plan.gradient_bytes / GIB:.2f} gradients + "
    gib += f"{plan.optimizer_bytes / GIB:.2f} optimizer + {plan.activation_bytes / GIB:.2f} activations"
    rows = [
        ("run", f"{config.name} -> {config.output_dir}"),
        (
            "model",
            f"{config.model.name}: {plan.parameters:,} parameters, {plan.parameters_per_rank:,} on the fullest rank",
        ),
        ("attention", _attention(config)),
        (
            "layout",
            f"{plan.world_size} processes = tp {plan.tp} x pp {plan.pp} x cp {plan.cp} x dp {plan.dp}"
            + (f", vpp {plan.vpp}" if plan.vpp > 1 else ""),
        ),
        (
            "step",
            f"{plan.tokens_per_step:,} tokens = {plan.rows_per_step:,} rows of {config.data.sequence_length:,} = dp {plan.dp} x {plan.num_microbatches} microbatches of {config.training.micro_batch_size}",
        ),
        ("length", f"{plan.steps:,} steps, {plan.warmup_steps:,} of warm-up; {plan.total_tokens:,} tokens"),
        ("memory a rank", f"about {plan.memory_bytes / GIB:.1f} GiB: {gib}"),
        (
            "work",
            f"{plan.flops_per_token / 1e9:.3f} GFLOP a token, {plan.flops_per_token * plan.total_tokens / 1e18:,.2f} EFLOP in all",
        ),
    ]
    return "\n".join(f"{name:<14} {value}" for name, value in rows)


def _attention(config: Config) -> str:
    """The method in a phrase."""
    attention = config.attention
    field = f"{attention.top_k} blocks of {attention.block_size} = {attention.top_k * attention.block_size} keys"
    if attention.method is Method.full:
        return f"full (sparse evaluation: {field})"
    if attention.method is Method.moba:
        return f"moba: sparse alone, {field}"
    return f"ssa: full and sparse ({field}), alignment weight {attention.alignment_weight:g}, full ratio {attention.full_ratio:g}"


def main() -> None:
    """Prints the plan of the command line's configuration."""
    from ssa_pretrain.cli import read_config, this_machine

    config = read_config("plan")
    try:
        plan = make_plan(config, config.parallel.world_size or this_machine().world_size or 1)
    except ConfigError as error:
        print(f"ssa_pretrain.plan:\n{error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    print(describe(config, plan))


if __name__ == "__main__":
    main()
