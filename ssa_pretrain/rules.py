"""Rules that join sections of a configuration, the machine and the data; `check` is all of them.

`warning` is what none of them refuses. A rule returns problems and never raises. Rules run in order, and one that reads a key with a
problem of its own is left out, so that one mistake is one line. What they know of the machine is a `Machine`, which the command line
takes; planning for another machine leaves it unknown.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ssa_pretrain.config import Config, EngineName, KernelImpl, LayerSpec, Method, PrecisionName, WandbMode
from ssa_pretrain.data.indexed_format import load_manifest
from ssa_pretrain.data.mixture import least_tokens
from ssa_pretrain.problems import ConfigError, Problem, divisors, join, nearest, nearest_multiples
from ssa_pretrain.rules_deepspeed import deepspeed_problems
from ssa_pretrain.run_folder import ELSEWHERE, require_free, unwritable

LLAMA3_CONTEXT = 8192  # the original context in Llama-3 RoPE scaling
MOST_HEADS_A_GROUP = 32  # query heads to a kv head in the GPU kernels
FP8_MULTIPLE = 16  # what Transformer Engine asks of both dimensions of an FP8 product


@dataclass(frozen=True, slots=True)
class Machine:
    """What is known of the machine; None is unknown, and rules over it are left out.

    Attributes:
        world_size: processes that the launcher started.
        has_gpu: a GPU is visible and torch can use it.
        has_transformer_engine: Transformer Engine is installed.
        has_deepspeed: DeepSpeed is installed.
        has_wandb: W&B's client is installed.
        has_files: data and checkpoints can be looked at.
        splits: what the command reads of the data.
        claims_folder: this process, or those that it is asked for, will use output_dir for a run.
        slurm_tasks: processes that srun started, where each of them takes itself for the only one; else 1.
        entry: the entry point, which advice names.
    """

    world_size: int | None = None
    has_gpu: bool | None = None
    has_transformer_engine: bool | None = None
    has_deepspeed: bool | None = None
    has_wandb: bool | None = None
    has_files: bool = True
    splits: tuple[str, ...] = ("train", "heldout")
    slurm_tasks: int = 1
    entry: str = "train"
    claims_folder: bool = False

    def unknown(self) -> "Machine":
        """Returns a machine of which only the number of processes is known, to plan for."""
        return Machine(world_size=self.world_size, has_files=False)


def check(config: Config, machine: Machine, wrong: Collection[str] = ()) -> list[Problem]:
    """Returns every problem of a configuration.

    Args:
        config: the typed configuration.
        machine: what is known of the machine.
        wrong: keys with problems already; a section stands for all its keys.
    """
    rules = [Config.problems, _heads, _layers, _sequence, _context, _rope, partial(_world, machine=machine)]
    if "train" in machine.splits:  # an evaluation pads its microbatches
        rules += [partial(_batch, machine=machine)]
    rules += [_length, partial(_kernels, machine=machine)]
    rules += [
        partial(_layer_spec, machine=machine),
        partial(_fp8, machine=machine),
        partial(_overlap_tp, machine=machine),
    ]
    rules += [partial(deepspeed_problems, installed=machine.has_deepspeed), partial(_wandb, machine=machine)]
    if machine.has_files:
        rules += [partial(_launcher, machine=machine), partial(_output_dir, machine=machine), _initial_weights]
        rules += [partial(_data, splits=machine.splits)]
    found: list[Problem] = []
    for rule in rules:
        bad = {*wrong, *(problem.key for problem in found)}
        found += [problem for problem in rule(config) if not _touches(problem, bad)]
    return found


def warning(config: Config) -> str:
    """Returns what a person should know of a configuration that no rule refuses; mostly empty."""
    attention, length = config.attention, config.data.sequence_length
    if attention.method is Method.full or attention.top_k * attention.block_size < length:
        return ""
    blocks = f"attention.top_k={attention.top_k} blocks of attention.block_size={attention.block_size}"
    return (
        f"{blocks} cover whole rows of data.sequence_length={length}, so sparse attention is full attention: alignment 0, captured mass 1; "
        "lower top_k or lengthen the rows"
    )


def _touches(problem: Problem, wrong: Collection[str]) -> bool:
    """Whether a problem is about a key that is wrong already, or that lies in a section that is."""
    keys = (problem.key, *problem.reads)
    return any(key == bad or key.startswith(f"{bad}.") for key in keys for bad in wrong)


def _heads(config: Config) -> list[Problem]:
    """Tensor parallelism over heads, feed-forward and vocabulary."""
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


def _layers(config: Config) -> list[Problem]:
    """Pipeline stages over layers."""
    layers, pp, vpp = config.model.num_layers, config.parallel.pp, config.parallel.vpp
    if min(layers, pp, vpp) < 1 or layers % (pp * vpp) == 0:
        return []
    if layers % pp:
        advice = f"try {join(nearest(pp, divisors(layers)))}"
        return [Problem("parallel.pp", pp, f"must divide model.num_layers={layers}", advice, ("model.num_layers",))]
    rule = f"times parallel.pp={pp} must divide model.num_layers={layers}"
    advice = f"try {join(nearest(vpp, divisors(layers // pp)))}"
    return [Problem("parallel.vpp", vpp, rule, advice, ("model.num_layers", "parallel.pp"))]


def _sequence(config: Config) -> list[Problem]:
    """The row length against blocks and sequence parallelism."""
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


def _context(config: Config) -> list[Problem]:
    """Context parallelism over the row: two chunks a rank, each whole for tensor parallelism that shards the sequence."""
    parallel, length = config.parallel, config.data.sequence_length
    if parallel.cp < 2 or min(parallel.tp, length, config.attention.block_size) < 1:
        return []
    if config.engine.name is not EngineName.megatron:
        advice = "try engine=megatron or parallel.cp=1"
        return [Problem("parallel.cp", parallel.cp, "needs engine.name=megatron", advice, ("engine.name",))]
    if config.attention.method is Method.ssa and config.attention.counterpart_share < 1.0:
        rule = f"must be 1 under parallel.cp={parallel.cp}: the sample is not dealt out over context ranks"
        share = config.attention.counterpart_share
        return [Problem("attention.counterpart_share", share, rule, "try 1 or parallel.cp=1", ("parallel.cp",))]
    shards = parallel.tp if parallel.sequence_parallel else 1
    if length % (2 * parallel.cp * shards) == 0:
        return []
    reads = ("parallel.cp", "parallel.tp", "parallel.sequence_parallel", "attention.block_size")
    factors = f"2 * parallel.cp={parallel.cp}" + (f" * parallel.tp={shards}" if shards > 1 else "")
    rule = f"must be a multiple of {factors}: two chunks of a row on each context-parallel rank"
    unit = math.lcm(2 * parallel.cp * shards, config.attention.block_size)
    return [Problem("data.sequence_length", length, rule, f"try {join(nearest_multiples(length, unit))}", reads)]


def _rope(config: Config) -> list[Problem]:
    """RoPE scaling must reach the row's length."""
    scaling, length = config.model.rope_scaling, config.data.sequence_length
    if not scaling.enabled or length <= scaling.factor * LLAMA3_CONTEXT:
        return []
    reach = int(scaling.factor * LLAMA3_CONTEXT)
    rule = f"stretches RoPE to {reach} tokens, fewer than data.sequence_length={length}"
    reads = ("data.sequence_length", "model.rope_scaling.enabled")
    return [Problem("model.rope_scaling.factor", scaling.factor, rule, f"try {-(-length // LLAMA3_CONTEXT)}", reads)]


def _world(config: Config, machine: Machine) -> list[Problem]:
    """The number of processes against the layout."""
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
    """The global batch against rows, microbatches, data-parallel ranks and the interleaved schedule."""
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
        rule = f"makes {tokens // unit} microbatches, and interleaving (parallel.vpp={parallel.vpp}) needs a multiple "
        rule += f"of parallel.pp={parallel.pp}"
        return [_batch_problem(tokens, rule, nearest_multiples(tokens, unit * parallel.pp), reads)]
    return []


def _batch_problem(tokens: int, rule: str, choices: list[int], reads: tuple[str, ...]) -> Problem:
    return Problem("training.global_batch_tokens", tokens, rule, f"try {join(choices)}", reads)


def _length(config: Config) -> list[Problem]:
    """Where a run stops before its end."""
    training = config.training
    steps = training.steps or -(-training.total_tokens // max(1, training.global_batch_tokens))
    if training.stop_at_step <= steps:
        return []
    reads = ("training.steps", "training.total_tokens", "training.global_batch_tokens")
    rule = f"lies past the last step, {steps}"
    return [Problem("training.stop_at_step", training.stop_at_step, rule, f"try 0 or at most {steps}", reads)]


def _kernels(config: Config, machine: Machine) -> list[Problem]:
    """What the GPU kernels take; the reference takes everything."""
    impl, head_dim = config.attention.impl, config.model.head_dim
    if impl is KernelImpl.triton and machine.has_gpu is False:
        return [Problem("attention.impl", impl, "needs a GPU, and torch sees none", "try auto or reference")]
    if impl is KernelImpl.reference or (impl is KernelImpl.auto and not machine.has_gpu):
        return []
    found = []
    if config.precision.name is PrecisionName.fp32:
        rule = "is not a format of the GPU kernels"
        advice = "try precision=bf16 or attention.impl=reference"
        found.append(Problem("precision.name", config.precision.name, rule, advice, ("attention.impl",)))
    if head_dim % 8 or not 16 <= head_dim <= 128:
        rule = "is not a multiple of 8 from 16 to 128, as the GPU kernels need"
        near = nearest(min(head_dim, 128), range(16, 129, 8))
        advice = f"try {join([*near, 'attention.impl=reference'])}"
        found.append(Problem("model.head_dim", head_dim, rule, advice, ("attention.impl",)))
    heads, kv_heads = config.model.num_attention_heads, config.model.num_kv_heads
    if heads > MOST_HEADS_A_GROUP * kv_heads:
        rule = f"gives each kv head more than {MOST_HEADS_A_GROUP} of model.num_attention_heads={heads}, the most that the GPU kernels take"
        fewest = next((d for d in divisors(heads) if heads <= MOST_HEADS_A_GROUP * d), heads)
        advice = f"try {fewest} or attention.impl=reference"
        reads = ("model.num_attention_heads", "attention.impl")
        found.append(Problem("model.num_kv_heads", kv_heads, rule, advice, reads))
    return found


def _lacking(machine: Machine) -> str:
    """What Transformer Engine's layers lack on a machine, in words; empty when nothing is known to lack."""
    if machine.has_gpu is False:
        return "a GPU, and torch sees none"
    return "Transformer Engine, which is not installed" if machine.has_transformer_engine is False else ""


def _layer_spec(config: Config, machine: Machine) -> list[Problem]:
    """Transformer Engine's layers where they are asked for."""
    spec, lacks = config.engine.layer_spec, _lacking(machine)
    if spec is not LayerSpec.transformer_engine or not lacks:
        return []
    return [Problem("engine.layer_spec", spec, f"needs {lacks}", "try auto or local")]


def _overlap_tp(config: Config, machine: Machine) -> list[Problem]:
    """Tensor-parallel communication beside the matrix products."""
    engine, parallel = config.engine, config.parallel
    if not engine.overlap_tp:
        return []
    advice, reads = "try engine.overlap_tp=false", ("parallel.tp", "parallel.sequence_parallel", "engine.layer_spec")
    rule = ""
    if parallel.tp == 1 or not parallel.sequence_parallel:
        rule = "needs parallel.tp above 1 and parallel.sequence_parallel=true: it splits their gathers and scatters"
    elif engine.layer_spec is LayerSpec.local:
        rule = "is Transformer Engine's, not engine.layer_spec=local's"
    elif lacks := _lacking(machine):
        rule = f"needs {lacks}"
    elif engine.layer_spec is LayerSpec.auto and config.precision.name is PrecisionName.fp32:
        rule = "is Transformer Engine's, and precision=fp32 runs without it (it multiplies fp32 in TF32)"
    return [Problem("engine.overlap_tp", True, rule, advice, reads)] if rule else []


def _fp8(config: Config, machine: Machine) -> list[Problem]:
    """FP8 runs in Transformer Engine's linear layers, whose matrices on a rank must be multiples of 16 both ways."""
    model, tp, name = config.model, config.parallel.tp, config.precision.name
    if name is not PrecisionName.fp8 or tp < 1:
        return []
    if lacks := _lacking(machine):
        return [Problem("precision.name", name, f"needs {lacks}", "try precision=bf16")]
    if config.engine.layer_spec is LayerSpec.local:
        rule = "runs in Transformer Engine's layers, not in engine.layer_spec=local"
        return [Problem("precision.name", name, rule, "try engine.layer_spec=auto", ("engine.layer_spec",))]
    gate = model.num_attention_heads if config.attention.gate else 0
    qkv = (model.num_attention_heads + 2 * model.num_kv_heads) * model.head_dim + gate
    tokens = config.training.micro_batch_size * config.data.sequence_length // max(1, config.parallel.cp)
    widths = {
        "model.hidden_size": (model.hidden_size, model.hidden_size),
        "model.ffn_hidden_size": (model.ffn_hidden_size, model.ffn_hidden_size // tp),
        "model.head_dim": (model.head_dim, qkv // tp),
        "training.micro_batch_size": (config.training.micro_batch_size, tokens),
    }
    rule = f"makes a matrix of {{}} on a rank, and precision=fp8 needs a multiple of {FP8_MULTIPLE}"
    reads = ("parallel.tp", "parallel.cp", "data.sequence_length", "model.num_attention_heads", "model.num_kv_heads")
    wrong = {key: pair for key, pair in widths.items() if pair[1] % FP8_MULTIPLE}
    return [
        Problem(key, value, rule.format(width), "try precision=bf16", reads) for key, (value, width) in wrong.items()
    ]


def _wandb(config: Config, machine: Machine) -> list[Problem]:
    """W&B's client, which only a tracked run needs."""
    mode = config.logging.wandb.mode
    if machine.has_wandb is not False or mode is WandbMode.off:
        return []
    rule, advice = "needs the package wandb, which is not installed", "try pip install wandb, or logging.wandb.mode=off"
    return [Problem("logging.wandb.mode", mode, rule, advice)]


def _launcher(config: Config, machine: Machine) -> list[Problem]:
    """Tasks of srun that nothing joins into one run."""
    if machine.slurm_tasks < 2:
        return []
    rule = "says that Slurm started as many processes, and nothing joins them (WORLD_SIZE is not set): each would train alone"
    advice = "try srun --ntasks-per-node=1 launchers/torchrun.sh …, or srun --ntasks=1 for one process"
    return [Problem("SLURM_NTASKS", machine.slurm_tasks, rule, advice)]


def _output_dir(config: Config, machine: Machine) -> list[Problem]:
    """The folder that a run writes: it can be written, and no other run holds it."""
    if not config.output_dir.strip():
        return []
    if reason := unwritable(Path(config.output_dir)):
        return [Problem("output_dir", config.output_dir, reason, ELSEWHERE)]
    try:
        if machine.claims_folder:
            require_free(Path(config.output_dir))
    except ConfigError as error:
        return list(error.problems)
    return []


def _initial_weights(config: Config) -> list[Problem]:
    """The checkpoint whose weights a run starts from."""
    folder, output_dir = config.checkpoint.init_from, Path(config.output_dir).resolve()
    if not folder:
        return []
    if not Path(folder).is_dir():
        advice = "give an earlier run's folder, a checkpoint's or one of common weights"
        return [Problem("checkpoint.init_from", folder, "does not exist", advice)]
    if output_dir in (Path(folder).resolve(), *Path(folder).resolve().parents):
        rule = f"lies in this run's own output_dir={config.output_dir}"
        advice = "leave it out: the same command again resumes"
        return [Problem("checkpoint.init_from", folder, rule, advice, ("output_dir",))]
    return []


def _data(config: Config, splits: Collection[str]) -> list[Problem]:
    """The prepared data: a readable manifest, a vocabulary that fits, known sources, enough tokens in each of the splits that are read."""
    path, length = config.data.path, config.data.sequence_length
    try:
        manifest = load_manifest(path)
    except ValueError as error:
        return [Problem("data.path", path, f"is not usable: {error}", exit_code=4)]
    found, vocab = [], manifest.tokenizer.vocab_size
    if 0 < config.model.vocab_size < vocab:
        rule, advice = f"is smaller than the {vocab} ids of {path}'s tokenizer", f"try 0 (the tokenizer's) or {vocab}"
        found.append(Problem("model.vocab_size", config.model.vocab_size, rule, advice))
    for split in splits:
        if not manifest.splits[split]:
            advice = f"choose another, or prepare it with split.heldout_fraction {'below 1' if split == 'train' else 'above 0'}"
            return [*found, Problem("data.path", path, f"has no {split} documents", advice, exit_code=4)]
    if "train" not in splits:
        return found
    tokens: dict[str, int] = {}
    for shard in manifest.splits["train"]:
        tokens[shard.part] = tokens.get(shard.part, 0) + shard.tokens
    for name in sorted(set(config.data.weights) - set(tokens)):
        advice = f"its sources are {join(tokens, 'and')}"
        found.append(Problem(f"data.weights.{name}", config.data.weights[name], f"names no source of {path}", advice))
    name, fewest = min(tokens.items(), key=lambda item: item[1])
    if fewest < least_tokens(length):
        rule = f"needs {least_tokens(length)} tokens of each source, and {name} (train) in {path} has {fewest}"
        block = max(1, config.attention.block_size)
        longest = (fewest - 1) // 2 // block * block
        advice = f"prepare more text, or try {longest}" if longest else "prepare more text"
        found.append(Problem("data.sequence_length", length, rule, advice))
    return found
