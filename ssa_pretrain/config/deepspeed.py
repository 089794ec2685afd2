"""DeepSpeed's configuration: the dictionary generated from a run's `Config`.

Every value that the run's own sections determine is written out, so the printed dictionary is complete. `deepspeed.extra`
adds keys that the project has no setting for (zero_optimization.stage3_prefetch_bucket_size, comms_logger, …). It may
repeat a generated value but never change one: rules/deepspeed.py checks that. Imports neither torch nor DeepSpeed.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssa_pretrain.config import Config, OptimizerName, PrecisionName


def ds_config(config: Config, dp: int) -> dict[str, Any]:
    """Returns DeepSpeed's configuration for a checked `Config` on `dp` data-parallel ranks."""
    merged = generated(config, dp)
    for path, value in leaves(config.deepspeed.extra):
        node = merged
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return merged


def generated(config: Config, dp: int) -> dict[str, Any]:
    """Returns the dictionary without `deepspeed.extra`."""
    choices, rows = config.deepspeed, max(1, config.training.micro_batch_size)
    steps = max(1, config.training.global_batch_tokens // (max(1, config.data.sequence_length) * rows * dp))
    low = config.precision.name is not PrecisionName.fp32
    is_muon = config.optim.name is OptimizerName.muon
    grads = "fp32" if config.precision.grad_reduce_in_fp32 or not low else "bf16"
    zero: dict[str, Any] = {
        "stage": choices.zero_stage,
        "overlap_comm": config.engine.overlap_grad_reduce,
        "contiguous_gradients": choices.contiguous_gradients,
        "reduce_scatter": True,
        "reduce_bucket_size": choices.reduce_bucket_size,
        "allgather_bucket_size": choices.allgather_bucket_size,
    }
    if choices.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_batch_size": rows * steps * dp,
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": steps,
        "gradient_clipping": config.optim.clip_grad,
        "bf16": {"enabled": low},
        "data_types": {"grad_accum_dtype": grads},
        "communication_data_type": grads,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": is_muon,  # tests/distributed/test_optimizers.py
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW steps on the CPU as well
        "flops_profiler": {
            "enabled": choices.flops_profiler_step > 0,
            "profile_step": choices.flops_profiler_step,
            "detailed": True,
            "output_file": str(Path(config.output_dir) / "flops_profile.txt"),
        },
        "tensorboard": {"enabled": False},
        "wandb": {"enabled": False},
        "csv_monitor": {"enabled": False},
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device in every step
        "steps_per_print": None,
    }


def leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields every value of a nested dictionary with its path."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, str(name)))
        else:
            yield (*path, str(name)), copy.deepcopy(value)
