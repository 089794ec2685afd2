"""Rules of engine=deepspeed: settings that it does not support, and keys that `deepspeed.extra` may set."""

from typing import Any

from ssa_pretrain.config import Config, DeepSpeedConfig, EngineName, PrecisionName
from ssa_pretrain.config.deepspeed import generated, leaves
from ssa_pretrain.config.machine import Machine
from ssa_pretrain.settings.problems import Problem, join, show
from ssa_pretrain.settings.suggestions import closest

TRY_MEGATRON = "try engine=megatron"
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

# Sections of DeepSpeed's configuration that our own settings determine, and the setting to use instead.
OWNED_SECTIONS = {
    "optimizer": "optim.lr and the rest of optim",
    "scheduler": "optim.schedule",
    "fp16": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "bf16": "precision",
    "data_types": "precision.grad_reduce_in_fp32",
    "communication_data_type": "precision.grad_reduce_in_fp32",
    "tensorboard": "logging",
    "wandb": "logging=wandb",
    "csv_monitor": "logging",
    "comet": "logging",
    "tensor_parallel": "parallel.tp",
    "sequence_parallel_size": "parallel.sequence_parallel",
    "pipeline": "parallel.pp",
    "activation_checkpointing": "engine.recompute",
    "flops_profiler": "deepspeed.flops_profiler_step",
    "checkpoint": "checkpoint.interval and the rest of checkpoint",
    "elasticity": "parallel.world_size",
    "autotuning": "the plan (dry_run=true)",
    "curriculum_learning": "data",
    "data_efficiency": "data",
    "managed_gradient_accumulation": "training.global_batch_tokens",
}
# Keys within the other sections that our own settings determine.
OWNED_KEYS = {
    "gradient_clipping": "optim.clip_grad",
    "zero_optimization.stage": "deepspeed.zero_stage",
    "zero_optimization.overlap_comm": "engine.overlap_grad_reduce",
    "zero_optimization.contiguous_gradients": "deepspeed.contiguous_gradients",
    "zero_optimization.reduce_bucket_size": "deepspeed.reduce_bucket_size",
    "zero_optimization.allgather_bucket_size": "deepspeed.allgather_bucket_size",
    "zero_optimization.offload_optimizer.device": "deepspeed.offload_optimizer",
}
# Sections that `deepspeed.extra` may set.
FREE_SECTIONS = (
    "zero_optimization",
    "prescale_gradients",
    "gradient_predivide_factor",
    "comms_logger",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "log_level",
    "aio",
    "python_gc",
)
_MISSING = object()


def _deepspeed(config: Config, machine: Machine) -> list[Problem]:
    """What engine=deepspeed does not support; under another engine, DeepSpeed's settings without effect."""
    if config.engine.name is not EngineName.deepspeed:
        return _without_effect(config)
    found = [_not_installed()] if machine.has_deepspeed is False else []
    trains = "train" in machine.splits  # an evaluation runs on megatron-core
    return found + (_parallel(config) if trains else []) + _precision(config) + _extra(config)


def _not_installed() -> Problem:
    advice = 'try pip install --no-build-isolation -e ".[deepspeed]", or engine=megatron'
    return Problem("engine.name", "deepspeed", "needs DeepSpeed, which is not installed", advice)


def _without_effect(config: Config) -> list[Problem]:
    """Settings of DeepSpeed under another engine."""
    defaults, chosen = DeepSpeedConfig(), config.deepspeed
    names = [name for name in DeepSpeedConfig.__dataclass_fields__ if getattr(chosen, name) != getattr(defaults, name)]
    rule, reads = f"has no effect under engine={config.engine.name}", ("engine.name",)
    return [Problem(f"deepspeed.{name}", getattr(chosen, name), rule, "add engine=deepspeed", reads) for name in names]


def _parallel(config: Config) -> list[Problem]:
    """Unsupported kinds of parallelism. Context parallelism is checked with the layout."""
    found, reads = [], ("engine.name",)
    if config.parallel.pp > 1:
        rule = "is not supported under engine=deepspeed: its pipelines need a model built from its own pipeline classes"
        found.append(Problem("parallel.pp", config.parallel.pp, rule, TRY_MEGATRON, reads))
    if config.engine.overlap_tp:
        rule = "is not supported under engine=deepspeed: it cannot share Transformer Engine's user buffers"
        found.append(Problem("engine.overlap_tp", True, rule, f"{TRY_MEGATRON} or engine.overlap_tp=false", reads))
    return found


def _precision(config: Config) -> list[Problem]:
    """Unsupported number formats."""
    precision, stage = config.precision, config.deepspeed.zero_stage
    if precision.name is PrecisionName.fp8:
        rule = "is not supported under engine=deepspeed, which runs bf16 and fp32"
        return [Problem("precision.name", precision.name, rule, TRY_MEGATRON, ("engine.name",))]
    if precision.name is PrecisionName.bf16 and stage == 0 and precision.grad_reduce_in_fp32:
        rule = "keeps gradients in bf16 under precision=bf16, but precision.grad_reduce_in_fp32=true asks for fp32"
        advice = "try deepspeed.zero_stage=1, or engine=megatron"
        return [Problem("deepspeed.zero_stage", stage, rule, advice, ("precision.name",))]
    return []


def _extra(config: Config) -> list[Problem]:
    """Keys of `deepspeed.extra` that another setting determines or contradicts, or that are not passed on."""
    ours = generated(config, 1)
    found = []
    for path, value in leaves(config.deepspeed.extra):
        key, section = "deepspeed.extra." + ".".join(path), path[0]
        known = _lookup(ours, path)
        if section in BATCH_KEYS:
            advice = "set training.global_batch_tokens and training.micro_batch_size"
            found.append(Problem(key, value, "is computed from the batch", advice))
        elif section in OWNED_SECTIONS and (known is _MISSING or known != value):
            found.append(Problem(key, value, "is set elsewhere", f"set {OWNED_SECTIONS[section]}"))
        elif known is not _MISSING and known != value:
            advice = f"leave it out, or set {OWNED_KEYS.get('.'.join(path), 'the setting that determines it')}"
            found.append(Problem(key, value, f"contradicts this run's {show(known)}", advice))
        elif known is _MISSING and section not in (*ours, *FREE_SECTIONS):
            near = closest(section, [*FREE_SECTIONS, *OWNED_SECTIONS], 1)
            advice = f"did you mean {near[0]}?" if near else f"the choices are {join(FREE_SECTIONS, 'and')}"
            found.append(Problem(key, value, "is not a key that is passed on to DeepSpeed", advice))
    return found


def _lookup(tree: Any, path: tuple[str, ...]) -> Any:
    """Returns the value at a path, the subtree if the path ends early, or _MISSING."""
    for name in path:
        if not isinstance(tree, dict) or name not in tree:
            return _MISSING
        tree = tree[name]
    return tree


DEEPSPEED_RULES = (_deepspeed,)
