"""The settings that say how much is made, in what shape, and where: on_error, mix, packing, merge, executor, stats.

What the text is and how it becomes ids is in data_prep/config.py, which gathers all of them.
"""

import math
from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING


class OnError(Enum):
    """What becomes of lines, rows and files that cannot be read as text."""

    fail = "fail"  # the run ends, and names all files that have some
    skip = "skip"  # they are left out and counted


class Packing(Enum):
    """How training makes rows of documents."""

    megatron = "megatron"  # documents flow over rows: a row is full
    official_row = "official_row"  # one sequence of one document a row, padded, as SSA's published code does


@dataclass(kw_only=True, slots=True)
class PackingConfig:
    """What a sequence of the .bin file is."""

    kind: Packing = Packing.megatron
    row_tokens: int = (
        8192  # official_row: longest sequence, EOS included; longer documents are cut, each part with an EOS
    )

    def problems(self) -> list[str]:
        """Returns what is wrong with the values, one sentence each."""
        if self.row_tokens < 16:
            return [f"packing.row_tokens={self.row_tokens} must be at least 16; try 8192"]
        return []


@dataclass(kw_only=True, slots=True)
class MixConfig:
    """Which share of the tokens each part of the corpus has, and how many tokens are made."""

    weights: dict[str, float] = field(default_factory=dict)  # by part; empty: in proportion to the text
    target_tokens: float = 0.0  # tokens of the train split to make, over all parts; 0 makes all there is
    missing: str = "refuse"  # a part that has a weight and no text: refuse, or drop (the others' shares grow)
    seed: int = 0  # which shards are taken for a budget

    def problems(self) -> list[str]:
        """Returns what is wrong with the values, one sentence each."""
        found = []
        if bad := [name for name, weight in self.weights.items() if not 0 < weight < math.inf]:
            found.append(f"mix.weights of {', '.join(bad)} must be positive; leave a part out to give it none")
        if not 0 <= self.target_tokens < math.inf:
            found.append(f"mix.target_tokens={self.target_tokens:g} must be a number from 0; try 100e9, or 0 for all")
        if self.missing not in ("refuse", "drop"):
            found.append(f"mix.missing={self.missing} must be refuse or drop; try refuse")
        return found


@dataclass(kw_only=True, slots=True)
class MergeConfig:
    """How many files the finished dataset has."""

    files: int = 32  # most .bin/.idx pairs a part and split; shards are joined until they are so few
    keep_shards: bool = False  # keep the shards that were joined: twice the disk, but another number of files is cheap

    def problems(self) -> list[str]:
        """Returns what is wrong with the values, one sentence each."""
        return [] if self.files >= 1 else [f"merge.files={self.files} must be at least 1; try 32"]


@dataclass(kw_only=True, slots=True)
class LocalExecutor:
    """Processes of this machine."""

    kind: str = "local"  # the executor that was chosen, by executor=

    def problems(self) -> list[str]:
        """Returns what is wrong with the values, one sentence each."""
        return []


@dataclass(kw_only=True, slots=True)
class SlurmExecutor:
    """A Slurm job array, by datatrove; `out` and the environment must be on a disk that all nodes share."""

    kind: str = "slurm"  # the executor that was chosen, by executor=
    partition: str = MISSING  # Slurm partition of the jobs
    tasks: int = 16  # jobs of the array; each takes an equal part of the shards
    cpus_per_task: int = 1  # processes of one job
    mem_per_cpu_gb: int = 2  # GB of memory per process
    time: str = "12:00:00"  # limit of a job
    qos: str = ""  # "" asks for none
    wait: bool = True  # false returns once the jobs are queued; run the same command again to go on
    sbatch: dict[str, str] = field(default_factory=dict)  # further arguments, such as {account: x}

    def problems(self) -> list[str]:
        """Returns what is wrong with the values, one sentence each."""
        return _positive("executor", self, "tasks", "cpus_per_task", "mem_per_cpu_gb")


@dataclass(kw_only=True, slots=True)
class RayExecutor:
    """Ray tasks, by datatrove; `out` and the environment must be on a disk that all nodes share."""

    kind: str = "ray"  # the executor that was chosen, by executor=
    address: str = ""  # of a running cluster; "" starts one on this machine
    tasks: int = 16  # each takes an equal part of the shards
    workers: int = 0  # tasks at a time; 0: as many as there are cores
    cpus_per_task: int = 1  # processes of one task
    mem_per_cpu_gb: float = 1.0  # GB of memory per process

    def problems(self) -> list[str]:
        """Returns what is wrong with the values, one sentence each."""
        found = _positive("executor", self, "tasks", "cpus_per_task", "mem_per_cpu_gb")
        if self.workers < 0:
            found.append(f"executor.workers={self.workers} must not be negative; try 0 for one a core")
        return found


@dataclass(kw_only=True, slots=True)
class StatsConfig:
    """What the statistics compare the dataset with."""

    sequence_length: int = 8192  # rows whose fill is reported
    budget_tokens: float = 100e9  # a training run of so many tokens: epochs of each part, and the cost of making them
    cores_per_node: int = 64  # cores of one node, for the cost of making so many tokens
    disk_mb_per_s: float = 1000.0  # read rate of a node, which bounds the time where cores do not

    def problems(self) -> list[str]:
        """Returns what is wrong with the values, one sentence each."""
        found = _positive("stats", self, "budget_tokens", "cores_per_node", "disk_mb_per_s")
        if self.sequence_length < 2:
            found.append(f"stats.sequence_length={self.sequence_length} must be at least 2; try 8192")
        return found


def _positive(section: str, values: object, *names: str) -> list[str]:
    wrong = [(name, getattr(values, name)) for name in names if not 0 < getattr(values, name) < math.inf]
    return [f"{section}.{name}={value} must be positive; try 1 or more" for name, value in wrong]
