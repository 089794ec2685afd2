"""The same run on more GPUs: a curve to 2,048, far past the machines that were measured.

Two questions have two curves. *The batch as it is* (strong scaling): how fast can this run become? Each number of GPUs gets its fastest layout that fits
(search.py). The batch has a certain number of rows, so beyond it the ranks have to share rows or layers, and communication takes over. *The batch grows
with the machine* (weak scaling): how well does the layout scale by itself? Tokens per GPU and step stay as in the configuration. Another batch is another
training run: the second curve is about the machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ssa_pretrain.config.hardware import PlanConfig
from ssa_pretrain.planning.calibration import Calibration
from ssa_pretrain.planning.estimate import Estimate
from ssa_pretrain.planning.search import Choices, all_choices, search, zero_stage

MOST_GPUS = 2048


@dataclass(frozen=True, slots=True)
class Point:
    """One number of GPUs.

    Attributes:
        gpus: their number.
        estimate: the costs; None if no layout fits the batch, the rules or the memory.
    """

    gpus: int
    estimate: Estimate | None


def gpu_counts(config: PlanConfig) -> list[int]:
    """Returns the numbers of GPUs of a curve: a node, doubled until MOST_GPUS."""
    counts, count = [], config.hardware.gpus_per_node
    while count <= MOST_GPUS:
        counts.append(count)
        count *= 2
    return counts


def strong_curve(config: PlanConfig, fitted: Calibration, vocab_size: int | None = None) -> list[Point]:
    """Returns the fastest layout of the run at each number of GPUs, with its batch."""
    choices = _choices(config)
    found = []
    for gpus in gpu_counts(config):
        ranked = search(_sized(config, gpus), gpus, fitted, choices, vocab_size).ranked
        found.append(Point(gpus, ranked[0] if ranked else None))
    return found


def weak_curve(config: PlanConfig, fitted: Calibration, vocab_size: int | None = None) -> list[Point]:
    """Returns the run with its own layout at each number of GPUs, with a batch in proportion to them: the configuration's is that of its own number."""
    own, choices = config.num_gpus() or config.hardware.gpus_per_node, _own(config)
    found = []
    for gpus in gpu_counts(config):
        tokens, rest = divmod(config.training.global_batch_tokens * gpus, own)
        changes = [
            replace(c, global_batch_tokens=c.global_batch_tokens * gpus // own) for c in config.training.batch_steps
        ]
        batch = {"global_batch_tokens": tokens, "batch_steps": changes}
        grown = replace(config, training=replace(config.training, **batch))
        ranked = [] if rest else search(_sized(grown, gpus), gpus, fitted, choices, vocab_size).ranked
        found.append(Point(gpus, ranked[0] if ranked else None))
    return found


def efficiency(point: Point, points: Sequence[Point]) -> float | None:
    """Returns tokens per second and GPU over those of the first point with an estimate; None without one."""
    first = next((other for other in points if other.estimate is not None), None)
    if point.estimate is None or first is None or first.estimate is None:
        return None
    own, base = (p.estimate.tokens_per_second / p.gpus for p in (point, first) if p.estimate is not None)
    return own / base


def _sized(config: PlanConfig, gpus: int) -> PlanConfig:
    """Returns a configuration for a number of GPUs."""
    return replace(config, nodes=0, parallel=replace(config.parallel, world_size=gpus))


def _choices(config: PlanConfig) -> Choices:
    """Returns what a point of the strong curve tries: every degree, with the run's recomputation and sharding."""
    every = all_choices(config)
    return replace(every, vpp=(1,), recompute=(config.engine.recompute,), zero=(zero_stage(config),))


def _own(config: PlanConfig) -> Choices:
    """Returns the configuration's own layout."""
    parallel = config.parallel
    return Choices(
        tp=(parallel.tp,),
        pp=(parallel.pp,),
        vpp=(parallel.vpp,),
        cp=(parallel.cp,),
        micro_batch_size=(config.training.micro_batch_size,),
        recompute=(config.engine.recompute,),
        zero=(zero_stage(config),),
    )
