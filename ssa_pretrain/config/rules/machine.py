"""Rules of the machine: what kernels, Transformer Engine, trackers and Slurm need from it."""

from ssa_pretrain.config import Config, KernelImpl, LayerSpec, PrecisionName, WandbMode
from ssa_pretrain.config.machine import Machine
from ssa_pretrain.settings.problems import Problem, divisors, join, nearest

MAX_HEAD_DIM = 256  # features per head in the GPU kernels
MAX_GROUP_SIZE = 32  # query heads per kv head in the GPU kernels
FP8_MULTIPLE = 16  # Transformer Engine requires it of both dimensions of an FP8 matrix product


def _kernels(config: Config, machine: Machine) -> list[Problem]:
    """Limits of the GPU kernels. The reference has none."""
    impl, head_dim = config.attention.impl, config.model.head_dim
    if impl is KernelImpl.triton and machine.has_gpu is False:
        return [Problem("attention.impl", impl, "needs a GPU, and torch sees none", "try auto or reference")]
    if impl is KernelImpl.reference or (impl is KernelImpl.auto and not machine.has_gpu):
        return []
    found = []
    if config.precision.name is PrecisionName.fp32:
        rule = "is not supported by the GPU kernels"
        advice = "try precision=bf16 or attention.impl=reference"
        found.append(Problem("precision.name", config.precision.name, rule, advice, ("attention.impl",)))
    if head_dim % 8 or not 16 <= head_dim <= MAX_HEAD_DIM:
        rule = f"must be a multiple of 8 from 16 to {MAX_HEAD_DIM} for the GPU kernels"
        near = nearest(min(head_dim, MAX_HEAD_DIM), range(16, MAX_HEAD_DIM + 1, 8))
        advice = f"try {join([*near, 'attention.impl=reference'])}"
        found.append(Problem("model.head_dim", head_dim, rule, advice, ("attention.impl",)))
    heads, kv_heads = config.model.num_attention_heads, config.model.num_kv_heads
    if heads > MAX_GROUP_SIZE * kv_heads:
        rule = f"puts more than {MAX_GROUP_SIZE} of model.num_attention_heads={heads} on each kv head, the limit of the GPU kernels"
        fewest = next((d for d in divisors(heads) if heads <= MAX_GROUP_SIZE * d), heads)
        advice = f"try {fewest} or attention.impl=reference"
        reads = ("model.num_attention_heads", "attention.impl")
        found.append(Problem("model.num_kv_heads", kv_heads, rule, advice, reads))
    return found


def _layer_spec(config: Config, machine: Machine) -> list[Problem]:
    """Transformer Engine's layers, if chosen, need Transformer Engine and a GPU."""
    spec, missing = config.engine.layer_spec, _missing(machine)
    if spec is not LayerSpec.transformer_engine or not missing:
        return []
    return [Problem("engine.layer_spec", spec, f"needs {missing}", "try auto or local")]


def _fp8(config: Config, machine: Machine) -> list[Problem]:
    """FP8 runs in Transformer Engine's linear layers; both dimensions of each matrix on a rank are multiples of 16."""
    model, tp, name = config.model, config.parallel.tp, config.precision.name
    if name is not PrecisionName.fp8 or tp < 1:
        return []
    if missing := _missing(machine):
        return [Problem("precision.name", name, f"needs {missing}", "try precision=bf16")]
    if config.engine.layer_spec is LayerSpec.local:
        rule = "runs in Transformer Engine's layers, not in engine.layer_spec=local"
        return [Problem("precision.name", name, rule, "try engine.layer_spec=auto", ("engine.layer_spec",))]
    tokens = config.training.micro_batch_size * config.data.sequence_length // max(1, config.parallel.cp)
    widths = {
        "model.hidden_size": (model.hidden_size, model.hidden_size),
        "model.ffn_hidden_size": (model.ffn_hidden_size, model.ffn_hidden_size // tp),
        "model.head_dim": (model.head_dim, model.qkv_width(gate=config.attention.gate) // tp),
        "training.micro_batch_size": (config.training.micro_batch_size, tokens),
    }
    if index_width := model.index_width(config.attention):
        widths["attention.indexer.heads"] = (config.attention.indexer.heads, index_width // tp)
    rule = f"gives a matrix dimension of {{}} on each rank, but precision=fp8 needs a multiple of {FP8_MULTIPLE}"
    reads = ("parallel.tp", "parallel.cp", "data.sequence_length", "model.num_attention_heads", "model.num_kv_heads")
    wrong = {key: pair for key, pair in widths.items() if pair[1] % FP8_MULTIPLE}
    return [
        Problem(key, value, rule.format(width), "try precision=bf16", reads) for key, (value, width) in wrong.items()
    ]


def _overlap_tp(config: Config, machine: Machine) -> list[Problem]:
    """Overlapping tensor-parallel communication needs sequence parallelism and Transformer Engine's layers."""
    engine, parallel = config.engine, config.parallel
    if not engine.overlap_tp:
        return []
    advice, reads = "try engine.overlap_tp=false", ("parallel.tp", "parallel.sequence_parallel", "engine.layer_spec")
    rule = ""
    if parallel.tp == 1 or not parallel.sequence_parallel:
        rule = "needs parallel.tp above 1 and parallel.sequence_parallel=true: it splits their gathers and scatters"
    elif engine.layer_spec is LayerSpec.local:
        rule = "needs Transformer Engine's layers, not engine.layer_spec=local"
    elif missing := _missing(machine):
        rule = f"needs {missing}"
    elif engine.layer_spec is LayerSpec.auto and config.precision.name is PrecisionName.fp32:
        rule = "needs Transformer Engine's layers, but precision=fp32 runs without them (they multiply fp32 in TF32)"
    return [Problem("engine.overlap_tp", True, rule, advice, reads)] if rule else []


def _wandb(config: Config, machine: Machine) -> list[Problem]:
    """Tracking with W&B needs its client."""
    mode = config.logging.wandb.mode
    if machine.has_wandb is not False or mode is WandbMode.off:
        return []
    rule, advice = "needs the package wandb, which is not installed", "try pip install wandb, or logging.wandb.mode=off"
    return [Problem("logging.wandb.mode", mode, rule, advice)]


def _other_trackers(config: Config, machine: Machine) -> list[Problem]:
    """TensorBoard and trackio need their packages."""
    logging, found = config.logging, []
    asked = (("tensorboard", logging.tensorboard.enabled, machine.has_tensorboard),)
    for name, enabled, installed in (*asked, ("trackio", logging.trackio.enabled, machine.has_trackio)):
        if enabled and installed is False:
            rule = f"needs the package {name}, which is not installed"
            advice = f"try pip install {name}, or logging.{name}.enabled=false"
            found.append(Problem(f"logging.{name}.enabled", True, rule, advice))
    return found


def _launcher(_: Config, machine: Machine) -> list[Problem]:
    """Slurm tasks need a launcher that joins them into one run."""
    if machine.slurm_tasks < 2:
        return []
    rule = "means that many separate processes: no launcher joins them (WORLD_SIZE is not set), so each would train on its own"
    advice = "try srun --ntasks-per-node=1 launchers/torchrun.sh …, or srun --ntasks=1 for one process"
    return [Problem("SLURM_NTASKS", machine.slurm_tasks, rule, advice)]


def _missing(machine: Machine) -> str:
    """Returns what Transformer Engine's layers lack on this machine, in words; empty if nothing is known to be missing."""
    if machine.has_gpu is False:
        return "a GPU, and torch sees none"
    return "Transformer Engine, which is not installed" if machine.has_transformer_engine is False else ""


MACHINE_RULES = (_kernels, _layer_spec, _fp8, _overlap_tp, _wandb, _other_trackers, _launcher)
