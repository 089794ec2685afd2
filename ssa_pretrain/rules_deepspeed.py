"""Rules of engine=deepspeed: what it cannot do, said before anything is built, with the engine that can."""

from ssa_pretrain.config import Config, EngineName, PrecisionName
from ssa_pretrain.config_deepspeed import DeepSpeedConfig
from ssa_pretrain.ds_config import extra_problems
from ssa_pretrain.problems import Problem

TRY_CORE = "try engine=megatron"


def deepspeed_problems(config: Config, *, installed: bool | None) -> list[Problem]:
    """Returns what stands against engine=deepspeed, or against its settings under another engine.

    Args:
        config: the run.
        installed: DeepSpeed can be imported; None: not known.
    """
    if config.engine.name is not EngineName.deepspeed:
        return _idle(config)
    found = [] if installed is not False else [_not_installed()]
    return found + _parallel(config) + _precision(config) + extra_problems(config)


def _not_installed() -> Problem:
    advice = 'try pip install --no-build-isolation -e ".[deepspeed]", or engine=megatron'
    return Problem("engine.name", "deepspeed", "needs DeepSpeed, which is not installed", advice)


def _idle(config: Config) -> list[Problem]:
    """Settings of DeepSpeed that nobody would read."""
    defaults, chosen = DeepSpeedConfig(), config.deepspeed
    names = [name for name in DeepSpeedConfig.__dataclass_fields__ if getattr(chosen, name) != getattr(defaults, name)]
    rule, reads = f"has no effect under engine={config.engine.name}", ("engine.name",)
    return [Problem(f"deepspeed.{name}", getattr(chosen, name), rule, "add engine=deepspeed", reads) for name in names]


def _parallel(config: Config) -> list[Problem]:
    """Kinds of parallelism that DeepSpeed does not offer for this model; context parallelism's own rule names the engine."""
    found, reads = [], ("engine.name",)
    if config.parallel.pp > 1:
        rule = "is refused under engine=deepspeed, whose pipelines need a model written in its own pipeline classes"
        found.append(Problem("parallel.pp", config.parallel.pp, rule, TRY_CORE, reads))
    if config.engine.overlap_tp:
        rule = "is refused under engine=deepspeed, which does not share Transformer Engine's user buffers"
        found.append(Problem("engine.overlap_tp", True, rule, f"{TRY_CORE} or engine.overlap_tp=false", reads))
    return found


def _precision(config: Config) -> list[Problem]:
    """Number formats."""
    precision, stage = config.precision, config.deepspeed.zero_stage
    if precision.name is PrecisionName.fp8:
        rule = "is refused under engine=deepspeed, which runs bf16 and fp32"
        return [Problem("precision.name", precision.name, rule, TRY_CORE, ("engine.name",))]
    if precision.name is PrecisionName.bf16 and stage == 0 and precision.grad_reduce_in_fp32:
        rule = "keeps gradients in bf16 under precision=bf16, and precision.grad_reduce_in_fp32=true asks for fp32"
        advice = "try deepspeed.zero_stage=1, or engine=megatron"
        return [Problem("deepspeed.zero_stage", stage, rule, advice, ("precision.name",))]
    return []
