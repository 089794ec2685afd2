"""The settings of how much is made, in what shape, and where it runs: on_error, mix, packing, merge, executor, stats.

config.py has the rest: what the text is and how it becomes ids.
"""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from ssa_pretrain.settings.problems import Problem, above_zero, at_least


class OnError(Enum):
    """What becomes of lines, rows and files that cannot be read as text."""

    fail = "fail"  # the run ends, and names all files that have some
    skip = "skip"  # they are left out and counted


class Packing(Enum):
    """How training makes rows of documents."""

    megatron = "megatron"  # documents continue over rows: every row is full
    official_row = "official_row"  # one sequence of one document per row, padded, as in SSA's published code


@dataclass(kw_only=True, slots=True)
class PackingConfig:
    """What a sequence of the .bin file is."""

    kind: Packing = Packing.megatron
    row_tokens: int = (
        8192  # official_row: longest sequence, EOS included; longer documents are cut, each part with an EOS
    )

    def problems(self) -> list[Problem]:
        """Returns what is wrong with the values."""
        return at_least("packing", self, 16, "row_tokens")


@dataclass(kw_only=True, slots=True)
class MixConfig:
    """Which share of the tokens each part of the corpus has, and how many tokens are made."""

    weights: dict[str, float] = field(default_factory=dict)  # by part; empty: in proportion to the text
    target_tokens: float = 0.0  # tokens of the train split to make, over all parts; 0 makes all of them
    missing: str = "refuse"  # a part that has a weight and no text: refuse, or drop (the others' shares grow)
    seed: int = 0  # which shards are taken for a budget

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

    files: int = 32  # most .bin/.idx pairs per part and split; shards are joined until there are no more than this
    keep_shards: bool = False  # keep the shards that were joined: twice the disk, but another number of files is cheap

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
    tasks: int = 16  # jobs of the array; each takes an equal part of the shards
    cpus_per_task: int = 1  # processes of one job
    mem_per_cpu_gb: int = 2  # GB of memory per process
    time: str = "12:00:00"  # limit of a job
    qos: str = ""  # "" requests none
    wait: bool = True  # false returns once the jobs are queued; run the same command again to go on
    sbatch: dict[str, str] = field(default_factory=dict)  # further arguments, such as {account: x}

    def problems(self) -> list[Problem]:
        """Returns what is wrong with the values."""
        return above_zero("executor", self, "tasks", "cpus_per_task", "mem_per_cpu_gb")


@dataclass(kw_only=True, slots=True)
class RayExecutor:
    """Ray tasks, by datatrove; `out` and the environment must be on a disk that all nodes share."""

    kind: str = "ray"  # the kind of executor, set by executor=
    address: str = ""  # of a running cluster; "" starts one on this machine
    tasks: int = 16  # each takes an equal part of the shards
    workers: int = 0  # tasks at a time; 0: one per core
    cpus_per_task: int = 1  # processes of one task
    mem_per_cpu_gb: float = 1.0  # GB of memory per process

    def problems(self) -> list[Problem]:
        """Returns what is wrong with the values."""
        found = above_zero("executor", self, "tasks", "cpus_per_task", "mem_per_cpu_gb")
        return found + at_least("executor", self, 0, "workers")


@dataclass(kw_only=True, slots=True)
class StatsConfig:
    """What the statistics compare the dataset with."""

    sequence_length: int = 8192  # rows whose fill is reported
    budget_tokens: float = 100e9  # a training run of this many tokens: epochs of each part, and the cost of making them
    cores_per_node: int = 64  # cores of one node, for the cost of making so many tokens
    disk_mb_per_s: float = 1000.0  # read rate of a node, which bounds the time where cores do not

    def problems(self) -> list[Problem]:
        """Returns what is wrong with the values."""
        found = above_zero("stats", self, "budget_tokens", "cores_per_node", "disk_mb_per_s")
        return found + at_least("stats", self, 2, "sequence_length")
