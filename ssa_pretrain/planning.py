"""What a configuration means on a machine: steps, layout, parameters, memory. Pure arithmetic, no torch, no GPU.

The trainer runs by a `Plan`; `describe` is the table that `dry_run=true` and plan.py print. Memory is an estimate for the
rank that holds most: weights, gradients and optimizer states as megatron-core allots them, activations by counting the
tensors that the backward needs (after Korthikanti et al., arXiv 2205.05198, redone for SwiGLU, RMSNorm and two attention
streams). Under context parallelism a rank keeps 1 / cp of a microbatch's tokens, but the keys and values of all. The allocator's overhead and
communication buffers are not in it.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from ssa_pretrain.config import Config, EngineName, Method, PrecisionName, Recompute, Score
from ssa_pretrain.data.indexed_format import Manifest
from ssa_pretrain.data.mixture import readings
from ssa_pretrain.flops import RowFlops, peak_flops, row_flops
from ssa_pretrain.problems import ConfigError, Problem, divisors

GIB = 2**30
GPUS_A_NODE = 8
USUAL_MFU = 0.4  # what published trainers reach in bf16 on H100s
SHOWN_LINES = 4


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
        checkpoint_bytes: estimate of one checkpoint, all ranks' files.
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
        """Operations a token, forward and backward, that MFU counts."""
        return self.row.model * self.rows_per_step / self.tokens_per_step

    def coordinates(self, rank: int) -> tuple[int, int, int, int]:
        """Returns a rank's place along tp, cp, dp and pp, in megatron-core's order: tp varies fastest, pp slowest."""
        rank, tp = divmod(rank, self.tp)
        rank, cp = divmod(rank, self.cp)
        pp, dp = divmod(rank, self.dp)
        return tp, cp, dp, pp


def make_plan(config: Config, world_size: int, vocab_size: int | None = None) -> Plan:
    """Returns the plan of a checked configuration.

    Args:
        config: a configuration without problems.
        world_size: processes.
        vocab_size: the tokenizer's vocabulary, for model.vocab_size=0.

    Raises:
        ConfigError: a ValueError where the processes, the batch or the vocabulary leave the plan open.
    """
    parallel, training, length = config.parallel, config.training, config.data.sequence_length
    unit = parallel.tp * parallel.pp * parallel.cp
    if world_size < 1 or world_size % unit:
        rule = f"must be a multiple of tp * pp * cp = {unit}"
        raise ConfigError([Problem("world_size", world_size, rule, f"try {unit}")])
    dp, tokens = world_size // unit, training.global_batch_tokens
    if tokens < 1 or tokens % (dp * training.micro_batch_size * length):
        factors = f"{length} * {training.micro_batch_size} * {dp}"
        rule = f"must be a multiple of sequence_length * micro_batch_size * dp = {factors}"
        raise ConfigError([Problem("training.global_batch_tokens", tokens, rule)])
    vocab = config.model.vocab_size or vocab_size
    if not vocab:
        advice = "prepare the data first, or try model.vocab_size=4096"
        raise ConfigError([Problem("model.vocab_size", 0, "is the tokenizer's, and no data was found", advice)])
    steps = training.steps or -(-training.total_tokens // tokens)
    padded = config.model.padded_vocab_size(vocab)
    total, largest = parameters(config, padded)
    num_microbatches = tokens // (dp * training.micro_batch_size * length)
    return Plan(
        world_size=world_size,
        tp=parallel.tp,
        pp=parallel.pp,
        vpp=parallel.vpp,
        cp=parallel.cp,
        dp=dp,
        num_microbatches=num_microbatches,
        rows_per_step=tokens // length,
        tokens_per_step=tokens,
        steps=steps,
        warmup_steps=round(config.optim.warmup_fraction * steps),
        total_tokens=steps * tokens,
        vocab_size=vocab,
        padded_vocab_size=padded,
        parameters=total,
        parameters_per_rank=largest,
        **_state_bytes(config, total, largest, dp * parallel.cp),
        activation_bytes=_activation_bytes(config, padded, num_microbatches),
        row=row_flops(config.model, config.attention, [length], vocab),
    )


def parameters(config: Config, padded_vocab: int) -> tuple[int, int]:
    """Returns the parameters of the whole model (tied embeddings once) and of the rank that holds most."""
    model, tp, pp = config.model, config.parallel.tp, config.parallel.pp
    width = model.num_attention_heads * model.head_dim
    gate = model.num_attention_heads if config.attention.gate else 0
    qkv = width + 2 * model.num_kv_heads * model.head_dim + gate
    matrices = model.hidden_size * (qkv + width + 3 * model.ffn_hidden_size)
    norms = 2 * model.hidden_size
    embedding = padded_vocab * model.hidden_size
    ends = embedding if model.tie_embeddings else 2 * embedding
    total = model.num_layers * (matrices + norms) + model.hidden_size + ends
    # The last stage holds the final norm and the output layer (a copy of the embedding if tied), the first the embedding.
    ends = embedding if pp > 1 else ends
    return total, model.num_layers // pp * (matrices // tp + norms) + model.hidden_size + ends // tp


def _state_bytes(config: Config, total: int, largest: int, replicas: int) -> dict[str, int]:
    """Weights, gradients and AdamW's states of a rank; bf16 and fp8 keep fp32 main weights beside them.

    The distributed optimizer shards over the ranks with the same weights, the dp * cp `replicas`.
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
        # The optimizer's part holds the main weights in fp32 too; the common weights stand beside it.
        "checkpoint_bytes": total * (weight * (1 + config.checkpoint.weights) + 12),
    }


def _activation_bytes(config: Config, padded_vocab: int, num_microbatches: int) -> int:
    """Activations of the fuller of the first stage (most microbatches in flight) and the last one (the logits)."""
    model, parallel = config.model, config.parallel
    size = 4 if config.precision.name is PrecisionName.fp32 else 2
    tokens = config.training.micro_batch_size * config.data.sequence_length // parallel.cp
    chunk = model.num_layers // (parallel.pp * parallel.vpp)
    # A microbatch's chunks that the first stage holds at once in the 1F1B and the interleaved schedule.
    most = 2 * (parallel.pp - 1) + (parallel.vpp - 1) * parallel.pp + 1 if parallel.vpp > 1 else parallel.pp
    in_flight = min(most, num_microbatches * parallel.vpp)
    layer = tokens * _layer_bytes_a_token(config, size)
    kept = layer
    if config.engine.recompute is Recompute.full:
        shards = parallel.tp if parallel.sequence_parallel else 1
        kept = tokens * model.hidden_size * size // shards
    logits = tokens * padded_vocab // parallel.tp * size  # one buffer, which the cross entropy works in
    working = layer if config.engine.recompute is Recompute.full else 0
    first, last = in_flight * chunk * kept + working, chunk * parallel.vpp * kept + working + logits
    return max(first, last)


def _layer_bytes_a_token(config: Config, size: int) -> int:
    """Bytes a token that one layer keeps for its backward."""
    model, tp, method = config.model, config.parallel.tp, config.attention.method
    shards = tp if config.parallel.sequence_parallel else 1
    width = model.num_attention_heads * model.head_dim
    # Keys and values are gathered over the context ranks: those of cp times as many tokens as queries.
    qkv = width + 2 * model.num_kv_heads * model.head_dim * config.parallel.cp
    streams = 2 if method is Method.ssa else 1
    outputs = streams * (width * size + 4 * model.num_attention_heads)  # and their LSEs in fp32
    lists = model.num_attention_heads if config.attention.score is Score.per_head else model.num_kv_heads
    indices = 0 if method is Method.full else 4 * config.attention.top_k * lists
    selective = config.engine.recompute is Recompute.selective
    feed_forward = (
        (2 if selective else 3) * model.ffn_hidden_size * size
    )  # SwiGLU's input, and its output unless made again
    norms = 4 * model.hidden_size * size // shards  # both norms' inputs and outputs
    attention = (qkv + width) * size + outputs + indices  # q, k, v; the gated output
    return norms + (attention + feed_forward) // tp


def describe(
    config: Config, plan: Plan, overrides: Sequence[str] = (), manifest: Manifest | None = None, *, entry: str = "train"
) -> str:
    """Returns the plan as a table for people.

    Args:
        config: the configuration.
        plan: its plan.
        overrides: the command line's key=value arguments, for the launch command.
        manifest: the dataset's, None where it is not prepared yet.
        entry: the entry point that the command starts.
    """
    length = config.data.sequence_length
    degrees = f"tp {plan.tp} x pp {plan.pp} x cp {plan.cp} x dp {plan.dp}" + (
        f", vpp {plan.vpp}" if plan.vpp > 1 else ""
    )
    batch = f"dp {plan.dp} x {plan.num_microbatches} microbatches of {config.training.micro_batch_size}"
    parts = {
        "weights": plan.weight_bytes,
        "gradients": plan.gradient_bytes,
        "optimizer": plan.optimizer_bytes,
        "activations": plan.activation_bytes,
    }
    memory = " + ".join(f"{_bytes(size)} {name}" for name, size in parts.items())
    vocabulary = f"vocabulary {plan.vocab_size:,}, padded to {plan.padded_vocab_size:,}"
    rows = [
        ("run", config.name),
        ("model", f"{config.model.name}, {plan.parameters:,} parameters; {vocabulary}"),
        ("attention", _attention(config)),
        ("precision", f"{config.precision.name}; engine {config.engine.name}, recompute {config.engine.recompute}"),
        ("data", f"{config.data.path}, rows of {length:,} tokens"),
        ("layout", f"{_count(plan.world_size, 'process')} = {degrees}"),
        *_ranks(plan),
        *_context(config, plan),
        ("step", f"{plan.tokens_per_step:,} tokens = {plan.rows_per_step:,} rows = {batch}"),
        ("length", f"{plan.steps:,} steps, {plan.warmup_steps:,} of warm-up; {plan.total_tokens:,} tokens"),
        *_epochs(config, plan, manifest),
        ("memory", f"about {_bytes(plan.memory_bytes)} on the fullest rank ({plan.parameters_per_rank:,} parameters)"),
        ("", memory),
        *_work(config, plan),
        *_files(config, plan),
        ("command", _command(config, plan, overrides, entry)),
    ]
    return "\n".join(f"{name:<11}{value}" for name, value in rows)


def _attention(config: Config) -> str:
    """The method in a phrase."""
    attention = config.attention
    field = f"{attention.top_k} blocks of {attention.block_size} = {attention.top_k * attention.block_size} keys"
    if attention.method is Method.full:
        return f"full; evaluated sparse with {field}"
    if attention.method is Method.moba:
        return f"moba: the sparse stream alone, {field}"
    terms = f"alignment weight {attention.alignment_weight:g}, full ratio {attention.full_ratio:g}"
    return f"ssa: both streams, sparse with {field}; {terms}"


def _ranks(plan: Plan) -> list[tuple[str, str]]:
    """Which ranks are one replica's stage, for the first few of them."""
    if plan.world_size == 1:
        return []
    lines = []
    for first in range(0, plan.world_size, plan.tp * plan.cp)[:SHOWN_LINES]:
        _, _, dp, pp = plan.coordinates(first)
        last = first + plan.tp * plan.cp - 1
        ranks = f"rank {first}" if first == last else f"ranks {first}-{last}"
        lines.append(("", f"{ranks:<13} replica {dp}, stage {pp}"))
    return [*lines, ("", "…")] if plan.world_size > SHOWN_LINES * plan.tp * plan.cp else lines


def _context(config: Config, plan: Plan) -> list[tuple[str, str]]:
    """What a context-parallel rank holds and sends."""
    if plan.cp == 1:
        return []
    model, size = config.model, 4 if config.precision.name is PrecisionName.fp32 else 2
    tokens = config.training.micro_batch_size * config.data.sequence_length
    keys = 2 * tokens * model.num_kv_heads * model.head_dim // plan.tp
    held = f"a rank has {tokens // plan.cp:,} of a microbatch's {tokens:,} queries and all keys"
    return [("", f"{held}: {_bytes(keys * size)} gathered and {_bytes(keys * 4)} of gradients reduced a layer")]


def _epochs(config: Config, plan: Plan, manifest: Manifest | None) -> list[tuple[str, str]]:
    """How many times the run reads the dataset and each of its sources, and which tokens its first epoch leaves out."""
    if manifest is None or not manifest.splits["train"]:
        return []
    rows = plan.steps * plan.rows_per_step
    try:
        found = readings(manifest, config.data.weights, config.data.sequence_length, rows)
    except ValueError as error:
        return [("epochs", f"unknown: {error}")]
    total = sum(reading.part.rows_per_epoch for reading in found)
    line = f"{rows / total:.3g} over {_count(total, 'row')}"
    if len(found) > 1:
        found.sort(key=lambda reading: -reading.epochs)
        shown = [f"{reading.part.name} {reading.epochs:.3g}" for reading in found[:SHOWN_LINES]]
        line += f": {', '.join(shown)}"
        if len(found) > SHOWN_LINES:
            line += f" … {found[-1].part.name} {found[-1].epochs:.3g}, the least of {len(found)}"
    lines = [("epochs", line)]
    if tail := sum(reading.part.tail for reading in found if reading.rows):
        left = f"the first epoch leaves out the last {tail:,} tokens"
        each = " of the sources together" if len(found) > 1 else ""
        lines.append(("", f"{left}{each}, the second reads them"))
    return lines


def _work(config: Config, plan: Plan) -> list[tuple[str, str]]:
    """Operations, and the days they take where GPUs are used as well as they usually are."""
    share = plan.row.beside / plan.row.model
    beside = f"; {config.attention.method} does {share:.1%} more, which MFU leaves out" if share > 0.001 else ""
    total = plan.flops_per_token * plan.total_tokens
    lines = [("work", f"{plan.flops_per_token / 1e9:.3g} GFLOP a token, {total:.3g} FLOP in all{beside}")]
    peak = peak_flops("H100", config.precision.name)
    if config.precision.name is not PrecisionName.fp32 and peak:
        hours = total / (USUAL_MFU * peak * plan.world_size) / 3600
        gpus = _count(plan.world_size, "H100")
        lines.append(("time", f"about {hours:,.1f} h on {gpus} at {USUAL_MFU:.0%} MFU"))
    return lines


def _files(config: Config, plan: Plan) -> list[tuple[str, str]]:
    """What the run writes."""
    interval, keep = config.checkpoint.interval, config.checkpoint.keep
    saves = plan.steps // interval + (plan.steps % interval > 0) if interval else 1
    kept = min(keep, saves)
    disk = f"{_count(saves, 'checkpoint')} of about {_bytes(plan.checkpoint_bytes)}, the newest {kept} kept"
    room = f"needs {_bytes((kept + 1) * plan.checkpoint_bytes)} of disk while one is written"
    start = [("start", f"weights of {config.checkpoint.init_from}")] if config.checkpoint.init_from else []
    return [*start, ("files", f"{config.output_dir}/: config.yaml, metrics.jsonl, {disk}"), ("", room)]


def _command(config: Config, plan: Plan, overrides: Sequence[str], entry: str) -> str:
    """How to start the run on as many processes."""
    dropped = ("dry_run", "parallel.world_size")
    kept = [word for word in overrides if word.lstrip("+").split("=")[0] not in dropped]
    program = f"-m ssa_pretrain.{entry} {shlex.join(kept) or f'name={config.name} …'}"
    if plan.world_size == 1:
        return f"python {program}"
    if plan.world_size <= GPUS_A_NODE:
        return f"torchrun --standalone --nproc-per-node {plan.world_size} {program}"
    a_node = max(divisor for divisor in divisors(plan.world_size) if divisor <= GPUS_A_NODE)
    rendezvous = "--rdzv-backend c10d --rdzv-endpoint HOST:29500"
    return f"torchrun --nnodes {plan.world_size // a_node} --nproc-per-node {a_node} {rendezvous} {program}"


def _count(number: int, noun: str) -> str:
    """A number and its noun."""
    plural = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{plural}"


def _bytes(size: int) -> str:
    """A size in GiB, or in MiB where that says more."""
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.1f} MiB"
