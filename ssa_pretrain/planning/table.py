"""The plan as a table for people, as `dry_run=true` and `python -m ssa_pretrain.plan` print it."""

import shlex
from collections.abc import Sequence

from ssa_pretrain.config import Auto, Config, Method, PrecisionName, Score
from ssa_pretrain.data.manifest import Manifest
from ssa_pretrain.planning.balance import Batch, balance
from ssa_pretrain.planning.epochs import epoch_lines
from ssa_pretrain.planning.flops import peak_flops
from ssa_pretrain.planning.plan import Plan
from ssa_pretrain.rates import describe_pieces, rate_pieces
from ssa_pretrain.schedule import share_drawn
from ssa_pretrain.settings.problems import divisors

GIB = 2**30
GPUS_PER_NODE = 8
TYPICAL_MFU = 0.4  # what published trainers reach in bf16 on H100s
MAX_LINES = 4  # ranks that are listed


def describe(
    config: Config,
    plan: Plan,
    overrides: Sequence[str] = (),
    manifest: Manifest | None = None,
    *,
    entry: str = "train",
    estimates: Sequence[tuple[str, str]] = (),
) -> str:
    """Returns the plan as a table for people.

    Args:
        config: the configuration.
        plan: its plan.
        overrides: the command line's key=value arguments, for the launch command.
        manifest: the dataset's manifest; None if the data is not prepared yet.
        entry: the entry point that the launch command starts.
        estimates: rows on a cluster, which replace those on memory and time.
    """
    length = config.data.sequence_length
    degrees = f"tp {plan.tp} x pp {plan.pp} x cp {plan.cp} x dp {plan.dp}"
    degrees += f", vpp {plan.vpp}" if plan.vpp > 1 else ""
    batch = f"dp {plan.dp} x {plan.num_microbatches} microbatches of {config.training.micro_batch_size}"
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
        *_batches(plan),
        ("length", _length(config, plan)),
        *_rates(config, plan),
        *epoch_lines(config, plan.steps, manifest),
        *([] if estimates else _memory(plan)),
        *_work(config, plan, with_time=not estimates),
        *estimates,
        *_balance(config, plan),
        *_files(config, plan),
        ("command", _command(config, plan, overrides, entry)),
    ]
    return "\n".join(f"{name:<11}{value}" for name, value in rows)


def _length(config: Config, plan: Plan) -> str:
    """Returns the steps and tokens of the run."""
    warmup = "" if config.optim.pieces else f", {plan.warmup_steps:,} of warm-up"
    return f"{plan.steps:,} steps{warmup}; {plan.total_tokens:,} tokens"


def _batches(plan: Plan) -> list[tuple[str, str]]:
    """Returns where the global batch changes; nothing if it stays."""
    if plan.batches.is_constant:
        return []
    sizes = [f"{tokens:,} tokens from step {first + 1:,}" for first, tokens in plan.batches.phases]
    return [("", f"the largest batch; {', '.join(sizes)}")]


def _rates(config: Config, plan: Plan) -> list[tuple[str, str]]:
    """Returns the pieces of the learning rate."""
    lines = describe_pieces(rate_pieces(config.optim, plan), plan.batches)
    return [("rate" * (i == 0), line) for i, line in enumerate(lines)]


def _memory(plan: Plan) -> list[tuple[str, str]]:
    """Returns the memory by part."""
    parts = {
        "weights": plan.weight_bytes,
        "gradients": plan.gradient_bytes,
        "optimizer": plan.optimizer_bytes,
        "activations": plan.activation_bytes,
    }
    fullest = f"about {_bytes(plan.memory_bytes)} on the fullest rank ({plan.parameters_per_rank:,} parameters)"
    return [("memory", fullest), ("", " + ".join(f"{_bytes(size)} {name}" for name, size in parts.items()))]


def _attention(config: Config) -> str:
    """Returns the attention method in a few words."""
    attention = config.attention
    field = f"{attention.top_k} blocks of {attention.block_size} = {attention.top_k * attention.block_size} keys"
    if attention.method is Method.full:
        return f"full; evaluated sparse with {field}"
    if attention.method is Method.moba:
        return f"moba: only the sparse stream, {field}"
    if attention.method is Method.indexer:
        warmup, share = attention.indexer.warmup_steps, attention.counterpart_share
        return f"indexer: full for {warmup:,} steps, then sparse with {field} by a trained scorer; its loss on {share:.3g} of the queries"
    if attention.method is Method.nsa:
        return f"nsa: {field}, the means of blocks, a window of {attention.window} keys; evaluated full with every block chosen"
    terms = f"alignment weight {attention.alignment_weight:g}, full ratio {attention.full_ratio:g}"
    if attention.counterpart_share < 1.0:
        full, sparse = (share_drawn(attention, main) for main in ("full", "sparse"))
        terms += f", the other stream on {attention.counterpart_share:.3g} of the queries ({full:.3g} where full is main, {sparse:.3g} where sparse is)"
    scorer = " by a trained scorer" if attention.score is Score.indexer else ""
    return f"ssa: both streams, sparse with {field}{scorer}; {terms}"


def _ranks(plan: Plan) -> list[tuple[str, str]]:
    """Returns replica and stage of the first few groups of ranks."""
    if plan.world_size == 1:
        return []
    lines = []
    for first in range(0, plan.world_size, plan.tp * plan.cp)[:MAX_LINES]:
        _, _, dp, pp = plan.coordinates(first)
        last = first + plan.tp * plan.cp - 1
        ranks = f"rank {first}" if first == last else f"ranks {first}-{last}"
        lines.append(("", f"{ranks:<13} replica {dp}, stage {pp}"))
    return [*lines, ("", "…")] if plan.world_size > MAX_LINES * plan.tp * plan.cp else lines


def _context(config: Config, plan: Plan) -> list[tuple[str, str]]:
    """Returns the tokens that a context-parallel rank holds and the bytes that it communicates."""
    if plan.cp == 1:
        return []
    model, size = config.model, 4 if config.precision.name is PrecisionName.fp32 else 2
    tokens = config.training.micro_batch_size * config.data.sequence_length
    keys = 2 * tokens * model.kv_width // plan.tp
    held = f"a rank holds {tokens // plan.cp:,} of a microbatch's {tokens:,} queries and all keys"
    return [("", f"{held}: {_bytes(keys * size)} gathered and {_bytes(keys * 4)} of gradients reduced per layer")]


def _work(config: Config, plan: Plan, *, with_time: bool) -> list[tuple[str, str]]:
    """Returns the floating-point operations, and, if asked for, the hours they take at a typical MFU."""
    share = plan.row.overhead / plan.row.model
    overhead = f"; {config.attention.method} adds {share:.1%} that MFU does not count" if share > 0.001 else ""
    total = plan.flops_per_token * plan.total_tokens
    lines = [("work", f"{plan.flops_per_token / 1e9:.3g} GFLOP per token, {total:.3g} FLOP in total{overhead}")]
    peak = peak_flops("H100", config.precision.name)
    if with_time and config.precision.name is not PrecisionName.fp32 and peak:
        hours = total / (TYPICAL_MFU * peak * plan.world_size) / 3600
        gpus = _count(plan.world_size, "H100")
        lines.append(("time", f"about {hours:,.1f} h on {gpus} at {TYPICAL_MFU:.0%} MFU"))
    return lines


def _balance(config: Config, plan: Plan) -> list[tuple[str, str]]:
    """Returns how far the slowest data rank lies above the mean, and where the main stream changes."""
    if len(config.attention.method.streams) == 1 or plan.num_microbatches * plan.dp == 1:
        return []
    batch = Batch(
        dp=plan.dp,
        num_microbatches=plan.num_microbatches,
        rows=config.training.micro_batch_size,
        row_length=config.data.sequence_length,
    )
    found = balance(config.attention, batch, plan.row, seed=config.seed)
    changes = f"{found.changes:.2g} changes of it per step"
    if plan.dp == 1:
        return [("balance", f"the main stream of the microbatches has {changes}")] if plan.pp > 1 else []
    slowest = f"the slowest data rank computes {found.slowest - 1:.1%} more than the mean"
    same = f"all data ranks have the same main stream in {found.same_stream:.0%} of the slots"
    return [("balance", f"{slowest}; {same}" + (f", with {changes}" if plan.pp > 1 else ""))]


def _files(config: Config, plan: Plan) -> list[tuple[str, str]]:
    """Returns the files that the run writes, and the disk space they need."""
    interval, keep = config.checkpoint.interval, config.checkpoint.keep
    if isinstance(interval, Auto):
        kept, number = keep, "checkpoints"
    else:
        saves = plan.steps // interval + (plan.steps % interval > 0) if interval else 1
        kept, number = min(keep, saves), _count(saves, "checkpoint")
    disk = f"{number} of about {_bytes(plan.checkpoint_bytes)}, the newest {kept} kept"
    room = f"needs {_bytes((kept + 1) * plan.checkpoint_bytes)} of disk while one is written"
    start = [("start", f"weights of {config.checkpoint.init_from}")] if config.checkpoint.init_from else []
    if config.checkpoint.branch_from:
        start = [("start", f"branch of {config.checkpoint.branch_from}, unless the folder has a checkpoint")]
    return [*start, ("files", f"{config.output_dir}/: config.yaml, metrics.jsonl, {disk}"), ("", room)]


def _command(config: Config, plan: Plan, overrides: Sequence[str], entry: str) -> str:
    """Returns the command that starts the run on this many processes."""
    dropped = ("dry_run", "parallel.world_size", "nodes", "hardware", "document_tokens")
    kept = [word for word in overrides if _key(word) not in dropped and not _key(word).startswith("hardware.")]
    program = f"-m ssa_pretrain.{entry} {shlex.join(kept) or f'name={config.name} …'}"
    if plan.world_size == 1:
        return f"python {program}"
    if plan.world_size <= GPUS_PER_NODE:
        return f"torchrun --standalone --nproc-per-node {plan.world_size} {program}"
    per_node = max(divisor for divisor in divisors(plan.world_size) if divisor <= GPUS_PER_NODE)
    rendezvous = "--rdzv-backend c10d --rdzv-endpoint HOST:29500"
    return f"torchrun --nnodes {plan.world_size // per_node} --nproc-per-node {per_node} {rendezvous} {program}"


def _key(word: str) -> str:
    """Returns the key of an override."""
    return word.lstrip("+").split("=")[0]


def _count(number: int, noun: str) -> str:
    """Returns a number and its noun, in the plural if needed."""
    plural = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{plural}"


def _bytes(size: int) -> str:
    """Returns a size in GiB, or in MiB if it is small."""
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.1f} MiB"
