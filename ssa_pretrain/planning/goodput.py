"""The share of the time in which a run makes progress that lasts: what saves, failures and restarts leave.

Failures come at a mean rate, and each costs half an interval between saves, the writing of the checkpoint it has to wait for, and a restart. The interval
is the configuration's, or the best one for these costs (Young and Daly, checkpoint_interval.py). That theory adds up small losses; where they are not
small, the share is what is left of the product of the parts. Standard library only.
"""

from dataclasses import dataclass

from ssa_pretrain.config import Auto, Config
from ssa_pretrain.config.hardware import HardwareConfig, PlanConfig
from ssa_pretrain.planning.checkpoint_interval import SaveCost, best_interval, hours_between_failures, lost_share

GIGA = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """What saves and failures cost.

    Attributes:
        cost: of a save.
        interval: steps between saves; 0: only at the end.
        hours: mean time between failures of the whole run.
        lost: share of the time that saves and repeated work take.
        restarting: share of the time that restarts take.
    """

    cost: SaveCost
    interval: int
    hours: float
    lost: float
    restarting: float

    @property
    def share(self) -> float:
        """The share of the time that lasts, above 0."""
        return 1.0 / ((1.0 + self.lost) * (1.0 + self.restarting))


def save_cost(config: Config, hardware: HardwareConfig, size: float, num_gpus: int, step_seconds: float) -> SaveCost:
    """Returns what a save costs.

    Args:
        config: whether saves are asynchronous.
        hardware: the file system, and the GPUs' links to their hosts.
        size: bytes of a checkpoint, the files of all ranks.
        num_gpus: GPUs that share the copying.
        step_seconds: of a training step.
    """
    write = size / (hardware.storage_gb_per_s * GIGA)
    copy = size / num_gpus / (hardware.host_copy_gb_per_s * GIGA)
    stall = copy if config.checkpoint.asynchronous else copy + write
    return SaveCost(stall_seconds=stall, write_seconds=copy + write, step_seconds=step_seconds)


def goodput(config: PlanConfig, size: float, num_gpus: int, step_seconds: float) -> Goodput:
    """Returns what saves and failures cost a run.

    Args:
        config: the checkpoints and the cluster.
        size: bytes of a checkpoint.
        num_gpus: GPUs of the run.
        step_seconds: of a training step.
    """
    hardware, wanted = config.hardware, config.checkpoint.interval
    cost = save_cost(config, hardware, size, num_gpus, step_seconds)
    hours = hours_between_failures(config.checkpoint.mean_hours_between_failures, num_gpus)
    interval = best_interval(cost, hours) if isinstance(wanted, Auto) else wanted
    steps = config.training.num_steps()
    return Goodput(
        cost=cost,
        interval=interval,
        hours=hours,
        lost=lost_share(cost, hours, interval or steps),
        restarting=hardware.restart_minutes / 60 / hours,
    )
