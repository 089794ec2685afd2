"""Rules that join sections of a configuration, the machine and the data; `check` is all of them.

A rule returns problems and never raises. Rules over a key that is wrong already are left out, so that one mistake is one line. What they
know of the machine is a `Machine`, taken by the command line; planning for another machine leaves it unknown.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ssa_pretrain.config import Config, KernelImpl, LayerSpec, Method, PrecisionName
from ssa_pretrain.problems import Problem, divisors, join, nearest, nearest_multiples

LLAMA3_CONTEXT = 8192  # the original context in Llama-3 RoPE scaling
FP8_MULTIPLE = 16  # what Transformer Engine asks of both dimensions of an FP8 product


@dataclass(frozen=True, slots=True)
class Machine:
    """What is known of the machine: None is unknown, and rules over it are left out."""

    world_size: int | None = None  # processes that the launcher started
    has_gpu: bool | None = None
    has_transformer_engine: bool | None = None
    has_files: bool = True  # data and checkpoints can be looked at

    def unknown(self, world_size: int = 0) -> "Machine":
        """Returns a machine of which only the number of processes is known, to plan for."""
        return Machine(world_size=world_size or self.world_size, has_files=False)


def check(config: Config, machine: Machine, wrong: Collection[str] = ()) -> list[Problem]:
    """Returns every problem of a configuration.

    Args:
        config: the typed configuration.
        machine: what is known of the machine.
        wrong: keys with problems already.
    """
    found = _new(config.problems(), wrong)
    wrong = {*wrong, *(problem.key for problem in found)}
    across = _heads(config) + _layers(config) + _sequence(config) + _hardware(config, machine)
    across = _new(across + _world(config, machine), wrong)
    wrong = {*wrong, *(problem.key for problem in across)}
    batch = _new(_batch(config, machine), wrong)
    files = _new(_initial_weights(config) + _data(config), wrong) if machine.has_files else []
    return found + across + batch + files


def _new(problems: list[Problem], wrong: Collection[str]) -> list[Problem]:
    """Problems whose keys were right so far."""
    return [
        problem for problem in problems if problem.key not in wrong and not any(key in wrong for key in problem.reads)
    ]


def _heads(config: Config) -> list[Problem]:
    """Tensor parallelism over heads and matrix widths."""
    tp, model = config.parallel.tp, config.model
    shared = [d for d in divisors(max(1, model.num_kv_heads)) if model.num_attention_heads % d == 0]
    reasons = {
        "num_attention_heads": "",
        "num_kv_heads": " (selection sums over all heads of a kv head, which live on one rank)",
        "ffn_hidden_size": "",
    }
    for name, reason in reasons.items():
        size = getattr(model, name)
        if tp > 0 and size % tp:
            rule = f"must divide model.{name}={size}{reason}"
            reads = (f"model.{name}", "model.num_kv_heads", "model.num_attention_heads")
            return [Problem("parallel.tp", tp, rule, f"try {join(nearest(tp, shared))}", reads)]
    return []


def _layers(config: Config) -> list[Problem]:
    """Pipeline stages over layers."""
    layers, stages = config.model.num_layers, config.parallel.pp * config.parallel.vpp
    if stages < 1 or layers % stages == 0:
        return []
    reads = ("model.num_layers", "parallel.vpp", "parallel.pp")
    if config.parallel.vpp > 1:
        rule = f"times parallel.pp={config.parallel.pp} must divide model.num_layers={layers}"
        choices = [d for d in divisors(layers) if layers % (d * config.parallel.pp) == 0] or [1]
        return [
            Problem(
                "parallel.vpp", config.parallel.vpp, rule, f"try {join(nearest(config.parallel.vpp, choices))}", reads
            )
        ]
    choices = nearest(config.parallel.pp, divisors(layers))
    return [
        Problem(
            "parallel.pp", config.parallel.pp, f"must divide model.num_layers={layers}", f"try {join(choices)}", reads
        )
    ]


def _sequence(config: Config) -> list[Problem]:
    """The row length against blocks, sequence parallelism and RoPE."""
    length, block, found = config.data.sequence_length, config.attention.block_size, []
    if block > 0 and length % block:
        rule = f"must be a multiple of attention.block_size={block}"
        advice = f"try {join(nearest_multiples(length, block))}"
        found.append(Problem("data.sequence_length", length, rule, advice, ("attention.block_size",)))
    elif config.parallel.sequence_parallel and config.parallel.tp > 1 and length % config.parallel.tp:
        rule = f"must be a multiple of parallel.tp={config.parallel.tp} under parallel.sequence_parallel"
        advice = f"try {join(nearest_multiples(length, config.parallel.tp))}"
        found.append(
            Problem("data.sequence_length", length, rule, advice, ("parallel.tp", "parallel.sequence_parallel"))
        )
    scaling = config.model.rope_scaling
    if scaling.enabled and length > scaling.factor * LLAMA3_CONTEXT:
        rule = f"stretches RoPE to {scaling.factor * LLAMA3_CONTEXT:g} tokens, below data.sequence_length={length}"
        advice = f"try {-(-length // LLAMA3_CONTEXT)}"
        reads = ("data.sequence_length", "model.rope_scaling.enabled")
        found.append(Problem("model.rope_scaling.factor", scaling.factor, rule, advice, reads))
    return found


def _world(config: Config, machine: Machine) -> list[Problem]:
    """The number of processes against the layout."""
    asked, parallel = config.parallel.world_size, config.parallel
    if machine.has_files and machine.world_size is not None and asked not in (0, machine.world_size):
        rule = f"but {machine.world_size} process{'es' if machine.world_size > 1 else ''} started"
        advice = "leave it at 0 to train, or add dry_run=true to plan"
        return [Problem("parallel.world_size", asked, rule, advice)]
    world, unit = asked or machine.world_size or 1, parallel.tp * parallel.pp * parallel.cp
    if unit < 1 or world % unit == 0:
        return []
    rule = f"must be a multiple of tp * pp * cp = {parallel.tp} * {parallel.pp} * {parallel.cp} = {unit}"
    choices = join(nearest_multiples(world, unit))
    advice = (
        f"try {choices} processes" if asked else f"try torchrun --nproc-per-node {max(nearest_multiples(world, unit))}"
    )
    reads = ("parallel.tp", "parallel.pp", "parallel.cp")
    return [Problem("parallel.world_size" if asked else "world_size", world, rule, advice, reads)]


def _batch(config: Config, machine: Machine) -> list[Problem]:
    """The global batch against rows, microbatches and data-parallel ranks, and the pipeline's need of microbatches."""
    parallel, training, length = config.parallel, config.training, config.data.sequence_length
    world = parallel.world_size or machine.world_size or 1
    dp = world // (parallel.tp * parallel.pp * parallel.cp) if min(parallel.tp, parallel.pp, parallel.cp) > 0 else 0
    unit = dp * training.micro_batch_size * length
    reads = (
        "parallel.tp",
        "parallel.pp",
        "parallel.cp",
        "parallel.world_size",
        "world_size",
        "training.micro_batch_size",
    )
    reads += ("data.sequence_length",)
    if unit < 1:
        return []
    if training.global_batch_tokens % unit:
        rule = f"must be a multiple of sequence_length * micro_batch_size * dp = {length} * {training.micro_batch_size} * {dp} = {unit}"
        advice = f"try {join(nearest_multiples(training.global_batch_tokens, unit))}"
        return [Problem("training.global_batch_tokens", training.global_batch_tokens, rule, advice, reads)]
    microbatches = training.global_batch_tokens // unit
    if parallel.vpp > 1 and microbatches % parallel.pp:
        rule = f"makes {microbatches} microbatches, and interleaving (parallel.vpp={parallel.vpp}) needs a multiple of parallel.pp={parallel.pp}"
        advice = f"try {join(nearest_multiples(training.global_batch_tokens, unit * parallel.pp))}"
        return [
            Problem(
                "training.global_batch_tokens", training.global_batch_tokens, rule, advice, (*reads, "parallel.vpp")
            )
        ]
    steps = training.steps or -(-training.total_tokens // max(1, training.global_batch_tokens))
    if training.stop_at_step > steps:
        rule = f"lies past the last step, {steps}"
        reads = ("training.steps", "training.total_tokens", "training.global_batch_tokens")
        return [Problem("training.stop_at_step", training.stop_at_step, rule, f"try 0 or at most {steps}", reads)]
    return []


def _hardware(config: Config, machine: Machine) -> list[Problem]:
    """Kernels, layer specs and FP8 against what the machine has."""
    model, impl, found = config.model, config.attention.impl, []
    triton = impl is KernelImpl.triton or (impl is KernelImpl.auto and machine.has_gpu is True)
    if impl is KernelImpl.triton and machine.has_gpu is False:
        found.append(Problem("attention.impl", impl, "needs a GPU, and none is visible", "try auto or reference"))
    elif triton and config.attention.method is not Method.full and model.head_dim not in (64, 128):
        rule = "is none of the Triton kernels' 64 or 128"
        advice = f"try {min((64, 128), key=lambda dim: abs(dim - model.head_dim))} or attention.impl=reference"
        found.append(Problem("model.head_dim", model.head_dim, rule, advice, ("attention.impl",)))
    if config.engine.layer_spec is LayerSpec.transformer_engine:
        lacks = _lacking(machine)
        if lacks:
            found.append(Problem("engine.layer_spec", config.engine.layer_spec, f"needs {lacks}", "try auto or local"))
    if config.precision.name is PrecisionName.fp8:
        found += _fp8(config, machine)
    return found


def _lacking(machine: Machine) -> str:
    """What Transformer Engine's layers lack on a machine, in words; empty when nothing is known to lack."""
    if machine.has_gpu is False:
        return "a GPU, and none is visible"
    return "Transformer Engine, which is not installed" if machine.has_transformer_engine is False else ""


def _fp8(config: Config, machine: Machine) -> list[Problem]:
    """FP8 runs in Transformer Engine's linear layers, whose widths on a rank must be multiples of 16."""
    model, tp = config.model, max(1, config.parallel.tp)
    lacks = _lacking(machine)
    if lacks:
        return [Problem("precision.name", config.precision.name, f"needs {lacks}", "try precision=bf16")]
    if config.engine.layer_spec is LayerSpec.local:
        rule = "runs in Transformer Engine's layers, not in engine.layer_spec=local"
        return [
            Problem("precision.name", config.precision.name, rule, "try engine.layer_spec=auto", ("engine.layer_spec",))
        ]
    gate = model.num_attention_heads if config.attention.gate else 0
    qkv = (model.num_attention_heads + 2 * model.num_kv_heads) * model.head_dim + gate
    widths = {
        "model.hidden_size": (model.hidden_size, model.hidden_size),
        "model.ffn_hidden_size": (model.ffn_hidden_size, model.ffn_hidden_size // tp),
        "model.head_dim": (model.head_dim, qkv // tp),
    }
    rows = {
        "training.micro_batch_size": (
            config.training.micro_batch_size,
            config.training.micro_batch_size * config.data.sequence_length,
        )
    }
    rule = f"gives a matrix of {{}} on a rank under precision=fp8, which needs a multiple of {FP8_MULTIPLE}"
    reads = ("parallel.tp", "data.sequence_length", "model.num_attention_heads", "model.num_kv_heads")
    wrong = {key: pair for key, pair in (widths | rows).items() if pair[1] % FP8_MULTIPLE}
    return [
        Problem(key, value, rule.format(width), "try precision=bf16", reads) for key, (value, width) in wrong.items()
    ]


def _initial_weights(config: Config) -> list[Problem]:
    """The checkpoint that a run starts from."""
    folder = config.checkpoint.init_from
    if not folder:
        return []
    if not Path(folder).is_dir():
        return [
            Problem("checkpoint.init_from", folder, "does not exist", "give the checkpoint folder of a finished run")
        ]
    if Path(config.output_dir).resolve() in (Path(folder).resolve(), *Path(folder).resolve().parents):
        rule = f"lies in this run's own output_dir={config.output_dir}"
        return [
            Problem(
                "checkpoint.init_from", folder, rule, "rerun the same command without it to resume", ("output_dir",)
            )
        ]
    return []


def _data(config: Config) -> list[Problem]:
    """The prepared data: a readable manifest, a vocabulary that fits, known sources."""
    from ssa_pretrain.data.indexed_format import load_manifest  # numpy is not needed before

    try:
        manifest = load_manifest(config.data.path)
    except ValueError as error:
        return [Problem("data.path", config.data.path, f"is not usable: {error}", exit_code=4)]
    found, vocab = [], manifest.tokenizer.vocab_size
    if 0 < config.model.vocab_size < vocab:
        rule = f"is smaller than the {vocab} ids of {config.data.path}'s tokenizer"
        found.append(
            Problem(
                "model.vocab_size", config.model.vocab_size, rule, f"try 0 (the tokenizer's) or {vocab}", ("data.path",)
            )
        )
    sources = sorted({shard.name for shard in manifest.splits["train"]})
    for name in sorted(set(config.data.weights) - set(sources)):
        rule = f"names no source of {config.data.path}"
        found.append(
            Problem(
                f"data.weights.{name}",
                config.data.weights[name],
                rule,
                f"it has {join(sources, 'and')}",
                ("data.path",),
            )
        )
    if manifest.tokens("train") < config.data.sequence_length:
        rule = f"is longer than the whole training data ({manifest.tokens('train')} tokens in {config.data.path})"
        found.append(
            Problem("data.sequence_length", config.data.sequence_length, rule, "prepare more text", ("data.path",))
        )
    return found
