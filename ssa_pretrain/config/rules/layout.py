"""Rules of the layout: model, rows and batch against the degrees of parallelism and the number of processes."""

import math

from ssa_pretrain.config import Config, EngineName
from ssa_pretrain.config.machine import Machine
from ssa_pretrain.settings.problems import Problem, divisors, join, nearest, nearest_multiples

LLAMA3_CONTEXT = 8192  # the original context in Llama-3 RoPE scaling


def _heads(config: Config, _: Machine) -> list[Problem]:
    """tp divides heads, feed-forward and vocabulary."""
    tp, model = config.parallel.tp, config.model
    names = ("num_attention_heads", "num_kv_heads", "ffn_hidden_size", "vocab_divisor")
    sizes = {f"model.{name}": getattr(model, name) for name in names}
    if tp < 1 or min(sizes.values()) < 1:
        return []
    broken = {key: size for key, size in sizes.items() if size % tp}
    if not broken:
        return []
    rule = f"must divide {join((f'{key}={size}' for key, size in broken.items()), 'and')}"
    if "model.num_kv_heads" in broken:
        rule += " (selection sums over the heads of a kv head, which live on one rank)"
    possible = [d for d in divisors(model.num_kv_heads) if all(size % d == 0 for size in sizes.values())]
    return [Problem("parallel.tp", tp, rule, f"try {join(nearest(tp, possible))}", tuple(broken))]


def _layers(config: Config, _: Machine) -> list[Problem]:
    """The pipeline stages, pp * vpp, divide the layers."""
    layers, pp, vpp = config.model.num_layers, config.parallel.pp, config.parallel.vpp
    if min(layers, pp, vpp) < 1 or config.parallel.layers_on_last_stage or layers % (pp * vpp) == 0:
        return []
    if layers % pp:
        advice = f"try {join(nearest(pp, divisors(layers)))}"
        return [Problem("parallel.pp", pp, f"must divide model.num_layers={layers}", advice, ("model.num_layers",))]
    rule = f"times parallel.pp={pp} must divide model.num_layers={layers}"
    advice = f"try {join(nearest(vpp, divisors(layers // pp)))}"
    return [Problem("parallel.vpp", vpp, rule, advice, ("model.num_layers", "parallel.pp"))]


def _last_stage(config: Config, _: Machine) -> list[Problem]:
    """The layers before the last stage are the same number on each stage, and vpp divides both numbers."""
    layers, pp, vpp = config.model.num_layers, config.parallel.pp, config.parallel.vpp
    last = config.parallel.layers_on_last_stage
    if last < 1 or min(layers, pp, vpp) < 1:
        return []
    key, reads = "parallel.layers_on_last_stage", ("model.num_layers", "parallel.pp", "parallel.vpp")
    if pp == 1:
        rule = "is for pipelines, but parallel.pp=1 has one stage"
        return [Problem(key, last, rule, "try 0", reads)]
    unit = (pp - 1) * vpp
    possible = [n for n in range(vpp, layers, vpp) if (layers - n) % unit == 0]
    if last in possible:
        return []
    rule = f"must leave equally many of the model.num_layers={layers} layers to each other stage of parallel.pp={pp}"
    if vpp > 1:
        rule += f", and parallel.vpp={vpp} must divide it and them"
    advice = f"try {join(nearest(last, possible))}" if possible else "try 0"
    return [Problem(key, last, rule, advice, reads)]


def _sequence(config: Config, _: Machine) -> list[Problem]:
    """The row length is a multiple of the block size, and of tp under sequence parallelism."""
    length, block, tp = config.data.sequence_length, config.attention.block_size, config.parallel.tp
    reads = ("attention.block_size", "parallel.tp", "parallel.sequence_parallel")
    if min(length, block, tp) < 1:
        return []
    if length % block:
        rule, advice = f"must be a multiple of attention.block_size={block}", join(nearest_multiples(length, block))
        return [Problem("data.sequence_length", length, rule, f"try {advice}", reads[:1])]
    if config.parallel.sequence_parallel and config.parallel.cp == 1 and length % tp:
        rule = f"must be a multiple of parallel.tp={tp} under parallel.sequence_parallel=true"
        return [Problem("data.sequence_length", length, rule, f"try {join(nearest_multiples(length, tp))}", reads)]
    return []


def _context(config: Config, machine: Machine) -> list[Problem]:
    """Context parallelism splits a row into two chunks per rank; sequence parallelism splits each chunk over tp."""
    parallel, length = config.parallel, config.data.sequence_length
    if parallel.cp < 2 or min(parallel.tp, length, config.attention.block_size) < 1:
        return []
    if config.engine.name is not EngineName.megatron and "train" in machine.splits:
        advice = "try engine=megatron or parallel.cp=1"
        return [Problem("parallel.cp", parallel.cp, "needs engine.name=megatron", advice, ("engine.name",))]
    shards = parallel.tp if parallel.sequence_parallel else 1
    if length % (2 * parallel.cp * shards) == 0:
        return []
    reads = ("parallel.cp", "parallel.tp", "parallel.sequence_parallel", "attention.block_size")
    factors = f"2 * parallel.cp={parallel.cp}" + (f" * parallel.tp={shards}" if shards > 1 else "")
    rule = f"must be a multiple of {factors}: two chunks of a row on each context-parallel rank"
    unit = math.lcm(2 * parallel.cp * shards, config.attention.block_size)
    return [Problem("data.sequence_length", length, rule, f"try {join(nearest_multiples(length, unit))}", reads)]


def _rope(config: Config, _: Machine) -> list[Problem]:
    """RoPE scaling covers the whole row."""
    scaling, length = config.model.rope_scaling, config.data.sequence_length
    if not scaling.enabled or length <= scaling.factor * LLAMA3_CONTEXT:
        return []
    reach = int(scaling.factor * LLAMA3_CONTEXT)
    rule = f"stretches RoPE to {reach} tokens, fewer than data.sequence_length={length}"
    reads = ("data.sequence_length", "model.rope_scaling.enabled")
    return [Problem("model.rope_scaling.factor", scaling.factor, rule, f"try {-(-length // LLAMA3_CONTEXT)}", reads)]


def _world(config: Config, machine: Machine) -> list[Problem]:
    """The number of processes fits the layout."""
    asked, parallel = config.parallel.world_size, config.parallel
    if machine.has_files and machine.world_size is not None and asked not in (0, machine.world_size):
        processes = f"{machine.world_size} process{'es' if machine.world_size > 1 else ''}"
        advice = f"leave it at 0 to {machine.entry}, or add dry_run=true to plan"
        return [Problem("parallel.world_size", asked, f"but {processes} started", advice)]
    world, unit = asked or machine.world_size or 1, parallel.tp * parallel.pp * parallel.cp
    if unit < 1 or world % unit == 0:
        return []
    rule = f"must be a multiple of tp * pp * cp = {parallel.tp} * {parallel.pp} * {parallel.cp} = {unit}"
    reads = ("parallel.tp", "parallel.pp", "parallel.cp", "parallel.world_size")
    choices = nearest_multiples(world, unit)
    if asked:
        return [Problem("parallel.world_size", asked, rule, f"try {join(choices)}", reads[:3])]
    module = "" if machine.entry == "train" else f"--module ssa_pretrain.{machine.entry} "
    advice = f"try launchers/torchrun.sh --nproc-per-node {max(choices)} {module}…"
    if machine.entry == "evaluate":
        advice = f"try parallel=dp, since a checkpoint loads on any layout, or {advice[4:]}"
    return [Problem("world_size", world, rule, advice, reads)]


def _batch(config: Config, machine: Machine) -> list[Problem]:
    """The global batch splits evenly into rows, microbatches and data-parallel ranks, and fits the interleaved schedule."""
    if "train" not in machine.splits:  # an evaluation pads its microbatches
        return []
    parallel, training, length = config.parallel, config.training, config.data.sequence_length
    world = parallel.world_size or machine.world_size or 1
    if min(parallel.tp, parallel.pp, parallel.cp, training.micro_batch_size, length, training.global_batch_tokens) < 1:
        return []
    dp = max(1, world // (parallel.tp * parallel.pp * parallel.cp))
    unit, tokens = dp * training.micro_batch_size * length, training.global_batch_tokens
    reads = ("parallel.tp", "parallel.pp", "parallel.cp", "parallel.vpp", "parallel.world_size", "world_size")
    reads += ("training.micro_batch_size", "data.sequence_length")
    if tokens % unit:
        factors = f"{length} * {training.micro_batch_size} * {dp} = {unit}"
        rule = f"must be a multiple of sequence_length * micro_batch_size * dp = {factors}"
        return [_batch_problem(tokens, rule, nearest_multiples(tokens, unit), reads)]
    if parallel.vpp > 1 and tokens // unit % parallel.pp:
        rule = f"gives {tokens // unit} microbatches, but interleaving (parallel.vpp={parallel.vpp}) needs a multiple "
        rule += f"of parallel.pp={parallel.pp}"
        return [_batch_problem(tokens, rule, nearest_multiples(tokens, unit * parallel.pp), reads)]
    return []


def _batch_problem(tokens: int, rule: str, choices: list[int], reads: tuple[str, ...]) -> Problem:
    return Problem("training.global_batch_tokens", tokens, rule, f"try {join(choices)}", reads)


def _stop(config: Config, _: Machine) -> list[Problem]:
    """A run cannot stop after its last step."""
    training, steps = config.training, config.training.num_steps()
    if training.stop_at_step <= steps:
        return []
    reads = ("training.steps", "training.total_tokens", "training.global_batch_tokens")
    rule = f"is past the last step, {steps}"
    return [Problem("training.stop_at_step", training.stop_at_step, rule, f"try 0 or at most {steps}", reads)]


LAYOUT_RULES = (_heads, _layers, _last_stage, _sequence, _context, _rope, _world, _batch, _stop)
