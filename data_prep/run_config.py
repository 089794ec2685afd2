"""The settings of how much is made, in what shape, and where the work runs: on_error, mix, packing, merge, executor, stats.

The others are in config.py.
"""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from ssa_pretrain.settings.problems import Problem, above_zero, at_least


class OnError(Enum):
    """What happens to lines, rows and files that cannot be read as text."""

    fail = "fail"  # the run ends and names all such files
    skip = "skip"  # they are skipped and counted


class Packing(Enum):
    """How training packs documents into rows."""

    megatron = "megatron"  # documents continue in the next row, so every row is full
    official_row = "official_row"  # one sequence of one document per row, padded, as in SSA's published code


@dataclass(kw_only=True, slots=True)
class PackingConfig:
    """What a sequence of the .bin file is."""

    kind: Packing = Packing.megatron
    row_tokens: int = 8192  # official_row: longest sequence; longer documents are cut, and each piece ends in EOS

    def problems(self) -> list[Problem]:
        """Returns what is wrong with the values."""
        return at_least("packing", self, 16, "row_tokens")


@dataclass(kw_only=True, slots=True)
class MixConfig:
    """Each part's share of the tokens, and how many tokens are made."""

    weights: dict[str, float] = field(default_factory=dict)  # by part; empty: proportional to the text
    target_tokens: float = 0.0  # tokens of the train split, over all parts; 0 makes all of them
    missing: str = "refuse"  # what happens if a part has a weight and no text: refuse, or drop (the other shares grow)
    seed: int = 0  # which shards a budget takes

    def problems(self) -> list[Problem]:
        """Returns what is wrong with the values."""
        found = at_least("mix", self, 0, "target_tokens")
        bad = {f"mix.weights.{name}": weight for name, weight in self.weights.items() if weight <= 0}
        advice = "leave the part out to give it none"
        found += [Problem(key, weight, "must be above 0", advice) for key, weight in bad.items()]
        if self.missing not in ("refuse", "drop"):
            found.append(Problem("mix.missing", self.missing, "must be refuse or drop", "try refuse"))
        return found


@dataclass(kw_only=True, slots=True)
class MergeConfig:
    """How many files the finished dataset has."""

    files: int = 32  # maximum .bin/.idx pairs per part and split; shards are joined to get there
    keep_shards: bool = False  # keep the joined shards: twice the disk space, but changing `files` later is cheap

    def problems(self) -> list[Problem]:
        """Returns what is wrong with the values."""
        return at_least("merge", self, 1, "files")


@dataclass(kw_only=True, slots=True)
class LocalExecutor:
    """Processes of this machine."""

    kind: str = "local"  # the kind of executor, set by executor=

    def problems(self) -> list[Problem]:
        """Returns what is wrong with the values."""
        return []


@dataclass(kw_only=True, slots=True)
class SlurmExecutor:
    """A Slurm job array, by datatrove; `out` and the environment must be on a disk that all nodes share."""

    kind: str = "slurm"  # the kind of executor, set by executor=
    partition: str = MISSING  # Slurm partition of the jobs
    tasks: int = 16  # jobs of the array; each makes an equal share of the shards
    cpus_per_task: int = 1  # processes of one job
    mem_per_cpu_gb: int = 2  # GB of memory per process
    time: str = "12:00:00"  # time limit of a job
    qos: str = ""  # "" requests none
    wait: bool = True  # false returns once the jobs are queued; run the same command again to continue
    sbatch: dict[str, str] = field(default_factory=dict)  # further sbatch arguments, such as {account: x}

    def problems(self) -> list[Problem]:
        """Returns what is wrong with the values."""
        return above_zero("executor", self, "tasks", "cpus_per_task", "mem_per_cpu_gb")


@dataclass(kw_only=True, slots=True)
class RayExecutor:
    """Ray tasks, by datatrove; `out` and the environment must be on a disk that all nodes share."""

    kind: str = "ray"  # the kind of executor, set by executor=
    address: str = ""  # address of a running cluster; "" starts one on this machine
    tasks: int = 16  # each makes an equal share of the shards
    workers: int = 0  # concurrent tasks; 0: one per core
    cpus_per_task: int = 1  # processes of one task
    mem_per_cpu_gb: float = 1.0  # GB of memory per process

    def problems(self) -> list[Problem]:
        """Returns what is wrong with the values."""
        found = above_zero("executor", self, "tasks", "cpus_per_task", "mem_per_cpu_gb")
        return found + at_least("executor", self, 0, "workers")


@dataclass(kw_only=True, slots=True)
class StatsConfig:
    """The row length, budget and hardware that the statistics assume."""

    sequence_length: int = 8192  # tokens per row, for the fill of rows
    budget_tokens: float = 100e9  # tokens of a training run, for the epochs of each part and the cost of making them
    cores_per_node: int = 64  # cores per node, for that cost
    disk_mb_per_s: float = 1000.0  # read rate of a node in MB/s, which limits it once there are enough cores

    def problems(self) -> list[Problem]:
        """Returns what is wrong with the values."""
        found = above_zero("stats", self, "budget_tokens", "cores_per_node", "disk_mb_per_s")
        return found + at_least("stats", self, 2, "sequence_length")
