"""Ranks the layouts of a run on a cluster by the estimated time of a step, and finds what to change if a run does not fit.

A layout is tensor, pipeline, virtual pipeline and context parallelism, the rows of a microbatch, recomputation, and how far ZeRO shards (0 and 1 on the
configuration's engine, 2 and 3 on DeepSpeed). All that the configuration's rules accept and whose memory fits are estimated. The model, the batch and the number
of GPUs stay as they are. The waiting for drawn streams is simulated only for the fastest, because that takes longest to compute.

It searches no layout that the rules refuse: tp divides the kv heads, a row has two chunks per context rank, and so on.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from ssa_pretrain.config import EngineConfig, EngineName, Recompute
from ssa_pretrain.config.hardware import PlanConfig
from ssa_pretrain.config.machine import Machine
from ssa_pretrain.config.rules import accepts_layout
from ssa_pretrain.planning.calibration import Calibration
from ssa_pretrain.planning.estimate import Estimate
from ssa_pretrain.planning.plan import make_plan
from ssa_pretrain.settings.problems import ConfigError, divisors

LONGEST_PIPELINE, MOST_CHUNKS, MOST_CONTEXT = 16, 4, 64
MICROBATCHES = (1, 2, 4, 8)
STAGES = (0, 1, 2, 3)
SIMULATED = 8  # the fastest layouts, whose waiting for drawn streams is simulated


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """The values that a search tries."""

    tp: Sequence[int]
    pp: Sequence[int]
    vpp: Sequence[int]
    cp: Sequence[int]
    micro_batch_size: Sequence[int]
    recompute: Sequence[Recompute]
    zero: Sequence[int]

    def layouts(self) -> Iterator[tuple[int, int, int, int, int, Recompute, int]]:
        """Yields every combination."""
        degrees = product(self.tp, self.pp, self.vpp, self.cp)
        return (
            (*degree, size, recompute, zero)
            for degree in degrees
            for size in self.micro_batch_size
            for recompute in self.recompute
            for zero in self.zero
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The result of a search.

    Attributes:
        ranked: layouts that fit, the fastest first.
        num_tried: layouts that the rules accept.
        smallest: the layout that needs least memory; None if the rules accept none.
    """

    ranked: Sequence[Estimate]
    num_tried: int
    smallest: Estimate | None


def all_choices(config: PlanConfig) -> Choices:
    """Returns everything that a search tries for a model."""
    model = config.model
    return Choices(
        tp=divisors(model.num_kv_heads),
        pp=[pp for pp in divisors(model.num_layers) if pp <= LONGEST_PIPELINE],
        vpp=[vpp for vpp in divisors(model.num_layers) if vpp <= MOST_CHUNKS],
        cp=[1 << power for power in range(MOST_CONTEXT.bit_length())],
        micro_batch_size=MICROBATCHES,
        recompute=list(Recompute),
        zero=STAGES,
    )


def search(
    config: PlanConfig, world_size: int, fitted: Calibration, choices: Choices, vocab_size: int | None = None
) -> Found:
    """Returns the layouts of a run, the fastest first.

    Args:
        config: the run; its own layout is one of many.
        world_size: GPUs.
        fitted: the cost model.
        choices: what to try.
        vocab_size: the tokenizer's vocabulary, used if model.vocab_size=0.
    """
    tried = list(_accepted(_configs(config, world_size, choices), world_size, fitted, vocab_size))
    fitting = sorted((found for found in tried if found.fits), key=lambda found: found.time_without_waiting)
    fastest = sorted(fitting[:SIMULATED], key=lambda found: found.step.total)
    smallest = min(tried, key=lambda found: found.needed_bytes, default=None)
    return Found(ranked=[*fastest, *fitting[SIMULATED:]], num_tried=len(tried), smallest=smallest)


def smaller(estimate: Estimate, vocab_size: int | None = None) -> list[tuple[str, Estimate]]:
    """Returns single changes of settings after which a run fits, as words of the command line, the fastest first; else pairs of them."""
    config, world = estimate.config, estimate.plan.world_size
    singles = _changes(config)
    for changes in ([[change] for change in singles], list(_pairs(singles))):
        found = []
        for change in changes:
            changed = with_settings(config, [word for part in change for word in part.split()])
            for result in _accepted([changed], world, estimate.fitted, vocab_size):
                if result.fits:
                    found.append((" ".join(change), result))
        if found:
            return sorted(found, key=lambda pair: pair[1].step.total)
    return []


def with_settings(config: PlanConfig, words: Iterable[str]) -> PlanConfig:
    """Returns a configuration with other settings of its sections; values are those of `settings_of`."""
    for word in words:
        key, _, text = word.partition("=")
        section, _, name = key.partition(".")
        part = getattr(config, section)
        old = getattr(part, name)
        value = text == "true" if isinstance(old, bool) else type(old)(text)
        config = replace(config, **{section: replace(part, **{name: value})})
    return config


def settings_of(config: PlanConfig) -> list[str]:
    """Returns a layout as words of the command line."""
    parallel, engine = config.parallel, config.engine
    words = [f"parallel.{name}={getattr(parallel, name)}" for name in ("tp", "pp", "vpp", "cp")]
    words += [f"parallel.sequence_parallel={str(parallel.sequence_parallel).lower()}"]
    words += [f"training.micro_batch_size={config.training.micro_batch_size}", f"engine.recompute={engine.recompute}"]
    if engine.name is EngineName.deepspeed:
        return [*words, "engine=deepspeed", f"deepspeed.zero_stage={config.deepspeed.zero_stage}"]
    sharded = str(engine.distributed_optimizer).lower()
    overlap = [] if engine.distributed_optimizer else ["engine.overlap_param_gather=false"]
    return [*words, f"engine.distributed_optimizer={sharded}", *overlap]


def zero_stage(config: PlanConfig) -> int:
    """Returns how far a configuration shards, as a ZeRO stage."""
    deepspeed = config.engine.name is EngineName.deepspeed
    return config.deepspeed.zero_stage if deepspeed else int(config.engine.distributed_optimizer)


def _configs(config: PlanConfig, world_size: int, choices: Choices) -> Iterator[PlanConfig]:
    """Yields the configurations of the layouts whose degrees divide what they must; the rules check the rest."""
    rows = config.training.global_batch_tokens // config.data.sequence_length
    for tp, pp, vpp, cp, size, recompute, zero in choices.layouts():
        unit = tp * pp * cp
        if world_size % unit or config.model.num_layers % (pp * vpp) or rows % (world_size // unit * size):
            continue
        if (vpp > 1 and pp == 1) or (zero > 1 and unit > tp):
            continue
        yield replace(
            config,
            parallel=replace(config.parallel, tp=tp, pp=pp, vpp=vpp, cp=cp, sequence_parallel=tp > 1),
            training=replace(config.training, micro_batch_size=size),
            engine=_engine(config, recompute, zero),
            deepspeed=replace(config.deepspeed, zero_stage=zero),
        )


def _engine(config: PlanConfig, recompute: Recompute, zero: int) -> EngineConfig:
    """Returns the section engine of a layout. Stages 0 and 1 stay on the configuration's engine, 2 and 3 are DeepSpeed's."""
    name = EngineName.deepspeed if zero > 1 else config.engine.name
    on_core = name is EngineName.megatron
    sharded = zero == 1 and on_core
    return replace(
        config.engine,
        name=name,
        recompute=recompute,
        distributed_optimizer=sharded,
        overlap_param_gather=config.engine.overlap_param_gather and sharded,
        overlap_tp=config.engine.overlap_tp and on_core,
    )


def _accepted(
    configs: Iterable[PlanConfig], world_size: int, fitted: Calibration, vocab_size: int | None
) -> Iterator[Estimate]:
    """Yields the estimates of the configurations that all rules accept."""
    machine = Machine(world_size=world_size, has_files=False)
    for config in configs:
        if not accepts_layout(config, machine):
            continue
        try:
            plan = make_plan(config, world_size, vocab_size)
        except ConfigError:
            continue
        yield Estimate(config, plan, fitted)


def _changes(config: PlanConfig) -> list[str]:
    """Returns settings that reduce memory, each as words of the command line."""
    parallel, engine, size = config.parallel, config.engine, config.training.micro_batch_size
    found = []
    if engine.recompute is Recompute.none:
        found.append("engine.recompute=selective")
    if engine.recompute is not Recompute.full:
        found.append("engine.recompute=full")
    if size > 1:
        found += [f"training.micro_batch_size={rows}" for rows in divisors(size)[:-1]]
    if engine.name is EngineName.megatron and not engine.distributed_optimizer:
        found.append("engine.distributed_optimizer=true")
    if engine.name is EngineName.deepspeed:
        found += [f"deepspeed.zero_stage={stage}" for stage in (2, 3) if stage > config.deepspeed.zero_stage]
    found += [f"parallel.tp={tp} parallel.sequence_parallel=true" for tp in (2, 4, 8) if tp > parallel.tp]
    found += [f"parallel.cp={cp}" for cp in (2, 4, 8) if cp > parallel.cp]
    return found + [f"parallel.pp={pp}" for pp in (2, 4, 8) if pp > parallel.pp]


def _pairs(singles: Sequence[str]) -> Iterator[list[str]]:
    """Yields pairs of changes that set different keys."""
    for first, second in product(singles, singles):
        if first < second and first.partition("=")[0] != second.partition("=")[0]:
            yield [first, second]
