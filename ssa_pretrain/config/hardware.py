"""The configuration of a plan: that of a run, and the cluster that it is planned for.

`python -m ssa_pretrain.plan` reads it; a run never does, so nothing here is saved with one. The defaults are an H100's; conf/hardware/ has one file per
GPU, with the source of each number. The rules that need the cluster are here as well. Standard library only.
"""

from dataclasses import dataclass, field

from ssa_pretrain.config.choices import Auto
from ssa_pretrain.config.schema import Config
from ssa_pretrain.settings.problems import Problem, above_zero, at_least, join, nearest_multiples


@dataclass(kw_only=True, slots=True)
class HardwareConfig:
    """A GPU, its node and its network. Bandwidths are per GPU and direction, in units of 10^9 bytes."""

    name: str = "h100"  # name in the plan
    gpu: str = "NVIDIA H100 80GB HBM3"  # name that the driver reports
    memory_gib: float = 79.6  # GiB of memory that the driver reports
    bf16_tflops: float = 989.4  # peak of dense bf16 products, TFLOP/s
    fp8_tflops: float = 1978.9  # peak of dense FP8 products, TFLOP/s; 0: the GPU has none
    hbm_tb_per_s: float = 3.35  # bandwidth of its memory, TB/s
    gpus_per_node: int = 8  # GPUs per node
    nvlink_gpus: int = 8  # GPUs that NVLink joins; more than a node's in an NVL72 rack
    nvlink_gb_per_s: float = 450.0  # NVLink, GB/s
    network_gb_per_s: float = 50.0  # network between nodes, GB/s
    storage_gb_per_s: float = 10.0  # writing a checkpoint from all nodes together, GB/s
    host_copy_gb_per_s: float = 20.0  # copying a GPU's part of a checkpoint to its host, GB/s
    host_speed: float = (
        1.0  # speed at which a host's core launches kernels, over that of the measured host (docs/planning.md)
    )
    restart_minutes: float = 10.0  # from a failure until training continues from the newest checkpoint
    price_per_gpu_hour: float = 3.0  # price of a GPU and its share of the node, in USD per hour

    def problems(self) -> list[Problem]:
        """Returns the problems within this section."""
        found = at_least("hardware", self, 1, "gpus_per_node", "nvlink_gpus")
        found += above_zero("hardware", self, "memory_gib", "bf16_tflops", "hbm_tb_per_s", "nvlink_gb_per_s")
        found += above_zero(
            "hardware", self, "network_gb_per_s", "storage_gb_per_s", "host_copy_gb_per_s", "host_speed"
        )
        return found + at_least("hardware", self, 0, "fp8_tflops", "restart_minutes", "price_per_gpu_hour")


@dataclass(kw_only=True, slots=True)
class PlanConfig(Config):
    """A training run, and the cluster that it is planned for."""

    nodes: int = 0  # nodes of the cluster, all of whose GPUs train; 0: parallel.world_size GPUs
    document_tokens: int | Auto = (
        Auto.auto
    )  # mean tokens per document; auto: of the data if it is prepared, else 0; 0: one document per row
    hardware: HardwareConfig = field(default_factory=HardwareConfig)

    def problems(self) -> list[Problem]:
        """Returns the problems within each section, and those of the cluster's size."""
        # Not super(): dataclasses with slots are created twice, and super() would mean the first.
        counted = ["nodes"] if isinstance(self.document_tokens, Auto) else ["nodes", "document_tokens"]
        found = Config.problems(self) + self.hardware.problems() + at_least("", self, 0, *counted)
        return found + self._nodes()

    def num_gpus(self) -> int:
        """Returns the GPUs that the plan is for, 0 if neither `nodes` nor `parallel.world_size` gives a number."""
        return self.nodes * self.hardware.gpus_per_node or self.parallel.world_size

    def _nodes(self) -> list[Problem]:
        """Returns the problems of `nodes`: it agrees with parallel.world_size, and the layout fits its GPUs."""
        parallel, per_node = self.parallel, self.hardware.gpus_per_node
        if min(self.nodes, per_node, parallel.tp, parallel.pp, parallel.cp) < 1:
            return []
        gpus = self.nodes * per_node
        reads = ("hardware.gpus_per_node", "parallel.world_size", "parallel.tp", "parallel.pp", "parallel.cp")
        if parallel.world_size not in (0, gpus):
            rule = f"has {gpus} GPUs (hardware.gpus_per_node={per_node}), but parallel.world_size={parallel.world_size}"
            return [Problem("nodes", self.nodes, rule, "leave one of them out", reads)]
        unit = parallel.tp * parallel.pp * parallel.cp
        if gpus % unit == 0:
            return []
        rule = f"has {gpus} GPUs, which must be a multiple of tp * pp * cp = {parallel.tp} * {parallel.pp} * {parallel.cp} = {unit}"
        fitting = [count for count in range(1, 4097) if count * per_node % unit == 0]
        if not fitting:
            return [
                Problem(
                    "nodes", self.nodes, rule, f"try parallel.world_size={nearest_multiples(gpus, unit)[-1]}", reads
                )
            ]
        return [Problem("nodes", self.nodes, rule, f"try {join(nearest_multiples(self.nodes, fitting[0]))}", reads)]
