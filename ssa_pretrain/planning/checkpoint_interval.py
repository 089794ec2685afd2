"""How often to save: the interval of Young and Daly, sqrt(2 x cost of a save x mean time between failures).

A save costs the time for which it stalls training. A failure costs, on average, half an interval of work. The sum is smallest at that interval. It
holds for a cost far below the time between failures. For an asynchronous save the cost is the stall only, and the interval must be at least as long as
the writing, since the next save waits for it.

The failure rate is the user's, or the one that a study measured on clusters of A100s, where a job of 1,024 GPUs failed every 7.9 hours. It is scaled
by the number of GPUs: the mean time falls as 1 / GPUs. Treat that default as an order of magnitude.

Sources: Young, CACM 17 (1974); Daly, FGCS 22 (2006); Kokolis et al., "Revisiting Reliability in Large-Scale ML Research Clusters", HPCA 2025.
"""

import math
from dataclasses import dataclass

from ssa_pretrain.settings.quantities import duration

GPU_HOURS_BETWEEN_FAILURES = 7.9 * 1024
FIRST_STEPS = 20  # before the first save of a run without measurements, and before the second: the first one's is colder than later ones


@dataclass(frozen=True, slots=True)
class SaveCost:
    """What a save costs.

    Attributes:
        stall_seconds: for which training stood still.
        write_seconds: until the checkpoint was published.
        step_seconds: of a training step.
    """

    stall_seconds: float
    write_seconds: float
    step_seconds: float


def hours_between_failures(configured: float, num_gpus: int) -> float:
    """Returns the mean time between failures of a run, in hours: the configured one, or the default for its number of GPUs if that is 0."""
    return configured or GPU_HOURS_BETWEEN_FAILURES / num_gpus


def best_interval(cost: SaveCost, hours: float) -> int:
    """Returns the number of steps between saves, at least 1.

    Args:
        cost: of a save.
        hours: mean time between failures.
    """
    seconds = math.sqrt(2 * cost.stall_seconds * hours * 3600)
    return max(1, math.ceil(max(seconds, cost.write_seconds) / max(cost.step_seconds, 1e-9)))


def lost_share(cost: SaveCost, hours: float, interval: int) -> float:
    """Returns the expected share of the time that saves and repeated work take, without restarts."""
    seconds = max(interval * cost.step_seconds, 1e-9)
    return cost.stall_seconds / seconds + (seconds / 2 + cost.write_seconds) / (hours * 3600)


def explain(interval: int, cost: SaveCost, hours: float, *, configured: bool, num_gpus: int) -> str:
    """Returns one line with the interval and where it comes from."""
    source = "checkpoint.mean_hours_between_failures" if configured else f"the default for {num_gpus} GPUs"
    return (
        f"checkpoint.interval=auto: a checkpoint every {interval} steps ({duration(interval * cost.step_seconds)}), because a save stalls training "
        f"{cost.stall_seconds:.2g} s, takes {cost.write_seconds:.2g} s, and a failure is expected every {hours:.3g} h ({source}); "
        f"expected loss {lost_share(cost, hours, interval):.2%} of the time"
    )
