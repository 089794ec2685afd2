"""The section `deepspeed` of the configuration: what engine=deepspeed takes besides the settings that both engines share.

Batch sizes, clipping, precision, learning rates, the overlap of the gradients' reduction (engine.overlap_grad_reduce) and recomputation come from
their own sections; ds_config.py turns all of it into DeepSpeed's dictionary.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ssa_pretrain.problems import Problem, above_zero, at_least


class AdamImpl(StrEnum):
    """Whose AdamW steps."""

    torch = "torch"  # torch's fused one, on a GPU and on a CPU; nothing is compiled
    deepspeed = "deepspeed"  # FusedAdam, or CPUAdam under offload: compiled on first use, which takes minutes


@dataclass(kw_only=True, slots=True)
class DeepSpeedConfig:
    """DeepSpeed's own choices."""

    zero_stage: int = 1  # 0: nothing is sharded over dp, 1: optimizer states, 2: and gradients, 3: and weights
    offload_optimizer: bool = False  # optimizer states and step on the CPU, as the paper trained (stages 1, 2, 3)
    adam: AdamImpl = AdamImpl.torch
    contiguous_gradients: bool = True  # copy gradients into one buffer as they come
    reduce_bucket_size: int = 500_000_000  # numbers reduced at a time
    allgather_bucket_size: int = 500_000_000  # numbers gathered at a time
    flops_profiler_step: int = 0  # step whose forward DeepSpeed profiles into output_dir/flops_profile.txt; 0: none
    extra: dict[str, Any] = field(default_factory=dict)  # further keys of DeepSpeed's configuration, as it spells them

    def problems(self) -> list[Problem]:
        """Returns what is wrong with this section alone."""
        found = at_least("deepspeed", self, 0, "flops_profiler_step")
        found += above_zero("deepspeed", self, "reduce_bucket_size", "allgather_bucket_size")
        if self.zero_stage not in (0, 1, 2, 3):
            advice = f"try {min(3, max(0, self.zero_stage))}"
            found.append(Problem("deepspeed.zero_stage", self.zero_stage, "must be 0, 1, 2 or 3", advice))
        if self.offload_optimizer and self.zero_stage == 0:
            rule = "moves what a ZeRO stage shards, and deepspeed.zero_stage=0 shards nothing"
            reads = ("deepspeed.zero_stage",)
            found.append(Problem("deepspeed.offload_optimizer", True, rule, "try deepspeed.zero_stage=2", reads))
        return found
